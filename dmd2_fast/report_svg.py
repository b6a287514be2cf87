"""Charts as inline SVG: axes with round ticks, one line per curve, colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 400, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 24
MAX_POINTS = 240
NUM_COLOURS = 6


@dataclass(frozen=True)
class Curve:
    """One line: x rising; y None where there is no finite value, which leaves a gap."""

    label: str
    points: Sequence[tuple[float, float | None]]


@dataclass(frozen=True)
class Guide:
    """A dashed horizontal line with its name."""

    label: str
    value: float


@dataclass(frozen=True)
class Axis:
    """The mapping of values to pixels along one side, and where its ticks stand."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """Pixel of a value, held inside the frame."""
        low, high, at = (_log10(v) if self.log else v for v in (self.low, self.high, value))
        share = min(max((at - low) / (high - low), 0.0), 1.0)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside the axis, about five of them."""
        return _log_ticks(self.low, self.high) if self.log else _linear_ticks(self.low, self.high)


def _log10(value: float) -> float:
    return math.log10(max(value, 1e-300))


def _linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    raw = (high - low) / about
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * factor for factor in (1, 2, 5, 10) if base * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [(first + i) * step for i in range(math.floor(high / step + 1e-9) - first + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(_log10(low)), math.ceil(_log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [factor * 10.0**decade for decade in decades for factor in factors]
        ticks = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
        if len(ticks) >= 3:
            break
    return ticks[:: math.ceil(len(ticks) / 6)] if ticks else []


def number(value: float) -> str:
    """A number for people: three digits that matter, thousands set apart."""
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1e6 or size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[round(share * (len(ordered) - 1))]


def value_axis(values: Sequence[float], scale: str = "auto") -> tuple[Axis, bool]:
    """The vertical axis for these values, and whether rare extremes were cut off.

    `scale` is linear, log or auto: logarithmic where all values are positive and span more than a factor of 20. A
    linear axis that few extremes would stretch more than fourfold ends at the 1st and 99th percentile instead.
    """
    low, high = min(values), max(values)
    log = low > 0 and (scale == "log" or (scale == "auto" and high / low > 20))
    cut = False
    if not log and len(values) >= 50:
        inner_low, inner_high = _percentile(values, 0.01), _percentile(values, 0.99)
        if inner_high > inner_low and high - low > 4 * (inner_high - inner_low):
            low, high, cut = inner_low, inner_high, True
    if log:
        low, high = (low / 1.1, high * 1.1) if high / low < 1.5 else (low / 1.05, high * 1.05)
    else:
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        # A quantity that is never negative is read best from zero, unless it stays far away from it.
        low = 0.0 if 0 <= low < 0.5 * high else low - margin
        high += margin
    return Axis(low, high, HEIGHT - BOTTOM, TOP, log), cut


def thin(points: Sequence[tuple[float, float | None]], most: int = MAX_POINTS) -> list[tuple[float, float | None]]:
    """At most about `most` points, each the mean of its neighbours; a stretch without values stays one."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    result: list[tuple[float, float | None]] = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        values = [y for _, y in group if y is not None]
        result.append((sum(x for x, _ in group) / len(group), sum(values) / len(values) if values else None))
    return result


def _running_mean(values: Sequence[float | None], decay: float) -> list[float | None]:
    total = weight = 0.0
    result: list[float | None] = []
    for value in values:
        if value is not None:
            total, weight = decay * total + value, decay * weight + 1
        result.append(None if value is None else total / weight)
    return result


def smooth(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """A running mean over about a twentieth of the curve, taken from both ends so that it does not lag behind."""
    decay = 1 - 1 / max(len(points) / 20, 1)
    values = [y for _, y in points]
    forward, backward = _running_mean(values, decay), _running_mean(values[::-1], decay)[::-1]
    return [
        (x, None if a is None or b is None else (a + b) / 2)
        for (x, _), a, b in zip(points, forward, backward, strict=True)
    ]


def _path(points: Sequence[tuple[float, float | None]], x_axis: Axis, y_axis: Axis, style: str) -> str:
    """One path; a point alone between gaps becomes a dot, since a line needs two."""
    commands, dots, run = [], [], 0
    for index, (x, y) in enumerate(points):
        if y is None:
            run = 0
            continue
        at = f"{x_axis.place(x):.1f} {y_axis.place(y):.1f}"
        commands.append(f"{'L' if run else 'M'}{at}")
        run += 1
        alone = run == 1 and (index + 1 == len(points) or points[index + 1][1] is None)
        if alone:
            dots.append(f'<circle cx="{at.split()[0]}" cy="{at.split()[1]}" r="2.5" class="dot {style}"/>')
    return f'<path class="line {style}" d="{"".join(commands)}"/>{"".join(dots)}' if commands else ""


def _frame(x_axis: Axis, y_axis: Axis) -> str:
    parts = []
    for tick in y_axis.ticks():
        y = y_axis.place(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x_axis.ticks():
        x = x_axis.place(tick)
        anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{number(tick)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    return "".join(parts)


def _legend(curves: Sequence[Curve]) -> str:
    items = []
    for index, curve in enumerate(curves):
        values = [y for _, y in curve.points if y is not None]
        last = f" <b>{number(values[-1])}</b>" if values else ""
        items.append(f'<span><i class="chip c{index % NUM_COLOURS}"></i>{escape(curve.label)}{last}</span>')
    return f'<div class="legend">{"".join(items)}</div>'


def line_chart(
    title: str, curves: Sequence[Curve], *, scale: str = "auto", guides: Sequence[Guide] = (), smoothed: bool = True
) -> str:
    """A figure of curves over iterations; "" where none has a finite value.

    With `smoothed`, a long curve is drawn pale with its running mean over it.
    """
    curves = [curve for curve in curves if any(y is not None for _, y in curve.points)]
    if not curves:
        return ""
    thinned = [thin(curve.points) for curve in curves]
    values = [y for points in thinned for _, y in points if y is not None] + [guide.value for guide in guides]
    y_axis, cut = value_axis(values, scale)
    xs = [x for points in thinned for x, _ in points]
    x_axis = Axis(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, LEFT, WIDTH - RIGHT)
    body = [_frame(x_axis, y_axis)]
    for guide in guides:
        y = y_axis.place(guide.value)
        body.append(f'<line class="guide" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        body.append(f'<text class="name" x="{LEFT + 4}" y="{y - 4:.1f}">{escape(guide.label)}</text>')
    for index, points in enumerate(thinned):
        colour = f"c{index % NUM_COLOURS}"
        noisy = smoothed and len(points) >= 40
        body.append(_path(points, x_axis, y_axis, f"{colour} raw" if noisy else colour))
        if noisy:
            body.append(_path(smooth(points), x_axis, y_axis, colour))
    notes = [*(["log scale"] if y_axis.log else []), *(["rare extremes cut off"] if cut else [])]
    note = f" <small>{', '.join(notes)}</small>" if notes else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}{note}</figcaption>{_legend(curves)}'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} over iterations">'
        f"{''.join(body)}</svg></figure>"
    )


def share_bar(shares: Sequence[tuple[str, float]]) -> str:
    """One bar cut into shares of a total, largest first, with a legend in percent; "" for a total of 0."""
    total = sum(value for _, value in shares)
    if total <= 0:
        return ""
    ordered = sorted(shares, key=lambda item: -item[1])
    bars, items, x = [], [], 0.0
    for index, (label, value) in enumerate(ordered):
        width = 100 * value / total
        colour = f"c{index % NUM_COLOURS}"
        bars.append(f'<rect class="{colour}" x="{x:.3f}" y="0" width="{width:.3f}" height="6"/>')
        items.append(f'<span><i class="chip {colour}"></i>{escape(label)} <b>{width:.1f} %</b></span>')
        x += width
    return (
        '<svg class="shares" viewBox="0 0 100 6" preserveAspectRatio="none" role="img" aria-label="shares of the time">'
        f'{"".join(bars)}</svg><div class="legend">{"".join(items)}</div>'
    )
