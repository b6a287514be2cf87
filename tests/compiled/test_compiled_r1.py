"""The R1 kernels' compiled code for sm_80 and sm_90 against float64 and numpy's Philox."""

from __future__ import annotations

import oracles
import philox_oracle
import pytest
import torch
from oracles import DTYPES, assert_rounded, compare, random_tensor
from simulated import ARCHITECTURES, assert_clean, assert_memory_bound, simulated

from dmd2_fast import NoiseKey, r1_penalty, r1_perturb

KEY = NoiseKey(2**64 - 3, 2**32 - 1, 10)
F32 = 2.0**-23
SHAPES = [(1, 1), (3, 5, 7), (2, 4, 8, 8), (2, 1501)]


def stds(num_samples):
    return torch.linspace(0.1, 1.1, num_samples)


def assert_perturbed(out, x, std, noise, tolerance):
    """out is x, then x + std * noise: exact but for the noise's tolerance, f32 arithmetic and one rounding."""
    n = x.shape[0]
    assert torch.equal(out[:n], x)
    exact = oracles.r1_perturb(x.double(), noise, std)[n:]
    scale = oracles.column(std, exact)
    assert_rounded(out[n:], exact, scale * (tolerance + 2 * F32 * noise.abs()) + F32 * exact.abs())


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_perturb_with_a_key(arch, dtype):
    for shape in SHAPES:
        x, std = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype), stds(shape[0])
        ids = torch.tensor([2**32 - 1, 0, 17][: shape[0]])
        noise, tolerance = philox_oracle.noise(ids.tolist(), shape[1:], (KEY.seed, KEY.step, KEY.stream), 7e-4)
        with simulated(arch, race="report") as device:
            out = r1_perturb(x, std, key=KEY, sample_ids=ids)
        assert_clean(device, 1)
        assert_perturbed(out, x, std, noise, tolerance)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "batch_last"])
def test_given_noise_and_gradient(arch, dtype, layout):
    std = stds(3)
    x, noise = (random_tensor((3, 4, 9, 9), dtype, seed, layout) for seed in range(2))
    with simulated(arch, race="report") as device:
        compare(
            lambda x, noise: r1_perturb(x, std, noise),
            lambda x, noise: oracles.r1_perturb(x, noise, std),
            [x],
            [noise],
        )
    assert_clean(device, 2)


def test_into_a_buffer():
    """Whose first half is x itself, which is then not written; of strides of its own."""
    x, noise = random_tensor((2, 3, 5, 5), torch.bfloat16, 0), random_tensor((2, 3, 5, 5), torch.float32, 1)
    buffer, strided = torch.empty(4, 3, 5, 5, dtype=x.dtype), torch.empty(4, 3, 5, 10, dtype=x.dtype)[..., ::2]
    buffer[:2] = x
    with simulated(90, race="report") as device:
        assert r1_perturb(buffer[:2], 0.5, noise, out=buffer) is buffer
        r1_perturb(x, 0.5, noise, out=strided)
    assert_clean(device, 2)
    assert device.launches[0].result.store_bytes == buffer[2:].numel() * 2
    assert_perturbed(buffer, x, torch.full((2,), 0.5), noise.double(), 0.0)
    assert torch.equal(strided, buffer)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_penalty(arch, dtype):
    """One sample and many, one logit a sample and several, more than one program; strides of each gradient's own."""
    for shape in ((1, 1), (64, 1), (7, 5), (3, 1501)):
        std = stds(shape[0])
        logits = random_tensor(shape, dtype, 0)
        perturbed = (logits + 0.1 * random_tensor(shape, dtype, 1)).to(dtype).t().contiguous().t()
        with simulated(arch, race="report") as device:
            compare(
                lambda a, b, std=std: r1_penalty(a, b, std),
                lambda a, b, std=std: oracles.r1_penalty(a, b, std),
                [logits, perturbed],
            )
        assert_clean(device, 2)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_shapes_are_limited_by_memory(arch, dtype):
    """x read once and both halves written once, in 128-bit accesses."""
    x = torch.zeros(264, 4, 64, 64, dtype=dtype)
    with simulated(arch, ctas=24) as device:
        r1_perturb(x, torch.ones(264), key=KEY, sample_ids=torch.arange(264))
    assert_memory_bound(device, arch, 3 * x.numel() * x.element_size())
