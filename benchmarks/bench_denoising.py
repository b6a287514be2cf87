"""The denoising loss with stored noise. `pytest benchmarks/bench_denoising.py --benchmark-only`."""

from benchmarks import cases
from benchmarks.grid import grid


@grid()
def test_denoising_loss(measure, dtype, direction, contestant):
    measure(cases.denoising_loss, contestant, direction, dtype=dtype)
