"""denoising_loss's compiled code for sm_80 and sm_90 against float64 and numpy's Philox."""

from __future__ import annotations

import oracles
import philox_oracle
import pytest
import torch
from oracles import DTYPES, PREDICTION_TYPES, assert_rounded, coefficients, compare, random_tensor
from simulated import ARCHITECTURES, assert_clean, assert_memory_bound, simulated

from dmd2_fast import NoiseKey, denoising_loss
from dmd2_fast.kernels import denoising as kernels

KEY = NoiseKey(2**64 - 3, 2**32 - 1, 5)
SHAPES = [(1, 1), (3, 5, 7, 3), (2, 1501), (5, 8, 256)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradient_with_a_key(arch, dtype):
    for shape in SHAPES:
        alpha, sigma = coefficients(shape[0])
        weight = torch.linspace(0.5, 2.0, shape[0])
        ids = torch.tensor([2**32 - 1, 0, 17, 4, 5][: shape[0]])
        noise, tolerance = philox_oracle.noise(ids.tolist(), shape[1:], (KEY.seed, KEY.step, KEY.stream), 7e-4)
        p, x0 = (random_tensor(shape, dtype, seed) for seed in range(2))
        p.requires_grad_()
        settings = {"prediction_type": "v_prediction", "sample_weight": weight, "key": KEY, "sample_ids": ids}
        with simulated(arch, race="report") as device:
            loss = denoising_loss(p, x0, alpha, sigma, **settings)
            (grad,) = torch.autograd.grad(loss, p, torch.tensor(0.5))
        assert_clean(device, 2)
        wide = p.detach().double().requires_grad_()
        exact = oracles.denoising_loss(wide, x0.double(), noise, weight, alpha, sigma, "v_prediction")
        (exact_grad,) = torch.autograd.grad(exact, wide, torch.tensor(0.5).double())
        exact = exact.detach()
        assert_rounded(loss.detach(), exact, 1e-5 * exact)
        assert_rounded(grad, exact_grad, (3 * tolerance + 3e-6) / p.numel())


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_given_noise(arch, prediction_type):
    alpha, sigma = coefficients(3)
    for dtype, layout in ((torch.float32, "channels_last"), (torch.bfloat16, "contiguous")):
        p, x0, noise = (random_tensor((3, 5, 7, 3), dtype, seed, layout) for seed in range(3))
        with simulated(arch, race="report") as device:
            compare(
                lambda p, x0, noise: denoising_loss(p, x0, alpha, sigma, noise, prediction_type=prediction_type),
                lambda p, x0, noise: oracles.denoising_loss(p, x0, noise, None, alpha, sigma, prediction_type),
                [p],
                [x0, noise],
            )
        assert_clean(device, 2)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_same_bits_whoever_comes_last(arch, monkeypatch):
    """Programs run together and one by one, and a smaller launch between: the counter is back at 0 each time."""
    monkeypatch.setattr(kernels, "FOLD", 32)  # fewer than there are programs
    one, ids = torch.ones(40), torch.arange(40)
    p, x0 = (random_tensor((40, 700), torch.float32, seed) for seed in range(2))
    losses = []
    for together in (1, 7, 100):
        with simulated(arch, batch_ctas=together) as device:
            for n in (40, 3, 40):
                settings = {"prediction_type": "flow", "key": KEY, "sample_ids": ids[:n]}
                losses.append(denoising_loss(p[:n], x0[:n], one[:n], one[:n], **settings))
        assert len(device.launches) == 3
    assert losses[0] == losses[2] == losses[3] == losses[5] == losses[6] == losses[8]
    assert losses[1] == losses[4] == losses[7]
    noise, _ = philox_oracle.noise(ids.tolist(), p.shape[1:], (KEY.seed, KEY.step, KEY.stream), 7e-4)
    exact = oracles.denoising_loss(p.double(), x0.double(), noise, None, one, one, "flow")
    assert_rounded(losses[0], exact, 1e-5 * exact)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_shapes_are_limited_by_memory(arch, dtype):
    """Forward reads prediction and x0 and writes the f32 residual, which backward reads: no noise in memory."""
    p, x0 = (torch.zeros(264, 4, 64, 64, dtype=dtype) for _ in range(2))
    one, ids = torch.ones(264), torch.arange(264)
    p.requires_grad_()
    with simulated(arch, ctas=16) as device:
        loss = denoising_loss(p, x0, one, one, prediction_type="v_prediction", key=KEY, sample_ids=ids)
        torch.autograd.grad(loss, p, torch.ones(()))
    assert len(device.launches) == 2
    assert_memory_bound(device, arch, p.numel() * (3 * dtype.itemsize + 8))
