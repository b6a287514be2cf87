"""Noise, its injection and its inverse. `pytest benchmarks/bench_noise.py --benchmark-only`."""

from benchmarks import cases
from benchmarks.grid import F32, grid


@grid(directions=("forward",))
def test_philox_normal(measure, dtype, direction, contestant):
    measure(cases.philox_normal, contestant, direction, dtype=dtype)


@grid(dtypes=(F32,), directions=("forward",))
def test_philox_uniform(measure, dtype, direction, contestant):
    measure(cases.philox_uniform, contestant, direction, dtype=dtype)


@grid()
def test_add_noise(measure, dtype, direction, contestant):
    measure(cases.add_noise, contestant, direction, dtype=dtype)


@grid()
def test_predict_x0(measure, dtype, direction, contestant):
    measure(cases.predict_x0, contestant, direction, dtype=dtype)


@grid()
def test_renoise(measure, dtype, direction, contestant):
    measure(cases.renoise, contestant, direction, dtype=dtype)
