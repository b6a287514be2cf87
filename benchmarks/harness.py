"""Timing, limits and machine, shared by the benchmarks, `benchmarks.compare` and `benchmarks.plot`.

Times of one call are in seconds. On a GPU the clock waits for the device, so that a loop of calls between two readings
counts the work and not the launches alone.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import dmd2_fast

Function = Callable[[], Any]


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def clock() -> float:
    """Seconds, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def quiet_clock(device: str) -> Function:
    """On one CPU thread the process's own time (user and system), which others on the machine do not stop; else clock.

    On one thread that is the time on an idle machine. Of several threads it would be a sum, waiting included.
    """
    return time.process_time if device == "cpu" and torch.get_num_threads() == 1 else clock


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment(device: str) -> dict[str, Any]:
    """What a figure depends on: device, threads and versions."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    name = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton,
        "dmd2_fast": importlib.metadata.version("dmd2-fast"),
    }


def runs_on(operator: str, device: str) -> str:
    """The backend that an operator has now."""
    return dmd2_fast.backends()[operator][device].backend


def last_level_cache() -> int:
    """Bytes of the CPU's last cache level; 32 MiB where the system does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << 10 for size in sizes if size.endswith("K")), default=32 << 20)


def keep_memory() -> None:
    """Have glibc keep freed memory, as it does in a process that has trained for a while.

    Left alone, malloc hands large blocks back to the kernel, up to a threshold that grows with what was freed before:
    a tensor's first touch then costs page faults, or not, by the order of the benchmarks.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt, trim_threshold, mmap_max = ctypes.CDLL(None).mallopt, -1, -4
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


# --- timing -----------------------------------------------------------------------------------------------------------


def loop(function: Function, count: int, now: Function = clock) -> float:
    """Seconds a call, over `count` calls."""
    start = now()
    for _ in range(count):
        function()
    return (now() - start) / count


def count_for(function: Function, seconds: float, now: Function = clock) -> int:
    """How many calls take about that long: by the shorter of two, after a first that may have more to do."""
    function()
    return max(1, math.ceil(seconds / max(min(loop(function, 1, now), loop(function, 1, now)), 1e-9)))


def best(function: Function, seconds: float = 0.05, now: Function = clock) -> float:
    """The shortest of the times a call that fit into `seconds`, at least five."""
    count = count_for(function, seconds / 20, now)
    end, times = clock() + seconds, []
    while len(times) < 5 or clock() < end:
        times.append(loop(function, count, now))
    return min(times)


def interleaved(
    functions: dict[str, Function], *, seconds: float, min_rounds: int = 15, turn: float = 1e-3, now: Function = clock
) -> dict[str, list[float]]:
    """Round after round, each function in turn, for about `seconds`: {name: its time a call in each round}.

    A turn is a loop of about `turn` seconds. Others on the machine, its clock and its caches then disturb all alike,
    and a ratio within a round is of neighbours in time. Each round starts with another function.
    """
    counts = {name: count_for(function, turn, now) for name, function in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    names, end, done = list(functions), clock() + seconds, 0
    while done < min_rounds or clock() < end:
        first = done % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(loop(functions[name], counts[name], now))
        done += 1
    return times


def ratio(times: Sequence[float], ours: Sequence[float]) -> float:
    """The median of the rounds' ratios times / ours."""
    return statistics.median(a / b for a, b in zip(times, ours, strict=True))


# --- limits -----------------------------------------------------------------------------------------------------------


def copying(num_bytes: int, device: str) -> Function:
    """Moves num_bytes: a memory copy that reads half of them and writes the other half, in place."""
    source = torch.zeros(max(num_bytes // 2, 1), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


# --- torch.compile ----------------------------------------------------------------------------------------------------


def compiled(function: Callable[..., Any], aten_random: bool = False) -> Callable[..., Any]:
    """torch.compile with its defaults, or with ATen's random numbers kept instead of Inductor's own."""
    torch._dynamo.config.recompile_limit = 10_000  # beyond its default of 8 it would go on in eager
    torch._functorch.config.donated_buffer = False  # backward is timed on a graph that is kept
    if torch.get_num_threads() != torch._inductor.config.cpp.threads:
        torch._dynamo.reset()  # generated loops have the number of threads written into them
        torch._inductor.config.cpp.threads = torch.get_num_threads()
    options: dict[str, Any] = {"fallback_random": True} if aten_random else {}
    return torch.compile(function, dynamic=False, fullgraph=True, options=options)


# --- tables -----------------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Three figures, in us or ms."""
    value, unit = (seconds * 1e6, "us") if seconds < 1e-3 else (seconds * 1e3, "ms")
    return (
        f"{value:.{max(0, 2 - math.floor(math.log10(max(value, 1e-9))))}f} {unit}"
        if value < 1000
        else f"{value:.0f} {unit}"
    )


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose columns are aligned for a terminal too."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    text.insert(1, "| " + " | ".join("-" * max(width, 3) for width in widths) + " |")
    return "\n".join(text)
