"""The section of docs/results.md that `make ablations` writes: tables, and sentences drawn from the figures alone.

A row is compared with the default seed by seed: both have the same data, noise and start, so that the sign of the
difference says more than the ranges do.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .results import measured_on

SMALLER_IS_BETTER = {"fd": True, "precision": False, "recall": False, "fd_pixels": True}
BUDGETS = {"updates": "equal generator updates", "compute": "equal compute"}


@dataclass(frozen=True)
class Row:
    """A default configuration with a few settings changed."""

    name: str
    overrides: tuple[str, ...] = ()
    """the settings, as after `--set`"""
    expected: str | None = None
    """"better" or "worse": what the Frechet distance becomes by `source`; None where no paper compares the two"""
    source: str = ""


@dataclass(frozen=True)
class Outcome:
    """What came of a row at one budget."""

    row: Row
    updates: float
    """generator updates"""
    iterations: int
    flops: float
    """of the whole run, over the default's"""
    figures: dict[int, dict[str, float]] = field(default_factory=dict)
    """by seed: the columns of SMALLER_IS_BETTER and `cpu`, seconds"""


@dataclass(frozen=True)
class Comparison:
    """In how many of `num` seeds a figure is better and worse than the default's."""

    better: int
    worse: int
    num: int

    @classmethod
    def of(cls, outcome: Outcome, default: Outcome, column: str) -> Comparison:
        sign = 1 if SMALLER_IS_BETTER[column] else -1
        seeds = outcome.figures.keys() & default.figures.keys()
        gains = [sign * (default.figures[seed][column] - outcome.figures[seed][column]) for seed in seeds]
        return cls(sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains), len(gains))

    @property
    def verdict(self) -> str | None:
        """ "better" or "worse" where all seeds agree."""
        if self.num and self.better == self.num:
            return "better"
        return "worse" if self.num and self.worse == self.num else None

    def __str__(self) -> str:
        if self.verdict is not None:
            return f"{self.verdict} in {self.num} of {self.num} seeds"
        return f"better in {self.better} and worse in {self.worse} of {self.num} seeds"


def _cell(outcome: Outcome, column: str, form: str) -> str:
    values = [figures[column] for figures in outcome.figures.values()]
    if not values:
        return "no run"
    return f"{statistics.mean(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def table(outcomes: Sequence[Outcome], default: Outcome, own: set[Row] | None = None) -> list[str]:
    """Means, ranges, and seeds in which a row is better / worse than the default. Rows beside `own` are marked: =."""
    lines = [
        "| | generator updates | iterations | FLOPs | " + " | ".join(SMALLER_IS_BETTER) + " | CPU s |",
        "| --- |" + " --- |" * (len(SMALLER_IS_BETTER) + 4),
    ]
    for outcome in outcomes:
        mark = "" if own is None or outcome.row in {*own, default.row} else " ="
        cells = [outcome.row.name + mark, f"{outcome.updates:.0f}", str(outcome.iterations), f"{outcome.flops:.2f}"]
        for column in SMALLER_IS_BETTER:
            found = Comparison.of(outcome, default, column)
            cells.append(_cell(outcome, column, ".3f"))
            if outcome.row != default.row:
                cells[-1] += f" {found.better}/{found.worse}"
        lines.append("| " + " | ".join([*cells, _cell(outcome, "cpu", ".0f")]) + " |")
    return lines


def sentence(row: Row, found: dict[str, Comparison]) -> str:
    """What a row did to the Frechet distance at each budget, and whether that is what a paper has."""
    parts = []
    for budget, comparison in found.items():
        claim = ""
        if row.expected is not None and comparison.verdict is not None:
            claim = f", {'as in' if comparison.verdict == row.expected else 'against'} {row.source}"
        elif row.expected is not None:
            claim = f" ({row.source}: {row.expected})"
        same = " and compute" if len(found) == 1 else ""
        parts.append(f"{comparison} at {BUDGETS[budget]}{same}{claim}")
    return f"- {row.name}: {'; '.join(parts)}."


def _introduction(seeds: Sequence[int], summary: dict[str, Any]) -> list[str]:
    return [
        "## Ablations",
        "",
        f"Written by `make ablations`: seeds {', '.join(map(str, seeds))}, one teacher, 2,000 samples a figure, all "
        "against the 360 held-out test digits; columns as above. Each cell has mean (range) over seeds and b/w: in how "
        "many seeds the row is better / worse than the default of the same seed. `CPU s`: what training took, on one "
        f"thread, with another run beside it. {measured_on(summary)}",
        "",
        "All runs are shorter than the configuration's own. At equal generator updates a row has as many as the "
        "default, so its iterations are updates x `fake_score.ttur_ratio`. At equal compute it has as many as cost the "
        "default's FLOPs (column `FLOPs`: of the run, over the default's, as `dmd2-fast plan` counts them); rows "
        "within 2 % are not run again. Warm-ups, the cosine and the memory of the averaged weights keep their share of "
        "the run. All else is the configuration's, tuned for the default alone, but for the last table's settings.",
    ]


def section(kinds: dict[str, dict[str, list[Outcome]]], configs: dict[str, str], summary: dict[str, Any]) -> str:
    """The whole text. `kinds`: name of the default -> budget -> outcomes, the default's first."""
    seeds = sorted({seed for found in kinds.values() for item in found["updates"] for seed in item.figures})
    lines = _introduction(seeds, summary)
    rows: list[Row] = []
    for kind, budgets in kinds.items():
        default = budgets["updates"][0]
        again = {outcome.row: outcome for outcome in budgets.get("compute", ())}
        found: dict[Row, dict[str, Comparison]] = {}
        for budget, outcomes in budgets.items():
            for outcome in outcomes:
                found.setdefault(outcome.row, {})[budget] = Comparison.of(outcome, default, "fd")
        lines += ["", f"### {kind} generator (`{configs[kind]}`)", "", f"At {BUDGETS['updates']}:", ""]
        lines += table(budgets["updates"], default)
        lines += ["", f"At {BUDGETS['compute']} (=: the figures above):", ""]
        lines += table([again.get(outcome.row, outcome) for outcome in budgets["updates"]], default, set(again))
        lines += ["", "The Frechet distance against the default's:", ""]
        lines += [sentence(row, comparisons) for row, comparisons in found.items() if row != default.row]
        rows += [row for row in found if row.overrides and row not in rows]
    lines += ["", "### Settings of the rows", "", "| | `--set` |", "| --- | --- |"]
    lines += [f"| {row.name} | " + " ".join(f"`{override}`" for override in row.overrides) + " |" for row in rows]
    return "\n".join(lines) + "\n"
