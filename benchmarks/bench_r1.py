"""The approximate R1 penalty: perturbation and penalty. `pytest benchmarks/bench_r1.py --benchmark-only`."""

from benchmarks import cases
from benchmarks.grid import F32, grid


@grid()
def test_r1_perturb(measure, dtype, direction, contestant):
    measure(cases.r1_perturb, contestant, direction, dtype=dtype)


@grid(dtypes=(F32,))
def test_r1_penalty(measure, dtype, direction, contestant):
    measure(cases.r1_penalty, contestant, direction, dtype=dtype)
