"""The adversarial losses and the head's tail, all tiny: what costs is calls. `pytest benchmarks/bench_gan.py ...`."""

from benchmarks import cases
from benchmarks.grid import F32, grid


@grid(dtypes=(F32,))
def test_gan_generator_loss(measure, dtype, direction, contestant):
    measure(cases.gan_generator_loss, contestant, direction, dtype=dtype)


@grid(dtypes=(F32,))
def test_gan_discriminator_loss(measure, dtype, direction, contestant):
    measure(cases.gan_discriminator_loss, contestant, direction, dtype=dtype)


@grid()
def test_gan_head_loss(measure, dtype, direction, contestant):
    measure(cases.gan_head_loss, contestant, direction, size=16, dtype=dtype)
