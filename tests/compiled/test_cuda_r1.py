"""csrc/r1.cu through nvcc for sm_80 and sm_90: it compiles, its PTX computes what it should, CMake builds it in.

Runs where nvcc is; no GPU and no CUDA build of torch are needed, as only torch's headers are used.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import philox_oracle
import ptxsim
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # for `pytest` where `python -m pytest` would have it

from benchmarks import roofline, sass  # noqa: E402

TORCH = Path(importlib.util.find_spec("torch").origin).parent
ARCHES = (80, 90)
SEED, STEP, STREAM = 2**64 - 3, 2**32 - 1, 10
THREADS = 128  # a block
RUNS = 2  # of 128 bits a thread

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


class Arguments(ctypes.Structure):
    """R1Arguments of csrc/r1_body.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "std", "noise", "ids", "out")),
        *((name, ctypes.c_int64) for name in ("num_samples", "sample_size")),
        *((name, ctypes.c_uint32) for name in ("seed_low", "seed_high", "step", "stream", "num_tiles", "is_aligned")),
    ]


def nvcc(arch: int, kind: str, output: Path, source: Path = ROOT / "csrc" / "r1.cu") -> subprocess.CompletedProcess:
    command = ["nvcc", "-std=c++17", "-O3", "-fmad=false", f"-arch=sm_{arch}", "-DUSE_CUDA", "-Xptxas=-v", kind]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000ULL", "-isystem", str(TORCH / "include")]
    command += ["-I", str(ROOT / "csrc"), str(source), "-o", str(output)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)


@pytest.fixture(scope="module", params=ARCHES, ids=lambda arch: f"sm_{arch}")
def ptx(request, tmp_path_factory) -> str:
    output = tmp_path_factory.mktemp("ptx") / "r1.ptx"
    nvcc(request.param, "-ptx", output)
    return output.read_text()


@pytest.mark.parametrize("arch", ARCHES)
def test_compiles_without_spills(arch, tmp_path):
    """Three dtypes with keyed noise and with noise of three dtypes."""
    log = nvcc(arch, "-cubin", tmp_path / "r1.cubin").stderr
    assert len(re.findall(r"Compiling entry function", log)) == 12
    assert len(re.findall(r" 0 bytes spill stores, 0 bytes spill loads", log)) == 12


NAMES = {torch.float32: "float", torch.bfloat16: "c10::BFloat16", torch.float16: "c10::Half", None: "dmd2_fast::Keyed"}


def kernel(ptx: str, dtype: torch.dtype, noise_dtype: torch.dtype | None) -> ptxsim.Kernel:
    """The kernel of these dtypes (noise None: keyed) from all that are in the PTX."""
    mangled = re.findall(r"\.entry (\w+)", ptx)
    names = subprocess.run(["c++filt", *mangled], capture_output=True, text=True, check=True).stdout.splitlines()
    (entry,) = [m for m, name in zip(mangled, names, strict=True) if f"<{NAMES[dtype]}, {NAMES[noise_dtype]}>" in name]
    return ptxsim.load_ptx(ptx, num_warps=THREADS // 32, entry=entry)


def perturb(kernel, x, std, noise=None, ids=None):
    """(2N, D) from a simulated launch, checked for access outside the tensors, misaligned access and races."""
    n, size = x.shape
    run = 16 // x.element_size()
    out = torch.empty(2 * n, size, dtype=x.dtype)
    tensors = {"x": x, "std": std, "noise": noise, "ids": ids, "out": out}
    given = {name: ptxsim.register(tensor) for name, tensor in tensors.items() if tensor is not None}
    pointers = {name: tensor.data_ptr() for name, tensor in given.items()}
    tiles = -(-size // (THREADS * RUNS * run))
    is_aligned = size % run == 0 and all(pointers.get(name, 0) % 16 == 0 for name in ("x", "noise", "out"))
    key = {"seed_low": SEED % 2**32, "seed_high": SEED >> 32, "step": STEP, "stream": STREAM}
    arguments = Arguments(**pointers, num_samples=n, sample_size=size, **key, num_tiles=tiles, is_aligned=is_aligned)
    result = kernel.launch((n * tiles,), [int.from_bytes(bytes(arguments), "little")], race="report")
    assert result.races == []
    return out


SHAPES = [(1, 1), (3, 105), (2, 2048), (1, 4100), (2, 2056)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_keyed_values(ptx, dtype, shape):
    x, std = torch.randn(shape).to(dtype), torch.rand(shape[0]) + 0.1
    ids = torch.tensor([2**32 - 1, 0, 17][: shape[0]])
    out = perturb(kernel(ptx, dtype, None), x, std, ids=ids)
    assert torch.equal(out[: shape[0]], x)
    for i in range(shape[0]):
        values, radius = philox_oracle.normals(int(ids[i]), shape[1], SEED, STEP, STREAM)
        noise, tolerance = std[i] * torch.from_numpy(values), torch.where(torch.from_numpy(radius) >= 0.1, 4e-6, 7e-4)
        expected = x[i].double() + noise
        rounding = expected.abs() * torch.finfo(dtype).eps / 2 + (expected.abs() + noise.abs()) * 2.0**-23
        assert ((out[shape[0] + i].double() - expected).abs() <= rounding + std[i] * tolerance).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("noise_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_given_noise_is_exactly_f32_rounded_once(ptx, dtype, noise_dtype):
    for shape in ((2, 2052), (3, 7)):
        x, noise, std = torch.randn(shape).to(dtype), torch.randn(shape).to(noise_dtype), torch.rand(shape[0])
        out = perturb(kernel(ptx, dtype, noise_dtype), x, std, noise)
        expected = (x.float() + std.unsqueeze(1) * noise.float()).to(dtype)
        assert torch.equal(out, torch.cat([x, expected]))


ALIGNED = """
#include <torch/headeronly/util/BFloat16.h>
#include "r1_body.h"
extern "C" __global__ void __launch_bounds__(dmd2_fast::kR1Threads) aligned(dmd2_fast::R1Arguments arguments) {
  arguments.is_aligned = 1;
  dmd2_fast::r1_perturb_thread<TYPE, dmd2_fast::Keyed>(arguments, blockIdx.x, threadIdx.x);
}
"""


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(("name", "size"), [("float", 4), ("c10::BFloat16", 2)])
def test_at_the_limit(arch, name, size, tmp_path):
    """The Triton kernel's bar, on the path of aligned tensors: memory alone limits it, three tensors are moved."""
    (tmp_path / "r1.cu").write_text(ALIGNED.replace("TYPE", name))
    nvcc(arch, "-cubin", tmp_path / "r1.cubin", tmp_path / "r1.cu")
    blocks, _ = sass.disassemble((tmp_path / "r1.cubin").read_bytes(), "aligned")
    assert sass.loops_of(blocks) == []
    gpu, elements = roofline.GPUS[arch], RUNS * 16 // size
    instructions, clocks = roofline.unit_clocks(blocks, gpu)
    assert instructions / elements <= 43
    seconds = max(clocks.values()) / elements / (gpu.multiprocessors * gpu.clock)
    assert seconds <= 0.90 * 3 * size / gpu.bandwidth
    global_accesses = [o for block in blocks for o in block.opcodes if o.startswith(("LDG", "STG")) and ".128" in o]
    assert sum(o.startswith("LDG") for o in global_accesses) == RUNS
    assert sum(o.startswith("STG") for o in global_accesses) == 2 * RUNS


def test_cmake_builds_it_for_a_cuda_build_of_torch(tmp_path):
    """With a stand-in for libtorch_cuda: the library has the code of both GPUs, and would take CUDA tensors."""
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    fake = tmp_path / "torch"
    (fake / "lib").mkdir(parents=True)
    (fake / "include").symlink_to(TORCH / "include")
    for library in (TORCH / "lib").glob("*.so*"):
        (fake / "lib" / library.name).symlink_to(library)
    stand_in = 'extern "C" int aoti_torch_get_current_cuda_stream(int, void** stream) { *stream = nullptr; return 0; }'
    (tmp_path / "torch_cuda.cpp").write_text(stand_in)
    cuda_library = fake / "lib" / "libtorch_cuda.so"
    compile_it = ["g++", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", str(tmp_path / "torch_cuda.cpp")]
    subprocess.run([*compile_it, "-o", str(cuda_library)], check=True)
    configure = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), f"-DDMD2_FAST_TORCH={fake}"]
    configure += ["-DCMAKE_BUILD_TYPE=Debug", f"-DDMD2_FAST_OUTPUT={tmp_path}"]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(tmp_path / "build"), "--parallel", "2"], check=True, capture_output=True)
    library = tmp_path / "_C.abi3.so"
    cuobjdump = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    listed = subprocess.run([str(cuobjdump), "-lelf", str(library)], capture_output=True, text=True, check=True).stdout
    assert "sm_80" in listed and "sm_90" in listed
    code = (
        "import ctypes, torch\n"
        f"ctypes.CDLL({str(cuda_library)!r}, mode=ctypes.RTLD_GLOBAL)\n"
        "import dmd2_fast\n"
        "with dmd2_fast.use_backend('cpp'):\n"
        "    for name in ('r1_perturb', 'r1_perturb_backward'):\n"
        "        print(*[dmd2_fast.backends()[name][device].backend for device in ('cpu', 'cuda')])\n"
    )
    env = {**os.environ, "DMD2_FAST_EXTENSION": str(library)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.stdout.split("\n") == ["cpp cpp", "cpp reference", ""], done.stderr
