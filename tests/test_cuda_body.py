"""The body of r1_perturb's CUDA kernel (csrc/r1_body.h) on the CPU: every thread of every block, tails included.

Compiled with the undefined-behaviour sanitizer, which reports misaligned accesses too; memory around x, noise and out
is checked for reads (NaN would spread) and writes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import shutil
import subprocess
from pathlib import Path

import numpy as np
import philox_oracle
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED, STEP, STREAM = 2**64 - 3, 2**32 - 1, 10
KEYED = 3
GUARD = 64  # elements on each side of a tensor


@pytest.fixture(scope="module")
def body(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    library = tmp_path_factory.mktemp("cuda_body") / "cuda_body.so"
    flags = (
        "-std=c++20 -O1 -ffp-contract=off -fsanitize=undefined -Wall -Wextra -Werror -Wno-unknown-pragmas -shared -fPIC"
    )
    includes = ["-isystem", str(torch_folder / "include"), "-I", str(ROOT / "csrc")]
    source = str(ROOT / "tests" / "cuda_body.cpp")
    subprocess.run([compiler, *flags.split(), *includes, source, "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    pointers, sizes = [ctypes.c_void_p] * 5, [ctypes.c_int64] * 2
    key = [ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32]
    loaded.r1_perturb.argtypes = [ctypes.c_int, ctypes.c_int, *pointers, *sizes, *key, ctypes.c_int64]
    loaded.r1_perturb.restype = ctypes.c_int64
    return loaded


def guarded(values: torch.Tensor, shift: int) -> torch.Tensor:
    """A view with these values, `shift` elements past a multiple of 16 bytes, NaN on both sides."""
    memory = torch.full((values.numel() + 2 * GUARD + shift,), float("nan"), dtype=values.dtype)
    view = memory[GUARD + shift : GUARD + shift + values.numel()].view(values.shape)
    return view.copy_(values)


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def perturb(body, x, std, noise=None, ids=None, shift=0):
    """r1_perturb's (2N, D), after a check that no byte around it was written."""
    n, size = x.shape
    x = guarded(x, shift)
    noise = None if noise is None else guarded(noise, shift)
    memory = torch.full((2 * n * size + 2 * GUARD + shift,), 77.0, dtype=x.dtype)
    out = memory[GUARD + shift : GUARD + shift + 2 * n * size].view(2 * n, size)
    codes = DTYPES.index(x.dtype), KEYED if noise is None else DTYPES.index(noise.dtype)
    arguments = [pointer(tensor) for tensor in (x, std, noise, ids, out)]
    body.r1_perturb(*codes, *arguments, n, size, SEED, STEP, STREAM, 0)
    assert (memory[: GUARD + shift] == 77).all() and (memory[GUARD + shift + 2 * n * size :] == 77).all()
    return out


def assert_keyed_values(out, x, std, ids, first=0):
    """out (2, D') is x (D',) and x + std n: the stream's tolerance on a CPU, half a spacing, two f32 roundings."""
    values, radius = philox_oracle.normals(ids, x.numel(), SEED, STEP, STREAM, first)
    noise, tolerance = std * torch.from_numpy(values), torch.where(torch.from_numpy(radius) >= 0.1, 4e-6, 3e-5)
    expected = x.double() + noise
    rounding = expected.abs() * torch.finfo(x.dtype).eps / 2 + (expected.abs() + noise.abs()) * 2.0**-23
    assert torch.equal(out[0], x)
    assert ((out[1].double() - expected).abs() <= rounding + std * tolerance).all()


# Around a run (4 or 8 elements), a tile (1024 or 2048) and several tiles; not all leave the next sample aligned.
SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 33, 1023, 1024, 1025, 1028, 2047, 2048, 2049, 2056, 5000, 5001]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [0, 1])
def test_keyed_values(body, dtype, shift, capfd):
    ids = torch.tensor([2**32 - 1, 0, 17])
    std = torch.tensor([0.1, 1.0, 3.0])
    for size in SIZES:
        x = torch.randn(3, size).to(dtype)
        out = perturb(body, x, std, ids=ids, shift=shift)
        for i in range(3):
            assert_keyed_values(out[[i, 3 + i]], x[i], float(std[i]), int(ids[i]))
    assert capfd.readouterr().err == "", "the undefined-behaviour sanitizer"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("noise_dtype", DTYPES)
def test_given_noise_is_exactly_f32_rounded_once(body, dtype, noise_dtype, capfd):
    std = torch.tensor([0.1, 1.0])
    for size in SIZES:
        for shift in (0, 1):
            x, noise = torch.randn(2, size).to(dtype), torch.randn(2, size).to(noise_dtype)
            out = perturb(body, x, std, noise, shift=shift)
            expected = (x.float() + std.unsqueeze(1) * noise.float()).to(dtype)
            assert torch.equal(out, torch.cat([x, expected]))
    assert capfd.readouterr().err == "", "the undefined-behaviour sanitizer"


def test_ids_default_to_positions(body):
    x, std = torch.randn(3, 10), torch.ones(3)
    assert torch.equal(perturb(body, x, std), perturb(body, x, std, ids=torch.arange(3)))


def test_more_than_2_to_31_elements(body):
    """The last tile of three samples of 2^30 + 5: offsets beyond 32 bits. Little of the memory is touched."""
    n, size = 3, 2**30 + 5
    kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        memories = [mmap.mmap(-1, count * n * size * 2, flags=kind) for count in (1, 2)]
    except OSError as error:
        pytest.skip(f"19 GB of address space are not to be had: {error}")
    x, out = (torch.from_numpy(np.frombuffer(memory, dtype=np.uint16)).view(torch.bfloat16) for memory in memories)
    x, out = x.view(n, size), out.view(2 * n, size)
    tail = size % 2048
    x[-1, -tail:] = torch.randn(tail).to(torch.bfloat16)
    std, ids = torch.ones(n), torch.tensor([0, 1, 5])
    last_block = n * -(-size // 2048) - 1
    arguments = [pointer(tensor) for tensor in (x, std, None, ids, out)]
    assert body.r1_perturb(1, KEYED, *arguments, n, size, SEED, STEP, STREAM, last_block) == last_block + 1
    both = torch.stack([out[n - 1, -tail:], out[-1, -tail:]])
    assert_keyed_values(both, x[-1, -tail:], 1.0, 5, first=size - tail)
    assert (out[-1, -tail - 1] == 0).all() and (out[n, :100] == 0).all()
