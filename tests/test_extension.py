"""The fast r1_perturb on this machine: the C++ extension, and the Triton kernel in Triton's interpreter.

Values against tests/philox_oracle.py, which is written from the definition of the stream in unbounded integers and f64.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import philox_oracle
import pytest
import torch

import dmd2_fast
from dmd2_fast.dispatch import EXTENSION

SEED, STEP, STREAM = 2**64 - 3, 2**32 - 1, 10
HALF_SPACING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

needs_extension = pytest.mark.skipif(not EXTENSION.is_file(), reason="the C++ operators are not built")


@pytest.fixture(scope="module")
def cpp():
    torch.ops.load_library(str(EXTENSION))
    return torch.ops.dmd2_fast_cpp


def signed(seed: int) -> int:
    return seed - 2**64 if seed >= 2**63 else seed


@needs_extension
def test_philox_words_known_answers(cpp):
    """The known answers that the authors of Philox publish for philox4x32-10."""
    zeros = cpp.philox_words(torch.tensor([0]), 4, 0, 0, 0)
    assert zeros.tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]


@needs_extension
def test_philox_words(cpp):
    ids = [2**32 - 1, 0, 12345]
    words = cpp.philox_words(torch.tensor(ids), 11, signed(SEED), STEP, STREAM)
    expected = [philox_oracle.words(i, 11, SEED, STEP, STREAM).tolist() for i in ids]
    assert words.tolist() == expected


@needs_extension
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1), (2,), (3, 5, 7), (2, 4, 33, 35), (0, 3)])
@pytest.mark.parametrize("dtype", HALF_SPACING)
def test_cpp_values(cpp, dtype, shape, threads):
    n, size = shape[0], int(torch.Size(shape[1:]).numel())
    x = torch.randn(shape).to(dtype)
    std = torch.rand(n) + 0.1
    ids = torch.tensor([7, 2**32 - 1, 0][:n], dtype=torch.int64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = cpp.r1_perturb(x, std, None, signed(SEED), STEP, STREAM, ids)
    finally:
        torch.set_num_threads(before)
    assert out.shape == (2 * n, *shape[1:]) and out.dtype == dtype
    assert torch.equal(out[:n], x)
    for i in range(n):
        values, radius = philox_oracle.normals(int(ids[i]), size, SEED, STEP, STREAM)
        expected = x[i].double().flatten() + float(std[i]) * torch.from_numpy(values)
        allowed = expected.abs() * HALF_SPACING[dtype] + float(std[i]) * torch.where(
            torch.from_numpy(radius) >= 0.1, 4e-6, 3e-5
        )
        assert ((out[n + i].double().flatten() - expected).abs() <= allowed + 2.0**-23).all()


@needs_extension
@pytest.mark.parametrize("noise_dtype", HALF_SPACING)
@pytest.mark.parametrize("dtype", HALF_SPACING)
def test_cpp_with_noise_is_f32_rounded_once(cpp, dtype, noise_dtype):
    """At most one f32 rounding of the products away from float64, and then the one of the store."""
    x = torch.randn(5, 3, 9, 11).to(dtype).to(memory_format=torch.channels_last)
    noise = torch.randn(5, 9, 3, 11).to(noise_dtype).transpose(1, 2)
    std = torch.rand(10)[::2]
    out = cpp.r1_perturb(x, std, noise, 0, 0, 0, None)
    product = std.double().reshape(-1, 1, 1, 1) * noise.double()
    expected = x.double() + product
    allowed = expected.abs() * HALF_SPACING[dtype] + (expected.abs() + product.abs()) * 2.0**-23
    assert torch.equal(out[:5], x)
    assert ((out[5:].double() - expected).abs() <= allowed + 2.0**-25).all()


@needs_extension
def test_cpp_passes_non_finite_values_on(cpp):
    x = torch.tensor([[float("nan"), float("inf"), 1.0]])
    out = cpp.r1_perturb(x, torch.ones(1), torch.zeros(1, 3), 0, 0, 0, None)
    assert torch.isnan(out[:, 0]).all() and torch.isinf(out[:, 1]).all() and (out[:, 2] == 1).all()


X, STD, IDS = torch.zeros(2, 3), torch.ones(2), torch.arange(2)
BAD = [
    ((X.double(), STD, None, 0, 0, 0, IDS), "x_t has an unsupported dtype"),
    ((torch.tensor(1.0), STD, None, 0, 0, 0, IDS), "x_t has no batch dimension"),
    ((X, STD.double(), None, 0, 0, 0, IDS), "std has another dtype"),
    ((X, torch.ones(3), None, 0, 0, 0, IDS), r"std has shape \(3\): expected \(2,\)"),
    ((X, STD, torch.zeros(2, 4), 0, 0, 0, None), r"noise has shape \(2, 4\): expected \(2, 3\)"),
    ((X, STD, X, 0, 0, 0, IDS), "noise and sample_ids: expected one of the two"),
    ((X, STD, None, 0, 0, 0, None), "noise and sample_ids: expected one of the two"),
    ((X, STD, None, 0, -1, 0, IDS), "step is -1"),
    ((X, STD, None, 0, 0, 2**32, IDS), "stream is 4294967296"),
    ((X, STD, None, 0, 0, 0, torch.arange(3)), r"sample_ids has shape \(3\)"),
    ((X, STD, None, 0, 0, 0, torch.tensor([0, -1])), r"sample_ids\[1\] is -1"),
    ((X, STD, None, 0, 0, 0, IDS.int()), "sample_ids has another dtype"),
]


@needs_extension
@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_cpp_refuses(cpp, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        cpp.r1_perturb(*arguments)


INTERPRETED = """
import sys, torch, philox_oracle
import dmd2_fast
cases = (((3, 5, 7), torch.float32, 2.0**-24), ((2, 1501), torch.float16, 2.0**-11), ((1, 1), torch.float32, 2.0**-24))
for shape, dtype, spacing in cases:
    n = shape[0]
    x, std = torch.randn(shape).to(dtype), torch.rand(n) + 0.1
    ids = torch.tensor([2**32 - 1, 0, 5][:n])
    with dmd2_fast.use_backend("triton"):
        out = dmd2_fast.r1_perturb(x, std, key=dmd2_fast.NoiseKey(2**64 - 3, 2**32 - 1, 10), sample_ids=ids)
    assert torch.equal(out[:n], x)
    for i in range(n):
        values, radius = philox_oracle.normals(int(ids[i]), x[i].numel(), 2**64 - 3, 2**32 - 1, 10)
        expected = x[i].double().flatten() + float(std[i]) * torch.from_numpy(values)
        allowed = 2**-23 + expected.abs() * spacing + float(std[i]) * 4e-6
        assert ((out[n + i].double().flatten() - expected).abs() <= allowed).all()
print("triton" in dmd2_fast.dispatch._choose("r1_perturb", "cpu", "triton")[0])
"""


def test_triton_in_the_interpreter():
    """The public operator through the real launcher; in a process of its own, as Triton reads the switch at import."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    folder = os.path.dirname(philox_oracle.__file__)
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": folder}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=env, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"


@needs_extension
def test_the_public_operator_runs_on_cpp():
    """The public r1_perturb on the cpp backend equals the extension's own answer bit for bit."""
    torch.ops.load_library(str(EXTENSION))
    x, ids = torch.randn(4, 3, 5), torch.tensor([3, 1, 2**32 - 1, 0])
    key = dmd2_fast.NoiseKey(SEED, STEP, STREAM)
    with dmd2_fast.use_backend("cpp"):
        out = dmd2_fast.r1_perturb(x, 0.3, key=key, sample_ids=ids)
    std = torch.full((4,), 0.3)
    assert torch.equal(out, torch.ops.dmd2_fast_cpp.r1_perturb(x, std, None, signed(SEED), STEP, STREAM, ids))
