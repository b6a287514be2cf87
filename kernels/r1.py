"""The operators of dmd2_fast/ops/r1.py in Triton.

    r1_perturb   (2N, *) = the batch, then batch + std n; n a tensor or drawn in registers: x_t is read once

Tensors are f16, bf16 or f32 of any strides and of any mixture of dtypes, std (N,) f32, sample ids (N,) int64.
Arithmetic is f32, rounded once at the store. Arguments are checked by the public functions. Launch parameters are in
_launch.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import TILE_ARGUMENTS, Ahead, Layout, ahead, launch, tile_of, tiling, tiling_of
from ._philox import STREAM_ARGUMENTS, STREAM_TYPES, drawn, stream_arguments
from ._store import rounded

# --- r1_perturb -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=[*STREAM_ARGUMENTS, *TILE_ARGUMENTS, "num_samples"])
def r1_perturb_kernel(
    x_ptr,  # (N, D)
    std_ptr,  # (N,) f32
    noise_ptr,  # (N, D), or None: drawn
    ids_ptr,  # (N,) int64, or None beside noise
    out_ptr,  # (2, N, D)
    num_samples,  # N
    seed_low,
    seed_high,
    step,
    noise_stream,
    num_units,
    num_tiles,
    COPY: tl.constexpr,  # False where x is the first half of out
    WIDE: tl.constexpr,
    FAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, tile, offset, left = tile_of(num_units, num_tiles, UNIT, BLOCK)
    element = tl.arange(0, BLOCK)
    mask = element < left
    # Loads first: the random numbers are computed while they are on their way.
    x = tl.load(x_ptr + offset + element, mask=mask)
    std = tl.load(std_ptr + sample)
    if noise_ptr is not None:
        scaled_noise = std * tl.load(noise_ptr + offset + element, mask=mask).to(tl.float32)
    else:
        sample_id = tl.load(ids_ptr + sample)
        scaled_noise = drawn(tile, std, sample_id, step, noise_stream, seed_low, seed_high, False, WIDE, FAST, BLOCK)
    if COPY:
        tl.store(out_ptr + offset + element, x, mask=mask)
    half = num_samples.to(tl.int64) * num_units * UNIT
    perturbed = rounded(x.to(tl.float32) + scaled_noise, x.dtype, FAST)
    tl.store(out_ptr + half + offset + element, perturbed, mask=mask)


def r1_perturb_out(
    x_t: Tensor,
    std: Tensor,
    noise: Tensor | None,
    seed: int,
    step: int,
    stream: int,
    sample_ids: Tensor | None,
    out: Tensor,
) -> None:
    """Writes the batch and its perturbed copy into out (2N, *), whose first half may be x_t."""
    if out.numel() == 0:
        return
    written = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    x = x_t.contiguous()
    tiles = tiling_of(x_t)
    launch(
        r1_perturb_kernel,
        tiles.num_programs,
        x_t,
        x,
        std.contiguous(),
        None if noise is None else noise.contiguous(),
        None if sample_ids is None else sample_ids.contiguous(),
        written,
        x_t.shape[0],
        **stream_arguments(seed, step, stream),
        COPY=x.data_ptr() != written.data_ptr(),
        WIDE=tiles.is_wide,
        **tiles.arguments(),
    )
    if written is not out:
        out.copy_(written)


def r1_perturb(
    x_t: Tensor, std: Tensor, noise: Tensor | None, seed: int, step: int, stream: int, sample_ids: Tensor | None
) -> Tensor:
    """The batch and its perturbed copy, (2N, *) contiguous in x_t's dtype."""
    out = x_t.new_empty((2 * x_t.shape[0], *x_t.shape[1:]))
    r1_perturb_out(x_t, std, noise, seed, step, stream, sample_ids, out)
    return out


@triton.jit(do_not_specialize=TILE_ARGUMENTS)
def r1_perturb_backward_kernel(
    first_ptr,  # (D,)
    second_ptr,  # (D,)
    out_ptr,  # (D,)
    num_units,
    num_tiles,
    FAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _, _, offset, left = tile_of(num_units, num_tiles, UNIT, BLOCK)
    element = tl.arange(0, BLOCK)
    mask = element < left
    first = tl.load(first_ptr + offset + element, mask=mask).to(tl.float32)
    second = tl.load(second_ptr + offset + element, mask=mask).to(tl.float32)
    tl.store(out_ptr + offset + element, rounded(first + second, out_ptr.dtype.element_ty, FAST), mask=mask)


def r1_perturb_backward(grad: Tensor) -> Tensor:
    """The sum of the two halves, (N, *)."""
    num_samples = grad.shape[0] // 2
    out = torch.empty_like(grad[:num_samples])
    if out.numel() == 0:
        return out
    layout = Layout(out, samples_first=False)
    written = layout.write(out)
    tiles = tiling(grad.dtype, 1, out.numel())
    launch(
        r1_perturb_backward_kernel,
        tiles.num_programs,
        grad,
        layout.read(grad[:num_samples]),
        layout.read(grad[num_samples:]),
        written,
        **tiles.arguments(),
    )
    return layout.finish(out, written)


def ahead_of_time(dtype: torch.dtype) -> dict[str, Ahead]:
    """The kernels, r1_perturb on keyed noise, as they are compiled for large `dtype` tensors."""
    tiles = dict.fromkeys(TILE_ARGUMENTS, "i32")
    pointers = {"x_ptr": dtype, "std_ptr": torch.float32, "ids_ptr": torch.int64, "out_ptr": dtype}
    constexprs: dict[str, Any] = {"noise_ptr": None, "COPY": True, "WIDE": dtype.itemsize == 2}
    halves = {"first_ptr": dtype, "second_ptr": dtype, "out_ptr": dtype}
    size = 3 * dtype.itemsize
    return {
        "r1_perturb": ahead(
            r1_perturb_kernel, dtype, pointers, STREAM_TYPES | tiles | {"num_samples": "i32"}, constexprs, size
        ),
        "r1_perturb_backward": ahead(r1_perturb_backward_kernel, dtype, halves, tiles, {}, size),
    }
