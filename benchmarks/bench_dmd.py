"""The distribution matching loss, guided as SDXL's recipe is. `pytest benchmarks/bench_dmd.py --benchmark-only`."""

from benchmarks import cases
from benchmarks.grid import grid


@grid()
def test_dmd_loss(measure, dtype, direction, contestant):
    measure(cases.dmd_loss, contestant, direction, dtype=dtype)
