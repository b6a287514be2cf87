"""The operators of dmd2_fast/ops/dmd.py in Triton: forward one launch, every tensor read once.

x and x_t are needed for the normaliser alone: they cancel out of F_x0 - T_x0 = c (F - T). So a program stores the
difference and leaves two sums, of |x - T_x0| and of the squared difference; the last program to arrive folds them into
h / m of each sample and the loss. The backward pass scales the difference.

Tensors are (N, *) f16, bf16 or f32 of any strides and of any mixture of dtypes, coefficients and weights (N,) f32;
arithmetic and sums are f32. Arguments are checked by the public function. Launch parameters are in _launch.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._fold import FOLD, is_last, workspace
from ._launch import TILE_ARGUMENTS, Layout, launch, tile_of, tiling_of
from ._prediction import SAMPLE, x0_factors, x0_from
from ._scale import scaled
from ._store import rounded


@triton.jit
def _sum_samples(partials_ptr, sums_ptr, num_samples, num_tiles, TILES: tl.constexpr, FOLD: tl.constexpr):
    """Of each sample's partial sums, the sums: from (N, num_tiles) to (N,)."""
    for first_sample in range(0, num_samples, FOLD // TILES):
        sample = first_sample + tl.arange(0, FOLD // TILES)
        is_sample = sample < num_samples
        sums = tl.zeros((FOLD // TILES, TILES), tl.float32)
        for first_tile in range(0, num_tiles, TILES):
            tile = first_tile + tl.arange(0, TILES)
            at = sample[:, None] * num_tiles + tile[None, :]
            mask = is_sample[:, None] & (tile < num_tiles)[None, :]
            sums += tl.load(partials_ptr + at, mask=mask, other=0.0, volatile=True)
        tl.store(sums_ptr + sample, tl.sum(sums, 1), mask=is_sample)


@triton.jit
def _finish(
    distances_ptr,  # (N,) f32, sums of |x - T_x0|
    squares_ptr,  # (N,) f32, sums of (F - T)^2
    alpha_ptr,
    sigma_ptr,
    weight_ptr,
    loss_ptr,
    scale_ptr,
    eps,
    num_samples,
    sample_size,
    TYPE: tl.constexpr,
    SAMPLES: tl.constexpr,
):
    """h / m of each sample, and the loss; in f64, for what has one value a sample does not average out."""
    total = tl.zeros((SAMPLES,), tl.float64)
    for first in range(0, num_samples, SAMPLES):
        sample = first + tl.arange(0, SAMPLES)
        mask = sample < num_samples
        distance = tl.load(distances_ptr + sample, mask=mask, other=1.0).to(tl.float64)
        squares = tl.load(squares_ptr + sample, mask=mask, other=0.0).to(tl.float64)
        alpha = tl.load(alpha_ptr + sample, mask=mask, other=1.0)
        sigma = tl.load(sigma_ptr + sample, mask=mask, other=1.0)
        scale = 1.0 / (distance / sample_size + eps)
        if weight_ptr is not None:
            scale *= tl.load(weight_ptr + sample, mask=mask, other=0.0)
        tl.store(scale_ptr + sample, scale.to(tl.float32), mask=mask)
        _, d = x0_factors(alpha, sigma, TYPE)
        g = scale * d
        total += g * g * squares
    loss = tl.sum(total) * 0.5 / (num_samples * sample_size)
    tl.store(loss_ptr, loss.to(tl.float32))


@triton.jit(do_not_specialize=[*TILE_ARGUMENTS, "num_samples"])
def dmd_loss_kernel(
    x_ptr,  # (N, D)
    x_t_ptr,  # (N, D)
    fake_ptr,  # (N, D)
    teacher_ptr,  # (N, D)
    uncond_ptr,  # (N, D) or None
    alpha_ptr,  # (N,) f32
    sigma_ptr,  # (N,) f32
    weight_ptr,  # (N,) f32 or None
    loss_ptr,  # () f32
    difference_ptr,  # (N, D)
    scale_ptr,  # (N,) f32
    counter_ptr,  # (1,) int32
    partials_ptr,  # (2, N, num_tiles) f32 for the programs, (2, N) for the samples
    guidance_scale,  # f32
    eps,  # f32
    num_samples,  # N
    num_units,
    num_tiles,
    TYPE: tl.constexpr,
    TILES: tl.constexpr,  # tiles of a sample that the last program takes at a time
    FOLD: tl.constexpr,
    FAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, _, offset, left = tile_of(num_units, num_tiles, UNIT, BLOCK)
    element = tl.arange(0, BLOCK)
    mask = element < left
    # Zeros beyond the sample's end give a distance and a difference of zero.
    x = tl.load(x_ptr + offset + element, mask=mask, other=0.0).to(tl.float32)
    fake = tl.load(fake_ptr + offset + element, mask=mask, other=0.0).to(tl.float32)
    teacher = tl.load(teacher_ptr + offset + element, mask=mask, other=0.0).to(tl.float32)
    x_t = x
    if TYPE != SAMPLE:
        x_t = tl.load(x_t_ptr + offset + element, mask=mask, other=0.0).to(tl.float32)
    if uncond_ptr is not None:
        uncond = tl.load(uncond_ptr + offset + element, mask=mask, other=0.0).to(tl.float32)
        teacher = tl.fma(teacher - uncond, guidance_scale, uncond)
    alpha = tl.load(alpha_ptr + sample)
    sigma = tl.load(sigma_ptr + sample)
    distance = tl.abs(x - x0_from(x_t, teacher, alpha, sigma, TYPE))
    gap = fake - teacher
    _, d = x0_factors(alpha, sigma, TYPE)
    difference = rounded(gap * d.to(tl.float32), difference_ptr.dtype.element_ty, FAST)
    tl.store(difference_ptr + offset + element, difference, mask=mask)
    program = tl.program_id(0)
    tl.store(partials_ptr + program, tl.sum(distance))
    tl.store(partials_ptr + tl.num_programs(0) + program, tl.sum(gap * gap))
    if is_last(counter_ptr):
        num_programs = tl.num_programs(0)
        sums_ptr = partials_ptr + 2 * num_programs
        _sum_samples(partials_ptr, sums_ptr, num_samples, num_tiles, TILES, FOLD)
        _sum_samples(partials_ptr + num_programs, sums_ptr + num_samples, num_samples, num_tiles, TILES, FOLD)
        # One thread takes a sample from here on, whichever it was that summed it.
        tl.debug_barrier()
        _finish(
            sums_ptr,
            sums_ptr + num_samples,
            alpha_ptr,
            sigma_ptr,
            weight_ptr,
            loss_ptr,
            scale_ptr,
            eps,
            num_samples,
            num_units.to(tl.int64) * UNIT,
            TYPE,
            128,
        )


def _fold_tiles(num_tiles: int) -> int:
    """A power of 4, for few compilations, that reaches num_tiles or FOLD."""
    tiles = 1
    while tiles < min(num_tiles, FOLD // 2):
        tiles *= 4
    return tiles


def dmd_loss(
    x: Tensor,
    x_t: Tensor,
    fake_prediction: Tensor,
    teacher_prediction: Tensor,
    teacher_uncond_prediction: Tensor | None,
    alpha: Tensor,
    sigma: Tensor,
    prediction_type: int,
    guidance_scale: float,
    sample_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss () f32, F_x0 - T_x0 (N, *) in x's dtype, h / m (N,) f32)."""
    difference = torch.empty_like(x)
    if x.numel() == 0:
        nothing = x.new_full((x.shape[0] + 1,), torch.nan, dtype=torch.float32)
        return nothing[0].clone(), difference, nothing[1:].clone()
    loss = x.new_empty((), dtype=torch.float32)
    scale = x.new_empty((x.shape[0],), dtype=torch.float32)
    layout = Layout(difference)
    written = layout.write(difference)
    tiles = tiling_of(x)
    launch(
        dmd_loss_kernel,
        tiles.num_programs,
        x,
        layout.read(x),
        layout.read(x_t),
        layout.read(fake_prediction),
        layout.read(teacher_prediction),
        None if teacher_uncond_prediction is None else layout.read(teacher_uncond_prediction),
        alpha.contiguous(),
        sigma.contiguous(),
        None if sample_weight is None else sample_weight.contiguous(),
        loss,
        written,
        scale,
        *workspace(x, 2 * (tiles.num_programs + x.shape[0])),
        guidance_scale,
        eps,
        x.shape[0],
        TYPE=prediction_type,
        TILES=_fold_tiles(tiles.num_tiles),
        FOLD=FOLD,
        **tiles.arguments(),
    )
    return loss, layout.finish(difference, written), scale


def dmd_loss_backward(grad: Tensor, difference: Tensor, scale: Tensor) -> Tensor:
    """grad * G / numel (N, *)."""
    return scaled(difference, scale, grad, 1.0 / max(difference.numel(), 1), difference.dtype)
