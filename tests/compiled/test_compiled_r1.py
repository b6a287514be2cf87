"""r1_perturb's compiled code for sm_80 and sm_90: values against numpy's Philox, only its own memory, no races.

The simulator refuses any access outside an argument's bytes, so every launch here is a bounds check as well.
"""

from __future__ import annotations

import philox_oracle
import ptxsim
import pytest
import torch

from dmd2_fast.kernels import r1

SEED, STEP, STREAM = -3, 2**32 - 1, 10  # the seed's high word and the step have their top bits set
SHAPES = [(1, 1), (3, 5, 7), (2, 4, 8, 8), (2, 1501), (1, 4099)]


def run(arch: int, *arguments: object, **options: object) -> tuple[torch.Tensor, ptxsim.Launch]:
    with ptxsim.device(arch=arch, fake_cuda=True, **options) as device:
        out = r1.r1_perturb(*arguments)
    (launch,) = device.launches
    return out, launch


def keyed_noise(sample_ids: list[int], shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise of SEED, STEP, STREAM and its tolerance, (N, *) f64 both: 4e-6 where the radius is >= .1, else 7e-4."""
    size = int(torch.Size(shape[1:]).numel())
    drawn = [philox_oracle.normals(i, size, SEED % 2**64, STEP, STREAM) for i in sample_ids]
    noise = torch.stack([torch.from_numpy(values) for values, _ in drawn])
    radius = torch.stack([torch.from_numpy(radii) for _, radii in drawn])
    return noise.reshape(shape), torch.where(radius >= 0.1, 4e-6, 7e-4).reshape(shape)


def assert_perturbed(out: torch.Tensor, x: torch.Tensor, std: torch.Tensor, noise: torch.Tensor, tolerance) -> None:
    """out is x, then x + std * noise: half a spacing of the dtype, two f32 roundings, the noise's tolerance apart."""
    n = x.shape[0]
    assert torch.equal(out[:n], x)
    scale = std.double().reshape(-1, *[1] * (x.dim() - 1))
    expected = x.double() + scale * noise
    rounding = expected.abs() * torch.finfo(x.dtype).eps / 2 + (expected.abs() + (scale * noise).abs()) * 2.0**-23
    error = (out[n:].double() - expected).abs()
    assert (error <= rounding + scale * tolerance).all(), f"worst {error.max():.2e}"


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_keyed_values(arch, dtype, shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    std = torch.rand(shape[0], generator=generator) + 0.1
    sample_ids = [2**32 - 1, 0, 17][: shape[0]]
    noise, tolerance = keyed_noise(sample_ids, shape)
    ids = torch.tensor(sample_ids)
    out, launch = run(arch, x, std, None, SEED, STEP, STREAM, ids, race="report")
    assert_perturbed(out, x, std, noise, tolerance)
    assert launch.result.races == []
    assert launch.result.warnings == []


@pytest.mark.parametrize("arch", [80, 90])
def test_tolerance_has_room_for_the_hardware(arch):
    """The approximate functions perturbed within their documented bounds: the stream's tolerance still holds."""
    x = torch.zeros(1, 6000)
    noise, tolerance = keyed_noise([0], (1, 6000))
    out, _ = run(arch, x, torch.ones(1), None, SEED, STEP, STREAM, None, mufu="noisy")
    assert_perturbed(out, x, torch.ones(1), noise, tolerance)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_given_noise(arch, dtype):
    x = torch.randn(3, 4, 9, 9).to(dtype)
    noise = torch.randn(3, 4, 9, 9).to(dtype)
    std = torch.tensor([0.1, 1.0, 3.0])
    out, launch = run(arch, x, std, noise, 0, 0, 0, None, race="report")
    assert_perturbed(out, x, std, noise.double(), 0.0)
    assert launch.result.races == []


def test_strided_inputs_and_defaults():
    """channels_last input, every other std, sample ids left out: 0 .. N - 1 in the element order of the shape."""
    x = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last)
    std = torch.tensor([0.5, 9.0, 2.0, 9.0])[::2]
    noise, tolerance = keyed_noise([0, 1], (2, 4, 5, 5))
    out, _ = run(80, x, std, None, SEED, STEP, STREAM, None)
    assert_perturbed(out, x, std, noise, tolerance)


def test_a_new_key_compiles_nothing():
    """Seed and step are not specialised on: one compilation serves all, those with word values 0, 1 and 16 included."""
    x, std = torch.randn(2, 64), torch.ones(2)
    with ptxsim.device(arch=80, fake_cuda=True) as device:
        for seed, step in ((5, 3), (0, 0), (1, 1), (16, 16), (2**63 - 1, 2**32 - 1), (-1, 2**31)):
            r1.r1_perturb(x, std, None, seed, step, 10, None)
    assert len({launch.ptx for launch in device.launches}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_shapes_are_limited_by_memory(dtype):
    """128-bit accesses and no bytes twice: 3 reads and writes an element, and the memory bound above all others."""
    x = torch.randn(4, 4, 64, 64).to(dtype)
    _, launch = run(90, x.repeat(66, 1, 1, 1), torch.ones(264), None, 1, 2, 10, None, ctas=48)
    assert launch.result.roofline(90)["bound"] == "mem"
    assert (launch.result.dram_read + launch.result.dram_write) / (264 * 16384) <= 3 * x.element_size() * 1.05
