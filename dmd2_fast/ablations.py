"""`make ablations`: what each part of the recipe is worth, on the embedded default; the tables are in docs/results.md.

A row of ROWS runs at every seed for as many generator updates as the default, and once more for as many FLOPs, counted
as `dmd2-fast plan` counts them. Every run is the trainer on one rank and one thread, in a process of its own, one on
each core. Finished runs are reused, so an interrupted call goes on; a run that fails costs the others nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .ablations_page import Outcome, Row, section
from .cli_parser import parse_training_arguments
from .config import Config, load_config
from .errors import UserError
from .plan_counts import count_updates
from .plan_memory import ZeRO
from .plan_networks import build, build_base
from .ranks import available_cores, init_distributed, quiet_libraries
from .results import CONFIGS, SEEDS, check_teacher_is_there, find, write_below
from .runs import inspect_run, open_run, read_json

FOLDER = Path("runs/ablations")
UPDATES = {"4-step": 60, "1-step": 240}
"""Generator updates of the defaults' runs: fewer than their configurations have, so that all take less than an hour."""
SAME_COMPUTE = 0.02
"""A row whose FLOPs differ by less from the default's is not run again at equal compute."""
COMMON = (
    'zero_optimization.leaf_module={"classes": ["diffusers.models.resnet.ResnetBlock2D"]}', "data.loader=plain",
    "run.progress=false", "run.sample_interval=0", "run.num_samples=2000", "run.checkpoint_interval=1000000",
)  # fmt: skip
"""Settings of every run, which save time and leave what is computed as it is."""

DEFAULT = Row("DMD2 (default)")
TTUR_OFF = Row("two time-scale rule off", ("fake_score.ttur_ratio=1",), "worse", "DMD2, section 4.2")
_GAN_OFF = ("adversarial.generator_weight=0", "adversarial.discriminator_weight=0")
_LADD = (
    "distribution_matching.weight=0", "adversarial.features=teacher", 'adversarial.levels=["down.0", "mid"]',
    "adversarial.generator_weight=1", "adversarial.discriminator_weight=1", "generator.optimizer.params.lr=5e-5",
    'adversarial.r1={"kind": "approximate", "weight": 0.1}',
)  # fmt: skip


def _divergence(name: str) -> tuple[str, str]:
    return f"distribution_matching.divergence={name}", "distribution_matching.ratio_histogram={}"


ROWS: dict[str, tuple[Row, ...]] = {
    "4-step": (
        DEFAULT,
        TTUR_OFF,
        Row("GAN off", _GAN_OFF, "worse", "DMD2, section 4.3"),
        Row("backward simulation off", ("generator.input=noised_data",), "worse", "DMD2, section 4.5"),
        Row("rollout index per batch", ("generator.rollout_index=batch",)),
        Row("independent passes", ("passes=independent",)),
        Row("teacher features", ("adversarial.features=teacher",)),
        Row("f-distill, forward KL", _divergence("kl"), "better", "f-distill"),
        Row("f-distill, Jensen-Shannon", _divergence("js"), "better", "f-distill"),
        Row("f-distill, softened reverse KL", _divergence("softened_rkl")),
        Row("f-distill, Neyman", _divergence("neyman")),
        Row("f-distill, squared Hellinger", _divergence("squared_hellinger")),
        Row("f-distill, Jeffreys", _divergence("jeffreys")),
        Row("LADD", _LADD),
    ),
    "1-step": (DEFAULT, TTUR_OFF),
}


@dataclass(frozen=True)
class Run:
    """One training: `deepspeed train.py --config CONFIG --set OVERRIDE ...` trains the same."""

    name: str
    config: str
    overrides: tuple[str, ...]

    @property
    def arguments(self) -> list[str]:
        return ["--config", self.config, *(word for override in self.overrides for word in ("--set", override))]

    @property
    def folder(self) -> Path:
        return FOLDER / self.name


@dataclass(frozen=True)
class Planned:
    """A row at one budget: its runs by seed, and their outcome, which has no figures yet."""

    kind: str
    budget: str
    outcome: Outcome
    runs: dict[int, Run]


def flops_of_a_cycle(config: Config) -> float:
    """FLOPs of one generator update and the `ttur_ratio` fake-score updates that come with it."""
    networks = build(config, build_base(config.model)[0])
    counts = count_updates(config, networks, ZeRO.from_config(config).persistence)
    return counts.cycle(config.fake_score.ttur_ratio).flops * config.gradient_accumulation_steps


def of_length(full: Config, updates: float, iterations: int) -> list[str]:
    """Overrides for a run of another length: warm-ups and the average's memory keep the share of the run that they have
    in `full`, the default's configuration; a cosine ends where its run does."""
    overrides = [f"run.iterations={iterations}"]
    for network, settings in (("generator", full.generator), ("fake_score", full.fake_score)):
        warmup = round(settings.lr_scheduler.warmup_iterations * iterations / full.run.iterations)
        overrides.append(f"{network}.lr_scheduler.params.warmup_iterations={warmup}")
    if full.generator.ema is not None:
        full_updates = full.run.iterations / full.fake_score.ttur_ratio
        overrides.append(f"generator.ema={full.generator.ema ** (full_updates / updates):.6g}")
    return overrides


def make_plan(kind: str, seeds: Sequence[int] = SEEDS) -> list[Planned]:
    """All runs of the 4-step or the 1-step generator; a row of the default's FLOPs has none at equal compute."""
    path, full, planned = CONFIGS[kind], load_config(CONFIGS[kind]), []
    default = flops_of_a_cycle(full) * UPDATES[kind]
    for row in ROWS[kind]:
        config = load_config(path, row.overrides)
        flops = flops_of_a_cycle(config) * UPDATES[kind] / default
        budgets = {"updates": float(UPDATES[kind])}
        if abs(flops - 1) > SAME_COMPUTE:
            budgets["compute"] = UPDATES[kind] / flops
        for budget, updates in budgets.items():
            iterations = max(1, round(updates * config.fake_score.ttur_ratio))
            outcome = Outcome(row, updates, iterations, flops * updates / UPDATES[kind])
            shared, runs = (*COMMON, *row.overrides, *of_length(full, updates, iterations)), {}
            for seed in seeds:
                name = f"{kind}-{re.sub('[^a-z0-9]+', '-', row.name.lower()).strip('-')}-{budget}-seed{seed}"
                runs[seed] = Run(name, path, (*shared, f"run.seed={seed}", f"run.folder={FOLDER / name}"))
            planned.append(Planned(kind, budget, outcome, runs))
    return planned


def train_one(arguments: Sequence[str]) -> int:
    """Train and measure one run in this process; it leaves what train.py leaves, but for the report."""
    from .evaluation import evaluate_run
    from .trainer import Trainer

    args = parse_training_arguments(arguments)
    config = load_config(args.config, args.set)
    quiet_libraries()
    rank = init_distributed()
    run = open_run(config, fresh=inspect_run(config))  # half of a run would tell half of the time
    trainer = Trainer(config, run, rank)
    start = time.process_time()
    trainer.train()
    seconds = {"cpu": time.process_time() - start, "distil": trainer.seconds()}
    trainer.export()
    trainer.close()
    evaluate_run(run.path, generator_only=True, time=seconds)
    return 0


def execute(run: Run) -> str | None:
    """Run one that is missing in a process of its own; why it failed, or None."""
    if (run.folder / "summary.json").exists():
        return None
    log, start = run.folder.with_name(f"{run.name}.log"), time.perf_counter()
    command = [sys.executable, "-m", "dmd2_fast.ablations", *run.arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=file, env=environment, check=False).returncode
    print(f"{run.name}: {f'exit code {code}' if code else f'{time.perf_counter() - start:.0f} s'}", flush=True)
    return f"{run.name}: training ended with exit code {code}; {log} says why" if code else None


def execute_all(runs: Sequence[Run]) -> list[str]:
    """Run all that are missing, one on each core; what failed. RunFolderError where one was of other settings."""
    for run in runs:
        inspect_run(load_config(run.config, run.overrides))  # figures of another recipe are no results of this one
    FOLDER.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(available_cores()) as pool:
        try:
            return [failure for failure in pool.map(execute, runs) if failure is not None]
        except BaseException:  # Ctrl-C, which has reached the runs as well
            pool.shutdown(cancel_futures=True)
            raise


def collect(planned: Sequence[Planned]) -> dict[str, dict[str, list[Outcome]]]:
    """The outcomes as the page wants them, with the figures of the runs that are finished."""
    results: dict[str, dict[str, list[Outcome]]] = {}
    for item in planned:
        figures = {}
        for seed, run in item.runs.items():
            if summary := read_json(run.folder / "summary.json"):
                figures[seed] = {**find(summary, "generator"), "cpu": summary["time"]["cpu"]}
        outcomes = results.setdefault(item.kind, {}).setdefault(item.budget, [])
        outcomes.append(replace(item.outcome, figures=figures))
    return results


def any_summary(planned: Sequence[Planned]) -> dict[str, Any]:
    """The first summary there is, for machine and versions; `UserError` when no run was finished."""
    for item in planned:
        for run in item.runs.values():
            if summary := read_json(run.folder / "summary.json"):
                return summary
    raise UserError("no run was finished: there is nothing to write")


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything that is missing, then write the section; with a command line like train.py's, that one run."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        if arguments:
            return train_one(arguments)
        check_teacher_is_there(load_config(CONFIGS["4-step"]), "ablations")
        planned = [item for kind in ROWS for item in make_plan(kind)]
        failures = execute_all([run for item in planned for run in item.runs.values()])
        write_below(section(collect(planned), CONFIGS, any_summary(planned)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
