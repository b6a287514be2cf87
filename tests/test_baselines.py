"""The benchmarks' baselines compute what the operators compute: each against the oracles in float64, in f32.

A contestant that computed something else would make every ratio in docs/performance.md meaningless.
"""

import oracles
import pytest
import torch
from oracles import compare, random_tensor

from benchmarks import baselines

SHAPE = (3, 4, 6, 5)
ABAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0).float()
TIMES, NEXT_TIMES = torch.tensor([21, 400, 979]), torch.tensor([999, 20, 249])
# Exact coefficients of the f32 table that the baselines are given.
ALPHA, SIGMA = ABAR.double()[TIMES].sqrt(), (1 - ABAR.double()[TIMES]).sqrt()
NEXT_ALPHA, NEXT_SIGMA = ABAR.double()[NEXT_TIMES].sqrt(), (1 - ABAR.double()[NEXT_TIMES]).sqrt()
CLEAN = ALPHA.float(), SIGMA.float()
CLEAN_NEXT = NEXT_ALPHA.float(), NEXT_SIGMA.float()
SCHEDULE, T, NEXT_T = baselines.FastGenSchedule(ABAR), TIMES.double(), NEXT_TIMES.double()


def tensors(num: int, shape=SHAPE) -> list[torch.Tensor]:
    return [random_tensor(shape, torch.float32, seed) for seed in range(1, num + 1)]


ADD_NOISE = {
    "dmd2": lambda x0, noise: baselines.dmd2_add_noise(x0, ABAR, TIMES, noise),
    "fastgen": lambda x0, noise: baselines.fastgen_add_noise(x0, SCHEDULE, T, noise),
    "clean": lambda x0, noise: baselines.clean_add_noise(x0, *CLEAN, noise),
}
PREDICT_X0 = {
    "dmd2": lambda x_t, p: baselines.dmd2_predict_x0(x_t, p, ABAR, TIMES),
    "fastgen": lambda x_t, p: SCHEDULE.eps_to_x0(x_t, p, T),
    "clean": lambda x_t, p: baselines.clean_predict_x0(x_t, p, *CLEAN),
}
RENOISE = {
    "dmd2": lambda x_t, p, noise: baselines.dmd2_renoise(x_t, p, ABAR, TIMES, NEXT_TIMES, noise),
    "fastgen": lambda x_t, p, noise: baselines.fastgen_renoise(x_t, p, SCHEDULE, T, NEXT_T, noise),
    "clean": lambda x_t, p, noise: baselines.clean_renoise(x_t, p, *CLEAN, *CLEAN_NEXT, noise),
}
DMD = {
    "dmd2": (lambda *inputs: baselines.dmd2_dmd_loss(*inputs, ABAR, TIMES), 0.0),
    "fastgen": (lambda *inputs: baselines.fastgen_dmd_loss(*inputs, SCHEDULE, T), 1e-6),
    "clean": (lambda *inputs: baselines.clean_dmd_loss(*inputs, *CLEAN), 1e-6),
}
DENOISING = {
    "dmd2": baselines.dmd2_denoising_loss,
    "fastgen": baselines.fastgen_denoising_loss,
    "clean": baselines.clean_denoising_loss,
}


@pytest.mark.parametrize("baseline", ADD_NOISE)
def test_add_noise(baseline):
    x0, noise = tensors(2)
    compare(ADD_NOISE[baseline], lambda x0, noise: oracles.add_noise(x0, noise, ALPHA, SIGMA), [x0], [noise])


@pytest.mark.parametrize("baseline", PREDICT_X0)
def test_predict_x0(baseline):
    compare(PREDICT_X0[baseline], lambda x_t, p: oracles.predict_x0(x_t, p, ALPHA, SIGMA, "epsilon"), tensors(2))


@pytest.mark.parametrize("baseline", RENOISE)
def test_renoise(baseline):
    def exact(x_t, p, noise):
        x0 = oracles.predict_x0(x_t, p, ALPHA, SIGMA, "epsilon")
        return oracles.add_noise(x0, noise, NEXT_ALPHA, NEXT_SIGMA)

    x_t, p, noise = tensors(3)
    compare(RENOISE[baseline], exact, [x_t, p], [noise])


@pytest.mark.parametrize("is_guided", [True, False])
@pytest.mark.parametrize("baseline", DMD)
def test_dmd_loss(baseline, is_guided):
    function, eps = DMD[baseline]
    x, *fixed = tensors(5 if is_guided else 4)

    def ours(x, x_t, fake, teacher, uncond=None):
        return function(x, x_t, fake, teacher, uncond, 8.0 if is_guided else 1.0)

    def exact(x, x_t, fake, teacher, uncond=None):
        guidance = 8.0 if is_guided else 1.0
        return oracles.dmd_loss(x, x_t, fake, teacher, uncond, None, ALPHA, SIGMA, "epsilon", guidance, eps)

    compare(ours, exact, [x], fixed)


@pytest.mark.parametrize("baseline", DENOISING)
def test_denoising_loss(baseline):
    prediction, noise = tensors(2)

    def exact(prediction, noise):
        return oracles.denoising_loss(prediction, noise, noise, None, ALPHA, SIGMA, "epsilon")

    compare(DENOISING[baseline], exact, [prediction], [noise])


def test_gan_losses():
    real, fake = tensors(2, (7, 2))
    compare(baselines.eager_gan_generator_loss, oracles.gan_generator_loss, [fake])
    compare(baselines.eager_gan_discriminator_loss, oracles.gan_discriminator_loss, [real, fake])


@pytest.mark.parametrize("function", [baselines.eager_gan_head_loss, baselines.clean_gan_head_loss])
def test_gan_head_loss(function):
    features, weight, bias, proj_weight = tensors(1, (5, 24)) + tensors(2, (24,)) + tensors(1, (1, 24))
    inputs = [features, weight, bias, proj_weight, torch.tensor([0.3])]
    compare(lambda *inputs: function(*inputs, 4), lambda *inputs: oracles.gan_head_loss(*inputs, 4, 1)[0], inputs)


@pytest.mark.parametrize("function", [baselines.eager_r1_perturb, baselines.clean_r1_perturb])
def test_r1_perturb(function):
    x_t, noise = tensors(2)
    std = torch.full((3,), 0.25, dtype=torch.float64)
    compare(lambda x, n: function(x, 0.25, n), lambda x, n: oracles.r1_perturb(x, n, std), [x_t], [noise])


def test_r1_penalty():
    std = torch.full((6,), 0.25, dtype=torch.float64)
    compare(
        lambda a, b: baselines.eager_r1_penalty(a, b, 0.25),
        lambda a, b: oracles.r1_penalty(a, b, std),
        tensors(2, (6, 1)),
    )


@pytest.mark.parametrize("function", [baselines.eager_group_norm_silu, baselines.clean_group_norm_silu])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_group_norm_silu(function, layout):
    inputs = [random_tensor((2, 12, 5, 4), torch.float32, 1, layout), *tensors(2, (12,))]
    compare(lambda *inputs: function(*inputs, 3), lambda *inputs: oracles.group_norm_silu(*inputs, 3), inputs)


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: baselines.dmd2_add_noise(x, ABAR, TIMES[:1]),
        lambda x: baselines.fastgen_add_noise(x, SCHEDULE, T[:1]),
        lambda x: baselines.clean_add_noise(x, CLEAN[0][:1], CLEAN[1][:1]),
    ],
    ids=["dmd2", "fastgen", "clean"],
)
def test_noise_is_drawn_where_none_is_given(draw):
    """Of x0 = 0, x_t is sigma times standard normals: their moments, within five standard errors."""
    count = 40_000
    values = draw(torch.zeros(1, count)).double() / SIGMA[0]
    assert abs(values.mean()) < 5 / count**0.5
    assert abs(values.var() - 1) < 5 * (2 / count) ** 0.5
