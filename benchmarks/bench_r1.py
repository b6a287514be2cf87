"""r1_perturb on the CPU: backends, keyed and given noise. `pytest benchmarks/bench_r1.py --benchmark-only`."""

from __future__ import annotations

import pytest
import torch

import dmd2_fast

pytest.importorskip("pytest_benchmark")

SHAPES = {"digits": (64, 1, 8, 8), "sdxl-latents": (4, 4, 128, 128)}


@pytest.fixture(params=["reference", "cpp"])
def backend(request):
    """The backend under test; skipped where it is not installed, never replaced by another."""
    try:
        with dmd2_fast.use_backend(request.param):
            yield request.param
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("noise", ["key", "tensor"])
def test_r1_perturb(benchmark, backend, noise, shape, dtype):
    x_t = torch.randn(shape).to(dtype)
    arguments = (
        {"noise": torch.randn(shape).to(dtype)}
        if noise == "tensor"
        else {"key": dmd2_fast.NoiseKey(seed=1), "sample_ids": torch.arange(shape[0])}
    )
    benchmark.group = f"r1_perturb {tuple(shape)} {dtype} {noise}"
    benchmark.extra_info.update(threads=torch.get_num_threads(), torch=torch.__version__, elements=x_t.numel())
    out = benchmark(dmd2_fast.r1_perturb, x_t, 0.1, **arguments)
    assert torch.equal(out[: shape[0]], x_t)
