"""How `pytest benchmarks/ --benchmark-only` measures a case, and the table it prints at the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dmd2_fast
from benchmarks import harness, tables
from benchmarks.cases import DTYPE_NAMES

RECORDS = pytest.StashKey[list[dict[str, Any]]]()
NOTES = pytest.StashKey[list[str]]()
BATCH = {"cpu": 4, "cuda": 64}
FLOORS: dict[Any, float] = {}


def pytest_configure(config):
    harness.keep_memory()
    config.stash[RECORDS], config.stash[NOTES] = [], []
    # pytest-benchmark's own table has a line for each of some 300 measurements: with -v it is printed too.
    config.option.benchmark_quiet = True


def pytest_collection_modifyitems(items):
    now = harness.quiet_clock(harness.default_device())
    for item in items:
        if item.nodeid.startswith("benchmarks/"):
            item.add_marker(pytest.mark.benchmark(timer=now, max_time=0.25, min_rounds=5, warmup=False))


@pytest.fixture
def device() -> str:
    return harness.default_device()


@pytest.fixture
def measure(benchmark, device, request):
    """measure(builder, contestant, direction, size, dtype, **options): time one contestant at one case."""

    def run(build, contestant, direction, size=None, dtype=torch.float32, **options):
        if contestant == "compiled" and benchmark.disabled:
            pytest.skip("compiling takes seconds a case: with --benchmark-only alone")
        case = build(size or BATCH[device], dtype, device, **options)
        with dmd2_fast.use_backend("reference" if contestant == "reference" else "auto"):
            step = case.step(contestant, direction)
            benchmark(step)
            runs_on = harness.runs_on(case.operator, device)
        if benchmark.disabled:
            return
        cache_key = (bool(case.draws) and direction != "backward", case.size, dtype, case.num_bytes(direction))
        if cache_key not in FLOORS:
            FLOORS[cache_key] = harness.best(case.floor(direction), now=harness.quiet_clock(device))
        seconds = benchmark.stats.stats.min
        benchmark.group = f"{case.operator} {case.size} {DTYPE_NAMES[dtype]} {direction}"
        record = {
            "operator": case.operator,
            "size": case.size,
            "dtype": DTYPE_NAMES[dtype],
            "direction": direction,
            "contestant": contestant,
            "backend": runs_on if contestant in ("ours", "reference") else "",
            "GB/s": case.num_bytes(direction) / seconds / 1e9,
            "limit_seconds": FLOORS[cache_key],
            "share_of_limit": FLOORS[cache_key] / seconds,
            **harness.environment(device),
        }
        benchmark.extra_info.update(record)
        request.config.stash[RECORDS].append(record | {"seconds": seconds})

    return run


@pytest.fixture
def note(request):
    """note(text): print it after the table."""
    return request.config.stash[NOTES].append


def pytest_terminal_summary(terminalreporter, config):
    if records := config.stash[RECORDS]:
        terminalreporter.section("operators")
        terminalreporter.write_line(tables.summary(records))
    for text in config.stash[NOTES]:
        terminalreporter.write_line("\n" + text)
