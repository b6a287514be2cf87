"""The operators of dmd2_fast/ops/r1.py in Triton.

    r1_perturb   (2N, *) = the batch, then batch + std n; n a tensor or drawn in registers: x_t is read once
    r1_penalty   mean(((D(x_t + std n) - D(x_t)) / std)^2) over logits, in one launch

Tensors are f16, bf16 or f32 of any strides and of any mixture of dtypes, std (N,) f32, sample ids (N,) int64.
Arithmetic is f32, rounded once at the store. Arguments are checked by the public functions. Launch parameters are in
_launch.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._fold import FOLD, folded, is_last, workspace
from ._launch import TILE_ARGUMENTS, Layout, launch, tile_of, tiling, tiling_of
from ._philox import STREAM_ARGUMENTS, drawn, stream_arguments
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


# --- r1_penalty -------------------------------------------------------------------------------------------------------


@triton.jit
def _slope(logits_ptr, perturbed_ptr, std_ptr, position, mask, sample_size):
    """((perturbed - logits) / std, std) at positions of (N, D), f32."""
    std = tl.load(std_ptr + position // sample_size, mask=mask, other=1.0)
    logits = tl.load(logits_ptr + position, mask=mask, other=0.0).to(tl.float32)
    perturbed = tl.load(perturbed_ptr + position, mask=mask, other=0.0).to(tl.float32)
    return tl.div_rn(perturbed - logits, std), std


@triton.jit(do_not_specialize=[*TILE_ARGUMENTS, "sample_size"])
def r1_penalty_kernel(
    logits_ptr,  # (N, D)
    perturbed_ptr,  # (N, D)
    std_ptr,  # (N,) f32
    loss_ptr,  # () f32
    counter_ptr,  # (1,) int32
    partials_ptr,  # (num_tiles,) f32
    sample_size,  # D
    num_units,
    num_tiles,
    FOLD: tl.constexpr,
    FAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _, tile, offset, left = tile_of(num_units, num_tiles, UNIT, BLOCK)
    element = tl.arange(0, BLOCK)
    slope, _ = _slope(logits_ptr, perturbed_ptr, std_ptr, offset + element, element < left, sample_size)
    tl.store(partials_ptr + tile, tl.sum(slope * slope))
    if is_last(counter_ptr):
        total = folded(partials_ptr, num_tiles, FOLD).to(tl.float64)
        tl.store(loss_ptr, (total / (num_units.to(tl.int64) * UNIT)).to(tl.float32))


@triton.jit(do_not_specialize=[*TILE_ARGUMENTS, "sample_size"])
def r1_penalty_backward_kernel(
    grad_ptr,  # () f32
    logits_ptr,  # (N, D)
    perturbed_ptr,  # (N, D)
    std_ptr,  # (N,) f32
    grad_logits_ptr,  # (N, D)
    grad_perturbed_ptr,  # (N, D)
    factor,  # 2 / (N D), f32
    sample_size,  # D
    num_units,
    num_tiles,
    FAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _, _, offset, left = tile_of(num_units, num_tiles, UNIT, BLOCK)
    element = tl.arange(0, BLOCK)
    mask = element < left
    slope, std = _slope(logits_ptr, perturbed_ptr, std_ptr, offset + element, mask, sample_size)
    grad = tl.div_rn(slope, std) * (tl.load(grad_ptr).to(tl.float32) * factor)
    tl.store(grad_logits_ptr + offset + element, rounded(-grad, grad_logits_ptr.dtype.element_ty, FAST), mask=mask)
    tl.store(grad_perturbed_ptr + offset + element, rounded(grad, grad_perturbed_ptr.dtype.element_ty, FAST), mask=mask)


def r1_penalty(logits: Tensor, perturbed_logits: Tensor, std: Tensor) -> Tensor:
    """The penalty, () f32."""
    if logits.numel() == 0:
        return logits.new_full((), torch.nan, dtype=torch.float32)
    loss = logits.new_empty((), dtype=torch.float32)
    tiles = tiling(logits.dtype, 1, logits.numel())
    launch(
        r1_penalty_kernel,
        tiles.num_programs,
        logits,
        logits.contiguous(),
        perturbed_logits.contiguous(),
        std.contiguous(),
        loss,
        *workspace(logits, tiles.num_programs),
        logits.numel() // logits.shape[0],
        FOLD=FOLD,
        **tiles.arguments(),
    )
    return loss


def r1_penalty_backward(grad: Tensor, logits: Tensor, perturbed_logits: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients in logits and perturbed_logits: opposite, 2 slope / (std numel) apart from the sign."""
    grads = torch.empty_like(logits), torch.empty_like(perturbed_logits)
    if logits.numel() == 0:
        return grads
    layouts = [Layout(out, row_major=True) for out in grads]
    written = [layout.write(out) for layout, out in zip(layouts, grads, strict=True)]
    tiles = tiling(logits.dtype, 1, logits.numel())
    launch(
        r1_penalty_backward_kernel,
        tiles.num_programs,
        logits,
        grad,
        logits.contiguous(),
        perturbed_logits.contiguous(),
        std.contiguous(),
        *written,
        2.0 / logits.numel(),
        logits.numel() // logits.shape[0],
        **tiles.arguments(),
    )
    for layout, out, buffer in zip(layouts, grads, written, strict=True):
        layout.finish(out, buffer)
    return grads
