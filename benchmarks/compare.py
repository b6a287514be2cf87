"""`python -m benchmarks.compare`: the operators on the CPU against what people write today, and against their limits.

Contestants of a case take turns, round after round; a ratio is the median of the rounds' ratios, a time the shortest.
So what disturbs the machine meanwhile disturbs all of them. On one thread the clock is the process's own (user and
system time), which other processes do not stop; on more it is the wall's. "torch.compile" is the faster of two: its
defaults, and with ATen's random numbers kept (where a case draws any). The limit is the random numbers alone
(philox_normal) where noise is drawn from a key, else a memory copy of the least bytes that have to move.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, harness, tables
from benchmarks.cases import DTYPE_NAMES, Case

DTYPES = (torch.float32, torch.bfloat16)
NORM_SHAPES = ((2, 1280, 32, 32), (2, 320, 64, 64))
HEAD_SIZES = (4, 16, 64)
LARGE_BATCH = 128
"""Eight tensors of that many latents are 268 MB in f32, 134 MB in bf16: beyond any CPU's cache."""


@dataclass(frozen=True)
class Bars:
    """What is asked for: at least so many times faster than each, at most so many times the limit."""

    dmd2: float | None = None
    fastgen: float | None = None
    compiled: float | None = None
    limit: float | None = None
    limit_in_cache: float | None = None
    """where all that moves fits into half of the last cache level"""


BARS = {
    "philox_normal": Bars(dmd2=4.0),
    "add_noise": Bars(6.0, 10.0, 5.0, 1.15),
    "r1_perturb": Bars(6.0, 8.5, 5.5, 1.1),
    "dmd_loss": Bars(20.0, 20.0, 2.4, 1.4, 2.3),
    "denoising_loss": Bars(2.0, 2.0, 1.2, 1.4),
    "group_norm_silu": Bars(dmd2=1.5, compiled=1.1),
    "gan_head_loss": Bars(3.0, 3.0, 1.5),
}
SCALING_BAR = 1.7


def plan(batches: list[int]) -> list[tuple[partial[Case], str]]:
    """(how to build a case, direction) of every line of the table."""
    lines: list[tuple[partial[Case], str]] = []
    for dtype in DTYPES:
        for build in (cases.philox_normal, cases.add_noise, cases.r1_perturb):
            lines += [(partial(build, batch, dtype, "cpu"), "forward") for batch in batches]
        lines += [(partial(cases.dmd_loss, batch, dtype, "cpu"), "both") for batch in (*batches, LARGE_BATCH)]
        lines += [(partial(cases.dmd_loss, batch, dtype, "cpu", guided=False), "both") for batch in batches]
        lines += [(partial(cases.denoising_loss, batch, dtype, "cpu"), "both") for batch in batches]
        for shape in NORM_SHAPES:
            for layout in (torch.contiguous_format, torch.channels_last):
                lines.append((partial(cases.group_norm_silu, shape, dtype, "cpu", layout=layout), "both"))
        lines += [(partial(cases.gan_head_loss, size, dtype, "cpu"), "both") for size in HEAD_SIZES]
    return lines


def measure(case: Case, direction: str, seconds: float) -> dict[str, Any]:
    """One line: shortest times and median ratios of a case on the present number of threads."""
    names = ["ours", *case.eager, "compiled"]
    if case.draws or case.operator == "philox_normal":
        names.append("compiled_aten")
    functions = {name: case.step(name, direction) for name in names}
    functions["limit"] = case.floor(direction)  # of random numbers alone: a copy, for what it is worth
    times = harness.interleaved(functions, seconds=seconds, now=harness.quiet_clock(case.device))
    shortest = {name: min(values) for name, values in times.items()}
    ratios = {name: harness.ratio(values, times["ours"]) for name, values in times.items() if name != "ours"}
    compiled = min((name for name in ratios if name.startswith("compiled")), key=ratios.__getitem__)
    return {
        "operator": case.operator,
        "size": case.size,
        "dtype": DTYPE_NAMES[case.dtype],
        "direction": direction,
        "backend": harness.runs_on(case.operator, case.device),
        "rounds": len(times["ours"]),
        "bytes": case.num_bytes(direction),
        "seconds": shortest,
        "ratios": {
            **{name: value for name, value in ratios.items() if name != "limit"},
            "best_compiled": ratios[compiled],
        },
        "compiled": {"compiled": "defaults", "compiled_aten": "ATen's random numbers"}[compiled],
        "times_the_limit": None if case.operator == "philox_normal" else 1 / ratios["limit"],
        **harness.environment(case.device),
    }


def scaling(case: Case, direction: str, threads: list[int], seconds: float) -> float:
    """How many times faster ours is on the last than on the first number of threads, taking turns: shortest times.

    Not medians: where others use the machine, several threads seldom run undisturbed, and never for long.
    """
    step = case.step("ours", direction)

    def on(count: int) -> None:
        torch.set_num_threads(count)
        step()

    functions = {str(count): partial(on, count) for count in threads}
    times = harness.interleaved(functions, seconds=seconds)
    return min(times[str(threads[0])]) / min(times[str(threads[-1])])


def run_line(index: int, threads: list[int], count: int, batches: list[int], seconds: float) -> dict[str, Any]:
    """Line `index` of the plan on `count` threads; with the last number of threads, the scaling too."""
    build, direction = plan(batches)[index]
    torch.set_num_threads(count)
    case = build.func.__wrapped__(*build.args, **build.keywords)  # not kept: some are large
    record = measure(case, direction, seconds)
    if len(threads) > 1 and count == threads[-1]:
        record["scaling"] = scaling(case, direction, threads, seconds / 2)
    return record


def run(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every line that was asked for, on every number of threads."""
    lines = [i for i, (build, _) in enumerate(plan(arguments.batch)) if build.func.__name__ in arguments.operators]
    jobs = [(i, arguments.threads, n, arguments.batch, arguments.seconds) for n in arguments.threads for i in lines]
    if arguments.malloc == "keep":
        harness.keep_memory()
        yield from (run_line(*job) for job in jobs)
        return
    # What glibc does with a block depends on those before it: a process for each line.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        yield from pool.map(run_line, *zip(*jobs, strict=True))


# --- the table --------------------------------------------------------------------------------------------------------


def against(value: float | None, bar: float | None, at_most: bool = False) -> str:
    """A ratio with its bar: "7.21 (>= 6)", "5.02 (>= 6) NOT MET"."""
    if value is None:
        return ""
    if bar is None:
        return f"{value:.2f}"
    is_met = value <= bar if at_most else value >= bar
    return f"{value:.2f} ({'<=' if at_most else '>='} {bar:g}){'' if is_met else ' NOT MET'}"


def limit_bar(record: dict[str, Any], cache: int) -> float | None:
    """The bar for `times_the_limit`: the looser one where everything that moves fits into half the last cache level."""
    bars = BARS.get(record["operator"], Bars())
    in_cache = record["bytes"] <= cache // 2
    return bars.limit_in_cache if bars.limit_in_cache and in_cache else bars.limit


def line(record: dict[str, Any], cache: int) -> list[str]:
    bars, ratios = BARS.get(record["operator"], Bars()), record["ratios"]
    direction = "" if record["operator"] == "philox_normal" else f", {record['direction']}"
    scale = record.get("scaling")
    return [
        record["operator"] + direction,
        record["size"],
        record["dtype"],
        str(record["threads"]),
        record["backend"],
        harness.duration(record["seconds"]["ours"]),
        against(ratios.get("dmd2"), bars.dmd2),
        against(ratios.get("fastgen"), bars.fastgen),
        against(ratios["best_compiled"], bars.compiled) + ("" if record["compiled"] == "defaults" else ", ATen"),
        against(record["times_the_limit"], limit_bar(record, cache), at_most=True),
        "" if scale is None else against(scale, SCALING_BAR),
    ]


def table(records: list[dict[str, Any]], cache: int) -> str:
    header = ["operator", "size", "dtype", "threads", "backend", "ours", "vs DMD2", "vs FastGen", "vs torch.compile"]
    header += ["times the limit", "1 to more threads"]
    about = f"{tables.environment_line(records)}, last cache level {cache >> 20} MiB. Bars in brackets. {__doc__}"
    return "\n".join([harness.markdown(header, [line(record, cache) for record in records]), "", about])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads (default: 1 2)")
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 16], help="latents in a batch (default: 4 16)")
    parser.add_argument("--operators", nargs="+", choices=sorted(BARS), default=sorted(BARS), help="these alone")
    parser.add_argument("--seconds", type=float, default=3.0, help="measuring time of a line (default: 3)")
    parser.add_argument(
        "--malloc", choices=["keep", "glibc"], default="keep",
        help="keep: freed memory stays in the process (default); glibc: as the C library has it (docs/performance.md)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    cache, records = harness.last_level_cache(), []
    for record in run(arguments):
        records.append(record)
        print(" | ".join(line(record, cache)), file=sys.stderr, flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"compare": records}, indent=1))
    print(table(records, cache))


if __name__ == "__main__":
    main()
