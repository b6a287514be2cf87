"""r1_perturb in Triton: (2N, *) = the batch, then batch + std * n, in f32, rounded once at the store.

n is a tensor, or the keyed stream of `_philox`, drawn in registers: then the kernel reads x_t once and writes both
halves.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._philox import STREAM_ARGUMENTS, normals, stream_arguments
from ._store import rounded

# Elements a program. From ahead-of-time compilation for sm_80 and sm_90: 128-bit accesses without spills at 4 warps.
_BLOCK = {torch.float32: 2048, torch.bfloat16: 4096, torch.float16: 4096}
_SMALL_BLOCK = 1024  # where larger ones would leave multiprocessors idle
_FEW_PROGRAMS = 264  # two for each multiprocessor of the largest GPU in use
_MIN_BLOCK = 128


@triton.jit(do_not_specialize=STREAM_ARGUMENTS)
def _r1_perturb_kernel(
    x_ptr,  # (N, D)
    std_ptr,  # (N,) f32
    noise_ptr,  # (N, D) or None
    ids_ptr,  # (N,) int64 or None: 0 .. N - 1
    out_ptr,  # (2, N, D)
    half,  # N * D, where the perturbed copy begins
    sample_size,  # D
    num_tiles,  # tiles a sample
    seed_low,
    seed_high,
    step,
    noise_stream,
    FAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    sample = program // num_tiles
    tile = program % num_tiles
    element = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < sample_size
    row = sample.to(tl.int64) * sample_size
    # Loads first: the random numbers are computed while they are on their way.
    x = tl.load(x_ptr + row + element, mask=mask)
    std = tl.load(std_ptr + sample)
    if noise_ptr is not None:
        n = tl.load(noise_ptr + row + element, mask=mask).to(tl.float32)
    else:
        sample_id = sample
        if ids_ptr is not None:
            sample_id = tl.load(ids_ptr + sample)
        counter = (tile * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.uint32)
        n = normals(counter, sample_id, step, noise_stream, seed_low, seed_high, FAST)
    perturbed = x.to(tl.float32) + std * n
    tl.store(out_ptr + row + element, x, mask=mask)
    tl.store(out_ptr + half + row + element, rounded(perturbed, x.dtype, FAST), mask=mask)


def _block_size(dtype: torch.dtype, num_samples: int, sample_size: int) -> int:
    block = _BLOCK[dtype]
    if num_samples * triton.cdiv(sample_size, block) < _FEW_PROGRAMS:
        block = _SMALL_BLOCK
    return max(_MIN_BLOCK, min(block, triton.next_power_of_2(sample_size)))


def r1_perturb(
    x_t: Tensor,
    std: Tensor,
    noise: Tensor | None,
    seed: int,
    step: int,
    stream: int,
    sample_ids: Tensor | None,
) -> Tensor:
    """The batch and its perturbed copy, (2N, *) contiguous in x_t's dtype.

    x_t (N, *) f32, bf16 or f16, any strides; std (N,) f32; noise like x_t in any float dtype, or None: then the stream
    of (seed, step, stream) at sample_ids (N,) int64, None being 0 .. N - 1. Arguments are checked by
    `dmd2_fast.r1_perturb`; `ValueError` for a dtype that this backend does not have.
    """
    if x_t.dtype not in _BLOCK:
        raise ValueError(f"x_t is {x_t.dtype}: the triton backend takes float32, bfloat16 and float16")
    num_samples = x_t.shape[0]
    out = x_t.new_empty((2 * num_samples, *x_t.shape[1:]))
    if out.numel() == 0:
        return out
    sample_size = x_t.numel() // num_samples
    block = _block_size(x_t.dtype, num_samples, sample_size)
    num_tiles = triton.cdiv(sample_size, block)
    # Triton launches on the current device, which need not be the tensor's.
    with torch.cuda.device(x_t.device) if x_t.is_cuda else contextlib.nullcontext():
        _r1_perturb_kernel[(num_samples * num_tiles,)](
            x_t.contiguous(),
            std.contiguous(),
            None if noise is None else noise.contiguous(),
            None if sample_ids is None else sample_ids.contiguous(),
            out,
            x_t.numel(),
            sample_size,
            num_tiles,
            **stream_arguments(seed, step, stream),
            FAST=isinstance(_r1_perturb_kernel, triton.runtime.JITFunction),
            BLOCK=block,
            num_warps=4 if block >= 512 else 1,
        )
    return out
