"""`make results`: the embedded default at three seeds, 4-step and 1-step, and docs/results.md from what came out.

Every run is the command a user would type; finished runs are reused, so an interrupted call goes on where it stopped.
Below MARKER the page is `make ablations`' (ablations.py); each of the two rewrites its own part alone.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from .config import Config, load_config
from .errors import UserError
from .runs import inspect_run, write_atomic

CONFIGS = {"4-step": "ds_digits.json", "1-step": "configs/ds_digits_1step.json"}
SEEDS = (0, 1, 2)
COLUMNS = ("fd", "fd_pixels", "precision", "recall", "accuracy", "nearest_training", "seconds")
OUT = Path("docs/results.md")
MARKER = "<!-- Below: written by `make ablations`; above: by `make results`. -->\n"


def write_above(text: str) -> None:
    """Replace what stands above MARKER in docs/results.md."""
    _write(text, _parts()[1])


def write_below(text: str) -> None:
    """Replace what stands below MARKER in docs/results.md."""
    _write(_parts()[0], text)


def _parts() -> tuple[str, str]:
    above, _, below = (OUT.read_text() if OUT.exists() else "").partition(MARKER)
    return above.rstrip("\n") + "\n", below.lstrip("\n")


def _write(above: str, below: str) -> None:
    OUT.parent.mkdir(exist_ok=True)
    write_atomic(OUT, f"{above}\n{MARKER}\n{below}" if below else above)
    print(f"\n{OUT}")


def check_teacher_is_there(config: Config, command: str) -> None:
    """`UserError` where nobody has trained the teacher that all runs share."""
    if not Path(config.model.path).exists():
        raise UserError(f"there is no teacher in {config.model.path}; `make {command}` trains it first")


def run_folder(name: str, seed: int) -> Path:
    return Path("runs/results") / f"{name}-seed{seed}"


def run(name: str, config: str, seed: int) -> dict[str, Any]:
    """Train one seed through the launcher and return its summary."""
    folder = run_folder(name, seed)
    overrides = [f"run.seed={seed}", f"run.folder={folder}"]
    command = ["--num_accelerators", "1", "train.py", "--config", config]
    command += [word for override in overrides for word in ("--set", override)]
    print(f"\n== {name}, seed {seed}: deepspeed {' '.join(command)}", flush=True)
    inspect_run(load_config(config, overrides))  # figures of another recipe are no results of this one
    if not (folder / "summary.json").exists() or not (folder / "report.html").exists():
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]
        code = subprocess.run([*launcher, *command], check=False).returncode
        if code:
            raise UserError(f"{name}, seed {seed}: training ended with exit code {code}")
    return json.loads((folder / "summary.json").read_text())


def find(summary: dict[str, Any], network: str, evaluations: int | None = None) -> dict[str, Any]:
    rows = [row for row in summary["rows"] if row["network"] == network]
    return next(row for row in rows if evaluations is None or row["evaluations"] == evaluations)


def mean_row(rows: list[dict[str, Any]]) -> str:
    """Markdown cells: mean over seeds, and in brackets the range of the Frechet distance."""
    cells = []
    for column in COLUMNS:
        values = [row[column] for row in rows]
        text = f"{statistics.mean(values):.3f}"
        if column == "fd" and len(values) > 1:
            text += f" ({min(values):.3f}-{max(values):.3f})"
        cells.append(text)
    return " | ".join(cells)


def table(summaries: list[dict[str, Any]]) -> list[str]:
    floor = summaries[0]["floor_row"]
    lines = ["| network | evaluations | " + " | ".join(COLUMNS) + " |", "| --- | --- |" + " --- |" * len(COLUMNS)]
    for row in summaries[0]["rows"]:
        same = [find(summary, row["network"], row["evaluations"]) for summary in summaries]
        lines.append(f"| {row['network']} | {row['evaluations']} | {mean_row(same)} |")
    cells = " | ".join(f"{floor[column]:.3f}" if column in floor else "" for column in COLUMNS)
    lines.append(f"| floor: training digits | | {cells} |")
    return lines


def measured_on(summary: dict[str, Any]) -> str:
    """Machine and versions, in a sentence each."""
    machine, versions = summary["machine"], summary["versions"]
    return (
        f"Machine: {machine['cpu']}, {machine['threads']} threads, no GPU. "
        f"torch {versions['torch']}, deepspeed {versions['deepspeed']}, diffusers {versions['diffusers']}."
    )


def page(summaries: dict[str, list[dict[str, Any]]]) -> str:
    """docs/results.md."""
    first = next(iter(summaries.values()))[0]
    lines = [
        "# Results of the embedded default",
        "",
        f"Written by `make results`: means over seeds {', '.join(map(str, SEEDS))} (in brackets the range), one "
        "teacher, 2,000 samples a row, all against the 360 held-out test digits. `seconds`: to sample 1,000 images.",
        measured_on(first),
        "",
        "`fd` is the Frechet distance in the features of a small classifier trained on the training digits "
        "(dmd2_fast/classifier.py), `fd_pixels` the same in pixels; precision and recall are k-nearest-neighbour "
        "ones (k = 3) in those features; `nearest_training` is the mean L2 distance to the nearest training image, "
        "in the last row that of held-out images.",
    ]
    for name, runs in summaries.items():
        generator = [find(summary, "generator")["fd"] for summary in runs]
        teacher = [find(summary, "teacher", 35)["fd"] for summary in runs]
        same = find(runs[0], "generator")["evaluations"]
        few = [find(summary, "teacher", same)["fd"] for summary in runs]
        minutes = statistics.mean(summary["time"]["distil"] for summary in runs) / 60
        lines += ["", f"## {name} generator (`{CONFIGS[name]}`)", "", *table(runs), ""]
        lines.append(
            "FD of the generator over that of the teacher at 35 evaluations: "
            f"{statistics.mean(generator) / statistics.mean(teacher):.2f}; at {same}: "
            f"{statistics.mean(generator) / statistics.mean(few):.3f}. "
            f"Distillation took {minutes:.1f} minutes a run."
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run everything that is missing, then write docs/results.md."""
    try:
        check_teacher_is_there(load_config(CONFIGS["4-step"]), "results")
        summaries = {name: [run(name, config, seed) for seed in SEEDS] for name, config in CONFIGS.items()}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_above(page(summaries))
    return 0


if __name__ == "__main__":
    sys.exit(main())
