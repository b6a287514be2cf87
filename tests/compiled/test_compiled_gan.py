"""The adversarial losses' compiled code for sm_80 and sm_90: values against float64, one launch each, no races."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import oracles
import ptxsim
import pytest
import test_gan
import torch
from oracles import DTYPES, compare
from simulated import assert_clean, simulated

from dmd2_fast import gan_discriminator_loss, gan_generator_loss, gan_head_loss


@pytest.fixture(params=[80, 90])
def arch(request):
    return request.param


@contextlib.contextmanager
def launching(arch: int, *kernels: str, **options: object) -> Iterator[ptxsim.SimDevice]:
    """The operators inside run in the simulator; they are to launch these kernels and no others, without a race."""
    with simulated(arch, race="report", **options) as device:
        yield device
    assert sorted(launch.name for launch in device.launches) == sorted(kernels)
    assert_clean(device, len(kernels))


LOSS = ("_mean_softplus_kernel", "_mean_softplus_backward_kernel")
HEAD = ("_head_forward_kernel", "_head_backward_kernel")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shapes", "layout"),
    [(((5, 1), (64,)), "contiguous"), (((1,), (3, 7)), "strided"), (((2500,), (1025,)), "expanded")],
)
def test_losses_of_logits(arch, shapes, layout, dtype):
    """One launch each way, of one program and of several."""
    real, fake = (test_gan.logits_like(shape, dtype, seed, layout) for seed, shape in enumerate(shapes))
    with launching(arch, *LOSS, *LOSS, mufu="noisy"):
        compare(gan_generator_loss, oracles.gan_generator_loss, [fake])
        compare(gan_discriminator_loss, oracles.gan_discriminator_loss, [real, fake])


def test_confident_losses_keep_their_digits(arch):
    """log(1 + exp(-20)) is 2e-9; 1 + exp(-20) in f32 is 1."""
    for value in (-30.0, -20.0, -5.0, -0.5, 0.0, 0.5, 5.0, 20.0, 80.0):
        logits = torch.tensor([value])
        with launching(arch, LOSS[0]):
            loss = gan_generator_loss(logits)
        exact = oracles.gan_generator_loss(logits.double())
        # An exponential is off by 2 units in the last place, and by what rounding |x| log2(e) costs.
        assert abs(loss.double() - exact) <= (5 + abs(value)) * 2**-23 * exact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "sign"), [((5, 64, 32), 1), ((2, 30, 5), -1), ((3, 90, 1), 1), ((70, 6, 2), 1)])
def test_head(arch, shape, sign, dtype):
    inputs = test_gan.draws_of_head_inputs(shape, dtype, 2)
    inputs[0] = torch.stack([torch.full_like(inputs[0], torch.nan), inputs[0]], -1)[..., 1]
    with launching(arch, *HEAD * len(inputs[0]), mufu="noisy"):
        compare(
            test_gan.on_each(lambda *tensors: gan_head_loss(*tensors, shape[2], sign=sign)),
            test_gan.on_each(lambda *tensors: oracles.gan_head_loss(*tensors, shape[2], sign)),
            inputs,
        )


def test_head_of_sdxl(arch):
    """(64, 1280) in one launch each way, which read the features once and write their gradient once; the same bits."""
    inputs = [tensor.requires_grad_() for tensor in test_gan.head_inputs((64, 1280, 32), torch.bfloat16)]
    runs = []
    for _ in range(2):
        with launching(arch, *HEAD) as device:
            loss, logits = gan_head_loss(*inputs, 32, sign=1)
            runs.append([loss, logits, *torch.autograd.grad([loss, logits.sum()], inputs)])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
    size = 64 * 1280 * 2
    forward, backward = (launch.result for launch in device.launches)
    assert forward.dram["features_ptr"] == backward.dram["features_ptr"] == (size, 0)
    assert backward.dram["grad_features_ptr"] == (0, size)
    # Nothing else is of that size: parameters, statistics and one number a sample.
    assert forward.dram_read + forward.dram_write + backward.dram_read + backward.dram_write < 3.4 * size
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact_loss, exact_logits = oracles.gan_head_loss(*exact, 32, 1)
    assert torch.allclose(loss.double(), exact_loss, rtol=1e-6)
    for ours, expected in zip(runs[0][2:], torch.autograd.grad([exact_loss, exact_logits.sum()], exact), strict=True):
        assert (ours.double() - expected).abs().max() <= 2**-8 * expected.abs().max()
