"""`python -m benchmarks.plot results.json [--out folder]`: bar charts of results, as PNG and SVG.

results.json: what `pytest benchmarks --benchmark-only --benchmark-json results.json` wrote, or `python -m
benchmarks.compare --json results.json`. One chart a dtype and number of threads: for each case, how many times as long
as ours every other contestant takes (forward and backward where there is a backward pass).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.tables import OTHERS, by_case, environment_line

COLOURS = {"reference": "#9aa5b1", "compiled": "#4c78a8", "dmd2": "#e07b39", "fastgen": "#54a24b"}
Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """One record for each contestant of each case. ValueError where the file has none."""
    content = json.loads(path.read_text())
    records: list[Record] = []
    for entry in content.get("benchmarks", []):
        if "contestant" in entry.get("extra_info", {}):
            records.append(entry["extra_info"] | {"seconds": entry["stats"]["min"]})
    for entry in content.get("compare", []):
        ours, ratios = entry["seconds"]["ours"], entry["ratios"]
        times = {"ours": 1.0} | ratios | {"compiled": ratios["best_compiled"]}
        records += [entry | {"contestant": name, "seconds": ours * value} for name, value in times.items()]
    if not records:
        raise ValueError(f"{path}: no results of the operators' benchmarks in it")
    return records


def slowdowns(records: list[Record]) -> dict[str, dict[str, float]]:
    """{case: {contestant: its time / ours}}: forward and backward together, or forward where that is all there is."""
    cases = by_case(records)
    complete = {key[:3] for key in cases if key[3] == "both"}
    bars: dict[str, dict[str, float]] = {}
    for key, contestants in cases.items():
        if key[3] != ("both" if key[:3] in complete else "forward") or "ours" not in contestants:
            continue
        ours = contestants["ours"]["seconds"]
        others = {name: contestants[name]["seconds"] / ours for name in OTHERS if name in contestants}
        bars[f"{key[0]}\n{key[1]}{'' if key[3] == 'both' else ', forward'}"] = others
    return bars


def draw(records: list[Record], title: str, stem: Path) -> list[Path]:
    """Write stem.png and stem.svg."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    bars = slowdowns(records)
    names = [name for name in OTHERS if any(name in others for others in bars.values())]
    height = 0.8 / max(len(names), 1)
    figure, axes = pyplot.subplots(figsize=(9, 1.6 + 0.62 * len(bars)), layout="constrained")
    for i, name in enumerate(names):
        at = [row + (i - (len(names) - 1) / 2) * height for row, others in enumerate(bars.values()) if name in others]
        values = [others[name] for others in bars.values() if name in others]
        lengths = [value - 1.0 for value in values]
        drawn = axes.barh(at, lengths, height, left=1.0, label=OTHERS[name], color=COLOURS[name])
        axes.bar_label(
            drawn, [f"{value:.1f}" if value >= 1 else f"{value:.2f}" for value in values], padding=2, fontsize=7
        )
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.margins(x=0.12)
    axes.set_yticks(range(len(bars)), list(bars), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("time / ours (log scale; right of 1: ours is faster)")
    axes.set_title(title)
    axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(names) or 1, frameon=False)
    axes.title.set_horizontalalignment("left")
    axes.title.set_position((0.0, 1.0))
    figure.supxlabel(environment_line(records), fontsize=7)
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return paths


def draw_all(records: list[Record], folder: Path) -> list[Path]:
    """A chart for each dtype and number of threads in the records."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for dtype, threads in dict.fromkeys((record["dtype"], record["threads"]) for record in records):
        chosen = [record for record in records if (record["dtype"], record["threads"]) == (dtype, threads)]
        plural = "" if threads == 1 else "s"
        paths += draw(chosen, f"{dtype}, {threads} thread{plural}", folder / f"operators-{dtype}-{threads}")
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the charts (default: this one)")
    arguments = parser.parse_args()
    try:
        paths = draw_all(read(arguments.results), arguments.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print("\n".join(map(str, paths)))


if __name__ == "__main__":
    main()
