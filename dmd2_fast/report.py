"""report.html: a run on one self-contained page; and the same table as text for the end of training.

Whatever is missing is left out: a run that is still going has no summary, a run that has just begun no curves. Every
text from the run is escaped, every picture embedded, nothing is loaded from elsewhere.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dmd2_fast.report_style import STYLE
from dmd2_fast.report_svg import Curve, Guide, line_chart, number, share_bar
from dmd2_fast.runs import read_json, read_metrics, write_atomic

MAX_GRIDS = 12
"""Grids on the filmstrip; more are thinned evenly."""

COLUMNS = (
    ("network", "network"),
    ("evaluations", "evaluations"),
    ("fd", "FD"),
    ("fd_pixels", "FD pixels"),
    ("accuracy", "accuracy"),
    ("precision", "precision"),
    ("recall", "recall"),
    ("nearest_training", "nearest"),
    ("seconds", "s / 1,000"),
)
"""(key of a row, heading) of the results table."""

NOTHING = "-"
"""Stands for a figure that is missing."""

PANELS: tuple[tuple[str, tuple[tuple[str, str], ...], str], ...] = (
    (
        "Generator loss",
        (
            ("generator/loss", "total"),
            ("generator/dmd", "distribution matching"),
            ("generator/gan", "GAN"),
            ("generator/regression", "regression"),
        ),
        "auto",
    ),
    (
        "Fake-score loss",
        (
            ("fake_score/loss", "total"),
            ("fake_score/denoising", "denoising"),
            ("fake_score/gan", "GAN"),
            ("fake_score/r1", "R1"),
        ),
        "auto",
    ),
    ("GAN logits", (("logits/real", "real"), ("logits/fake", "generated")), "linear"),
    ("Gradient norm", (("generator/grad_norm", "generator"), ("fake_score/grad_norm", "fake score")), "log"),
    ("Fréchet distance", (("eval/fd", "generator"),), "log"),
    ("Precision and recall", (("eval/precision", "precision"), ("eval/recall", "recall")), "linear"),
    ("Learning rate", (("generator/lr", "generator"), ("fake_score/lr", "fake score")), "linear"),
    ("Skipped updates", (("skipped/generator", "generator"), ("skipped/fake_score", "fake score")), "linear"),
)
"""(title, ((metric, label), ...), scale) of the charts."""

EXACT_PANELS = ("Learning rate", "Skipped updates")
"""Charts of settings and counts, which have no noise to smooth away."""

OPTIONAL_METRICS = (
    "fake_score/r1", "skipped/generator", "skipped/fake_score", "generator/gan", "fake_score/gan",
    "generator/regression",
)  # fmt: skip
"""Curves that are left out where they are 0 throughout: the setting is off, or nothing happened."""


def _finite(value: Any) -> float | None:
    """The value as a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
        return None  # too large to draw, infinite, or not a number
    return float(value)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def summary_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a summary.json, the floor last."""
    rows = summary.get("rows")
    result = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    floor = dict(_mapping(summary.get("floor_row")))
    if not floor and _finite(summary.get("floor")) is not None:
        floor = {"fd": summary["floor"]}
    if floor:
        # The floor's distance is that of held-out images, and no network was run for it.
        result.append({**floor, "network": "training images (floor)", "evaluations": None, "seconds": None})
    return result


def _decimals(key: str, rows: Sequence[Mapping[str, Any]]) -> int:
    """Digits after the point for a whole column, so that its points stand below each other."""
    if key in ("evaluations", "seconds"):
        return 0 if key == "evaluations" else 2
    sizes = [abs(value) for row in rows if (value := _finite(row.get(key))) is not None]
    return 3 if max(sizes, default=0) < 10 else 2


def _cell(value: Any, decimals: int) -> str:
    if isinstance(value, str):
        return value
    finite = _finite(value)
    if finite is None:
        return NOTHING
    return f"{finite:.{decimals}f}"


def _cells(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The table's texts, row by row."""
    decimals = {key: _decimals(key, rows) for key, _ in COLUMNS}
    return [[_cell(row.get(key), decimals[key]) for key, _ in COLUMNS] for row in rows]


def format_table(summary: Mapping[str, Any]) -> str:
    """The results as a text table, one line a row; "" without rows."""
    rows = summary_rows(summary)
    if not rows:
        return ""
    table = [[heading for _, heading in COLUMNS], *_cells(rows)]
    widths = [max(len(line[column]) for line in table) for column in range(len(COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(pairs)).rstrip()
        for pairs in (list(zip(line, widths, strict=True)) for line in table)
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def print_table(summary: Mapping[str, Any]) -> None:
    """Print `format_table`."""
    print(format_table(summary))


def _html_table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for _, heading in COLUMNS)
    body = []
    for name, *figures in _cells(rows):
        kind = "ours" if name == "generator" else "floor" if "(floor)" in name else ""
        cells = "".join(f"<td>{escape(figure)}</td>" for figure in figures)
        body.append(f'<tr class="{kind}"><th scope="row">{escape(name)}</th>{cells}</tr>')
    return (
        f'<div class="card scroll"><table id="results"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
        '<p class="soft legend-text">FD: Fréchet distance to the test split, in the features of a small classifier and '
        "in pixels; lower is better. Accuracy, precision, recall: higher is better. Nearest: mean distance to the "
        "nearest training image (in the last row, of held-out images). s / 1,000: seconds to draw 1,000 samples.</p>"
    )


def _row(rows: Sequence[Mapping[str, Any]], network: str) -> Mapping[str, Any]:
    """The network's row with the most evaluations."""
    found = [row for row in rows if row.get("network") == network]
    return max(found, key=lambda row: _finite(row.get("evaluations")) or 0, default={})


def duration(seconds: float) -> str:
    """Seconds as a length of time for people."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _headlines(rows: Sequence[Mapping[str, Any]], seconds: float | None) -> str:
    ours, teacher = _row(rows, "generator"), _row(rows, "teacher")
    steps, teacher_steps = (_cell(row.get("evaluations"), 0) for row in (ours, teacher))
    figures = []

    def ratio(key: str) -> float | None:
        mine, other = _finite(ours.get(key)), _finite(teacher.get(key))
        return mine / other if mine is not None and other else None

    if (fd := _finite(ours.get("fd"))) is not None:
        against = ratio("fd")
        note = f"{against:.2f} x the teacher at {teacher_steps} evaluations" if against else "to the test split"
        figures.append(("Fréchet distance", number(fd), note))
    if (recall := _finite(ours.get("recall"))) is not None:
        other = _finite(teacher.get("recall"))
        figures.append(("Recall", f"{recall:.2f}", f"teacher {other:.2f}" if other is not None else "diversity"))
    if (precision := _finite(ours.get("precision"))) is not None:
        other = _finite(teacher.get("precision"))
        figures.append(("Precision", f"{precision:.2f}", f"teacher {other:.2f}" if other is not None else "quality"))
    if (faster := ratio("seconds")) is not None and faster > 0:
        figures.append(("Faster sampling", f"{1 / faster:.3g} x", f"{steps} evaluations instead of {teacher_steps}"))
    if seconds is not None:
        figures.append(("Training time", duration(seconds), "wall clock of this run"))
    if not figures:
        return ""
    cards = (
        f'<div class="figure"><div class="label">{escape(label)}</div><div class="value">{escape(value)}</div>'
        f'<div class="note">{escape(note)}</div></div>'
        for label, value, note in figures
    )
    return f'<div class="figures">{"".join(cards)}</div>'


def _curve(metrics: Sequence[Mapping[str, Any]], key: str, label: str) -> Curve:
    points = [(float(record["iteration"]), _finite(record[key])) for record in metrics if key in record]
    return Curve(label, points)


def _charts(metrics: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> str:
    charts = []
    for title, series, scale in PANELS:
        curves = []
        for key, label in series:
            curve = _curve(metrics, key, label)
            if key in OPTIONAL_METRICS and not any(y for _, y in curve.points):
                continue
            curves.append(curve)
        guides = []
        if title == "Fréchet distance":
            teacher = _finite(_row(rows, "teacher").get("fd"))
            floor = _finite(_row(rows, "training images (floor)").get("fd"))
            guides = [Guide(name, value) for name, value in (("teacher", teacher), ("floor", floor)) if value]
        charts.append(line_chart(title, curves, scale=scale, guides=guides, smoothed=title not in EXACT_PANELS))
    drawn = "".join(charts)
    return f'<h2>Training</h2><div class="charts">{drawn}</div>' if drawn else ""


def _picture(path: Path, caption: str, kind: str = "") -> str:
    """An embedded PNG, or "" where there is none or it is cut short (one being written ends without its last chunk)."""
    try:
        data = path.read_bytes()
    except OSError:
        return ""
    if not data.startswith(b"\x89PNG\r\n\x1a\n") or b"IEND" not in data[-12:]:
        return ""
    source = base64.b64encode(data).decode()
    return (
        f'<figure class="{kind}"><img alt="{escape(caption)}" src="data:image/png;base64,{source}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _film(folder: Path) -> str:
    entries = folder.glob("iteration-*.png") if folder.is_dir() else ()
    found = [(match, path) for path in entries if (match := re.fullmatch(r"iteration-(\d+)", path.stem))]
    grids = sorted((int(match[1]), path) for match, path in found)
    if len(grids) > MAX_GRIDS:
        grids = [grids[round(i * (len(grids) - 1) / (MAX_GRIDS - 1))] for i in range(MAX_GRIDS)]
    frames = "".join(_picture(path, f"iteration {iteration:,}") for iteration, path in grids)
    if not frames:
        return ""
    return f'<h2>The same noise over time</h2><div class="film" id="film" tabindex="0">{frames}</div>'


def _time_shares(metrics: Sequence[Mapping[str, Any]]) -> str:
    totals: dict[str, float] = {}
    for record in metrics:
        for key, value in record.items():
            if key.startswith("seconds/"):
                name = key.removeprefix("seconds/").replace("_", " ")
                totals[name] = totals.get(name, 0.0) + max(_finite(value) or 0.0, 0.0)
    bar = share_bar([(name, value) for name, value in totals.items() if value > 0])
    return f'<h2>Where the time went</h2><div class="card">{bar}</div>' if bar else ""


def _facts(title: str, values: Mapping[str, Any]) -> str:
    if not values:
        return ""
    items = []
    for key, value in values.items():
        shown = number(value) if isinstance(value, float) and math.isfinite(value) else value
        text = "none" if shown is None else shown if isinstance(shown, str) else json.dumps(shown, default=str)
        items.append(f"<dt>{escape(str(key).replace('_', ' '))}</dt><dd>{escape(text)}</dd>")
    return f'<div class="card"><h3>{escape(title)}</h3><dl>{"".join(items)}</dl></div>'


def _made_with(config: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    facts = "".join(
        _facts(title, _mapping(summary.get(key)))
        for title, key in (("Machine", "machine"), ("Versions", "versions"), ("Time", "time"))
    )
    command = summary.get("command")
    if isinstance(command, str) and command:
        facts += f'<div class="card"><h3>Command</h3><pre>{escape(command)}</pre></div>'
    if facts:
        facts = f'<div class="pair">{facts}</div>'
    if config:
        text = escape(json.dumps(config, indent=2, ensure_ascii=False))
        facts += f'<details class="card"><summary>Configuration</summary><pre>{text}</pre></details>'
    return f"<h2>Made with</h2>{facts}" if facts else ""


def _skipped(metrics: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for name in ("generator", "fake_score"):
        counts = [value for record in metrics if (value := _finite(record.get(f"skipped/{name}")))]
        if counts:
            parts.append(f"{max(counts):.0f} of the {name.replace('_', ' ')}")
    if not parts:
        return ""
    return f'<p class="warn">Updates skipped for a non-finite loss or gradient: {" and ".join(parts)}.</p>'


def render_report(folder: Path) -> str:
    """The page of a run folder as HTML."""
    config, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
    metrics, rows = read_metrics(folder / "metrics.jsonl"), summary_rows(summary)
    ours = _mapping(config.get("dmd2_fast"))
    run, generator = _mapping(ours.get("run")), _mapping(ours.get("generator"))
    steps = generator.get("steps")
    num_steps = len(steps) if isinstance(steps, list) and steps else None
    total = _finite(run.get("iterations"))
    done = max((float(record["iteration"]) for record in metrics), default=0.0)
    finished = bool(summary.get("rows"))
    facts = [f"{num_steps}-step generator" if num_steps else "generator"]
    if total:
        facts.append(f"{total:,.0f} iterations" if finished else f"at iteration {done:,.0f} of {total:,.0f}")
    if _finite(run.get("seed")) is not None:
        facts.append(f"seed {run['seed']}")
    times = [value for record in metrics if (value := _finite(record.get("time"))) is not None]
    name = escape(folder.resolve().name)
    bar = ""
    if total and not finished:
        bar = f'<div class="progress"><i style="width:{min(100 * done / total, 100):.1f}%"></i></div>'
    results = f"<h2>Results</h2>{_html_table(rows)}" if rows else ""
    samples = _picture(folder / "samples.png", "Samples of the finished generator", "samples")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}: distillation report</title><style>{STYLE}</style></head><body><main>"
        f'<h1>{name}</h1><p class="soft">{escape(" · ".join(facts))}</p>{bar}{_skipped(metrics)}'
        f"{_headlines(rows, max(times, default=None))}{results}"
        f"{f'<h2>Samples</h2>{samples}' if samples else ''}{_film(folder / 'grids')}{_charts(metrics, rows)}"
        f"{_time_shares(metrics)}{_made_with(config, summary)}"
        "<footer>Written by dmd2_fast. The figures are in summary.json, the curves in metrics.jsonl.</footer>"
        "</main></body></html>\n"
    )


def write_report(run_folder: str | Path) -> Path:
    """Write `report.html` into a run folder, whole or not at all, and return its path. Raises OSError."""
    folder = Path(run_folder)
    target = folder / "report.html"
    write_atomic(target, render_report(folder))
    return target
