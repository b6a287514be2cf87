"""The noise kernels' compiled code for sm_80 and sm_90 against float64 and numpy's Philox."""

from __future__ import annotations

import numpy as np
import oracles
import philox_oracle
import pytest
import torch
from oracles import DTYPES, PREDICTION_TYPES, assert_rounded, coefficients, column, compare, random_tensor
from simulated import ARCHITECTURES, assert_clean, assert_memory_bound, simulated

from dmd2_fast import NoiseKey, add_noise, philox_normal, philox_uniform, predict_x0, renoise
from dmd2_fast.kernels import noise as kernels
from dmd2_fast.kernels._launch import BLOCK

KEY = NoiseKey(2**64 - 3, 2**32 - 1, 2**31 + 5)  # every word of the counter and of the key has its top bit set
F32 = 2.0**-23
SHAPES = [(1, 1), (3, 5, 7), (2, 4, 8, 8), (2, 1501)]


def keyed(ids, shape, first=0):
    """Noise of KEY and the error allowed it, f64."""
    return philox_oracle.noise(ids.tolist(), shape, (KEY.seed, KEY.step, KEY.stream), 7e-4, first)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_noise_with_a_key(arch, dtype):
    for shape in SHAPES:
        x0 = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        alpha, sigma = coefficients(shape[0])
        ids = torch.tensor([2**32 - 1, 0, 17][: shape[0]])
        noise, tolerance = keyed(ids, shape[1:])
        with simulated(arch, race="report") as device:
            x_t = add_noise(x0, alpha, sigma, key=KEY, sample_ids=ids)
            again, returned = add_noise(x0, alpha, sigma, key=KEY, sample_ids=ids, return_noise=True)
        assert_clean(device, 2)
        exact = oracles.add_noise(x0.double(), noise, alpha, sigma)
        assert_rounded(x_t, exact, column(sigma, exact) * tolerance + 4 * F32 * (x0.double().abs() + noise.abs()))
        assert torch.equal(again, x_t)
        assert_rounded(returned, noise, tolerance)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_tolerance_has_room_for_the_hardware(arch):
    """The fast functions perturbed at random within their documented bounds: the stream's tolerance still holds."""
    ids = torch.arange(4)
    exact, tolerance = keyed(ids, (6000,))
    with simulated(arch, mufu="noisy"):
        ours = philox_normal(ids, (6000,), KEY)
    assert_rounded(ours, exact, tolerance)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_draws_of_every_dtype_and_size(arch):
    ids = torch.tensor([2**32 - 1, 5, 0, 9])[::2]
    for size in (1, 3, 129, 1501):
        exact, tolerance = keyed(ids, (size,))
        with simulated(arch, race="report") as device:
            for dtype in DTYPES:
                assert_rounded(philox_normal(ids, (size,), KEY, dtype), exact, tolerance)
            uniforms = philox_uniform(ids, (size,), KEY)
        assert_clean(device, 4)
        words = np.stack([philox_oracle.words(int(i), size, KEY.seed, KEY.step, KEY.stream) for i in ids])
        expected = (words.astype(np.float32).astype(np.float64) * 2.0**-32 + 2.0**-33).astype(np.float32)
        assert np.array_equal(uniforms.numpy(), expected)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_given_noise_and_gradient(arch, dtype, layout):
    shape = (3, 5, 7, 3)
    alpha, sigma = coefficients(3)
    x0, noise = random_tensor(shape, dtype, 1, layout), random_tensor(shape, dtype, 2, layout)
    with simulated(arch, race="report") as device:
        compare(
            lambda x0, noise: add_noise(x0, alpha, sigma, noise),
            lambda x0, noise: oracles.add_noise(x0, noise, alpha, sigma),
            [x0],
            [noise],
        )
    assert_clean(device, 2)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_predictions(arch, prediction_type):
    shape = (2, 5, 7, 3)
    coefficient = (*coefficients(2), *coefficients(2, seed=1))
    x_t, p, noise = (random_tensor(shape, torch.bfloat16, i) for i in range(3))
    with simulated(arch, race="report") as device:
        compare(
            lambda x_t, p: predict_x0(x_t, p, *coefficient[:2], prediction_type=prediction_type),
            lambda x_t, p: oracles.predict_x0(x_t, p, *coefficient[:2], prediction_type),
            [x_t.float(), p.float()],
        )
        compare(
            lambda x_t, p, noise: renoise(x_t, p, *coefficient, noise, prediction_type=prediction_type),
            lambda x_t, p, noise: oracles.add_noise(
                oracles.predict_x0(x_t, p, *coefficient[:2], prediction_type), noise, *coefficient[2:]
            ),
            [x_t, p],
            [noise],
        )
    assert_clean(device, 4)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_renoise_with_a_key_and_with_neither(arch):
    shape, ids = (2, 5, 7, 3), torch.tensor([3, 2**31])
    coefficient = (*coefficients(2), *coefficients(2, seed=1))
    x_t, p = (random_tensor(shape, torch.float16, i) for i in range(2))
    noise, tolerance = keyed(ids, shape[1:])
    # The public function would refuse it on the CPU, where looking costs nothing.
    silent = torch.tensor([0.0, 0.5])
    with simulated(arch, race="report") as device:
        ours = renoise(x_t, p, *coefficient, prediction_type="flow", key=KEY, sample_ids=ids)
        last = kernels.renoise(x_t, p, *coefficient[:3], silent, None, 3, 0, 0, 0, None)
    assert_clean(device, 2)
    x0 = oracles.predict_x0(x_t.double(), p.double(), *coefficient[:2], "flow")
    terms = (x_t.double().abs() + p.double().abs()) / column(sum(coefficient[:2]), x0) + noise.abs()
    exact = oracles.add_noise(x0, noise, *coefficient[2:])
    assert_rounded(ours, exact, column(coefficient[3], x0) * tolerance + 8 * F32 * terms)
    assert_rounded(last[:1], (column(coefficient[2], x0) * x0)[:1], 8 * F32 * terms[:1])
    assert last[1].isnan().all()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_mixed_dtypes(arch):
    alpha, sigma = coefficients(2)
    x0, noise = random_tensor((2, 3, 8, 8), torch.bfloat16, 0), random_tensor((2, 3, 8, 8), torch.float32, 1)
    with simulated(arch, race="report") as device:
        narrow = add_noise(x0, alpha, sigma, noise)
        wide = add_noise(noise, alpha, sigma, x0)
    assert_clean(device, 2)
    assert_rounded(narrow, oracles.add_noise(x0.double(), noise.double(), alpha, sigma), 1e-5)
    assert_rounded(wide, oracles.add_noise(noise.double(), x0.double(), alpha, sigma), 1e-5)


def test_a_new_key_or_shape_compiles_nothing():
    """Seed, step and sizes are not specialised on: one compilation serves all, values 0, 1 and 16 included."""
    with simulated(80) as device:
        for seed, step, size in ((5, 3, 64), (0, 0, 16), (1, 1, 80), (16, 16, 48), (2**64 - 1, 2**32 - 1, 128)):
            key = NoiseKey(seed, step, 4)
            add_noise(torch.ones(2, size), torch.ones(2), torch.ones(2), key=key, sample_ids=torch.arange(2))
    assert len({launch.ptx for launch in device.launches}) == 1


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_shapes_are_limited_by_memory(arch, dtype):
    """x0 read once and x_t written once, in 128-bit accesses, with nothing through shared memory."""
    x0 = torch.zeros(264, 4, 64, 64, dtype=dtype)
    with simulated(arch, ctas=24) as device:
        add_noise(x0, torch.ones(264), torch.ones(264), key=KEY, sample_ids=torch.arange(264))
    assert_memory_bound(device, arch, 2 * x0.numel() * x0.element_size())
    assert device.launches[0].result.shared_requests == 0


def test_offsets_are_64_bit():
    """More than 2^31 elements: the first and last tile, and those around the 2^31st."""
    block = BLOCK[2]
    size = 2**30 + block
    tiles = size // block
    x0 = torch.from_numpy(np.zeros((3, size), np.float16))
    ids = torch.tensor([7, 8, 9])
    programs = [0, 2**31 // block - 1, 2**31 // block, 3 * tiles - 1]
    with simulated(90, ctas=programs) as device:
        x_t = add_noise(x0, torch.ones(3), torch.ones(3), key=KEY, sample_ids=ids)
    assert len(device.launches) == 1
    for program in programs:
        sample, start = program // tiles, program % tiles * block
        exact, tolerance = keyed(ids[sample : sample + 1], (block,), start)
        assert_rounded(x_t[sample : sample + 1, start : start + block], exact, tolerance)
    assert not x_t[1, :block].any()  # a wrapped offset would have written to an earlier place
