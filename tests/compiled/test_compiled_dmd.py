"""dmd_loss's compiled code for sm_80 and sm_90 against float64."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import oracles
import pytest
import torch
from oracles import DTYPES, PREDICTION_TYPES, assert_rounded, coefficients, compare, random_tensor
from simulated import ARCHITECTURES, assert_clean, assert_memory_bound, simulated

from dmd2_fast import dmd_loss
from dmd2_fast.kernels import _fold
from dmd2_fast.kernels import dmd as kernels

SHAPES = [(1, 1), (3, 5, 7, 3), (2, 1501), (5, 8, 256)]


def make(shape, dtype, layout="contiguous"):
    """x, x_t, fake, teacher, unconditional teacher; the two networks nearly agree, as in training."""
    x, x_t, fake, other, uncond = (random_tensor(shape, dtype, seed, layout) for seed in range(5))
    return x, x_t, fake, (fake + 0.1 * other).to(dtype), (fake - 0.2 * uncond).to(dtype)


def check(tensors, prediction_type):
    """Value and gradient with everything there is: guidance and sample weights."""
    x, *fixed = tensors
    n = x.shape[0]
    alpha, sigma = coefficients(n)
    weight = torch.linspace(0.5, 2.0, n)
    settings = {"alpha": alpha, "sigma": sigma, "prediction_type": prediction_type, "guidance_scale": 3.5}
    compare(
        lambda x, *others: dmd_loss(x, *others, sample_weight=weight, **settings),
        lambda x, *others: oracles.dmd_loss(x, *others, weight, alpha, sigma, prediction_type, 3.5, 1e-6),
        [x],
        fixed,
        grad_roundings=2,
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradient(arch, dtype):
    with simulated(arch, race="report") as device:
        for shape in SHAPES:
            check(make(shape, dtype), "v_prediction")
    assert_clean(device, 2 * len(SHAPES))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_prediction_types_without_guidance(arch, prediction_type):
    x, *fixed, _ = make((3, 5, 7, 3), torch.bfloat16)
    alpha, sigma = coefficients(3)
    settings = {"alpha": alpha, "sigma": sigma, "prediction_type": prediction_type}
    with simulated(arch, race="report") as device:
        compare(
            lambda x, *others: dmd_loss(x, *others, **settings),
            lambda x, *others: oracles.dmd_loss(x, *others, None, None, alpha, sigma, prediction_type, 1.0, 1e-6),
            [x],
            fixed,
            grad_roundings=2,
        )
    assert_clean(device, 2)


@pytest.mark.parametrize("layout", ["channels_last", "batch_last"])
def test_layouts(layout):
    with simulated(80, race="report") as device:
        check(make((3, 5, 7, 3), torch.bfloat16, layout), "flow")
    assert_clean(device, 2)


def test_mixed_dtypes():
    x, x_t, fake, teacher, uncond = make((2, 3, 8, 8), torch.bfloat16)
    alpha, sigma = coefficients(2)
    settings = {"alpha": alpha, "sigma": sigma, "prediction_type": "epsilon", "guidance_scale": 2.0}
    tensors = (x.float(), x_t.half(), fake, teacher.float(), uncond)
    with simulated(90, race="report") as device:
        loss = dmd_loss(*tensors, **settings)
    assert_clean(device, 1)
    exact = oracles.dmd_loss(*(t.double() for t in tensors), None, alpha, sigma, "epsilon", 2.0, 1e-6)
    assert_rounded(loss, exact, 2e-6 * exact)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_more_samples_and_tiles_than_are_folded_at_a_time(arch, monkeypatch):
    monkeypatch.setattr(kernels, "FOLD", 16)
    for shape in ((3, 20000), (40, 1600), (150, 3)):
        with simulated(arch, race="report") as device:
            check(make(shape, torch.float32), "flow")
        assert_clean(device, 2)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_same_bits_whoever_comes_last(arch):
    """Programs run together and one by one, and launches of other sizes between: the counter is back at 0 each time."""
    alpha, sigma = coefficients(40)
    tensors = make((40, 1, 40, 40), torch.float32)
    settings = {"alpha": alpha, "sigma": sigma, "prediction_type": "flow", "guidance_scale": 2.0}
    losses = []
    for together in (1, 7, 100):
        with simulated(arch, batch_ctas=together) as device:
            for num_samples in (40, 3, 40):
                first = [t[:num_samples] for t in tensors]
                part = settings | {"alpha": alpha[:num_samples], "sigma": sigma[:num_samples]}
                losses.append(dmd_loss(*first, **part))
        assert len(device.launches) == 3
    assert losses[0] == losses[2] == losses[3] == losses[5] == losses[6] == losses[8]
    assert losses[1] == losses[4] == losses[7]
    exact = oracles.dmd_loss(*(t.double() for t in tensors), None, alpha, sigma, "flow", 2.0, 1e-6)
    assert_rounded(losses[0], exact, 2e-6 * exact)


def test_counters_belong_to_a_stream_or_to_one_captured_launch():
    """Launches that may run at the same time have different ones; those of a stream share one."""
    x = torch.zeros(1)
    kept = []
    with simulated(90):
        for handle in (1, 2, 1):
            stream = SimpleNamespace(cuda_stream=handle, wait_stream=lambda other: None)
            with mock.patch.object(torch.cuda, "current_stream", lambda *_, stream=stream: stream):
                kept.append(_fold.workspace(x, 5)[0])
        with mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True):
            captured = [_fold.workspace(x, 5)[0] for _ in range(2)]
    assert kept[0] is kept[2]
    assert len({t.data_ptr() for t in (*kept, *captured)}) == 4
    assert all(t.item() == 0 for t in (*kept, *captured))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_shapes_are_limited_by_memory(arch, dtype):
    """Forward reads five tensors and writes one, backward reads that and writes one: eight, in two launches."""
    tensors = [torch.zeros(264, 4, 64, 64, dtype=dtype) for _ in range(5)]
    one = torch.ones(264)
    tensors[0].requires_grad_()
    with simulated(arch, ctas=16) as device:
        loss = dmd_loss(*tensors, alpha=one, sigma=one, prediction_type="flow", guidance_scale=2.0)
        torch.autograd.grad(loss, tensors[0], torch.ones(()))
    assert len(device.launches) == 2
    assert_memory_bound(device, arch, 8 * tensors[0].numel() * dtype.itemsize)
