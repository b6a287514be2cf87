"""The operators of dmd2_fast/ops/denoising.py in Triton: forward one launch, with the noise drawn again in registers.

A program stores the weighted residual in f32, which the backward pass scales, and leaves the sum of its squares; the
last program to arrive folds them into the loss.

Tensors are (N, *) f16, bf16 or f32 of any strides and of any mixture of dtypes, coefficients and weights (N,) f32,
sample ids (N,) int64; arithmetic and sums are f32. Arguments are checked by the public function. Launch parameters are
in _launch.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._fold import FOLD, folded, is_last, workspace
from ._launch import TILE_ARGUMENTS, Layout, launch, tile_of, tiling_of
from ._philox import STREAM_ARGUMENTS, drawn, stream_arguments
from ._prediction import EPSILON, SAMPLE, V_PREDICTION
from ._scale import scaled


@triton.jit(do_not_specialize=[*STREAM_ARGUMENTS, *TILE_ARGUMENTS, "num_samples"])
def denoising_loss_kernel(
    prediction_ptr,  # (N, D)
    x0_ptr,  # (N, D); not looked at for EPSILON
    alpha_ptr,  # (N,) f32
    sigma_ptr,  # (N,) f32
    noise_ptr,  # (N, D), or None: drawn
    ids_ptr,  # (N,) int64, or None beside noise and for SAMPLE
    weight_ptr,  # (N,) f32 or None
    loss_ptr,  # () f32
    residual_ptr,  # (N, D) f32
    counter_ptr,  # (1,) int32
    partials_ptr,  # (N * num_tiles,) f32
    num_samples,  # N
    seed_low,
    seed_high,
    step,
    noise_stream,
    num_units,
    num_tiles,
    TYPE: tl.constexpr,
    FOLD: tl.constexpr,
    WIDE: tl.constexpr,
    FAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, tile, offset, left = tile_of(num_units, num_tiles, UNIT, BLOCK)
    element = tl.arange(0, BLOCK)
    mask = element < left
    # Loads first: the random numbers are computed while they are on their way.
    residual = tl.load(prediction_ptr + offset + element, mask=mask).to(tl.float32)
    if TYPE != EPSILON:
        x0 = tl.load(x0_ptr + offset + element, mask=mask).to(tl.float32)
    noise_scale = 1.0
    if TYPE == V_PREDICTION:
        noise_scale = tl.load(alpha_ptr + sample)
    if TYPE != SAMPLE:
        if noise_ptr is not None:
            noise = noise_scale * tl.load(noise_ptr + offset + element, mask=mask).to(tl.float32)
        else:
            id_ = tl.load(ids_ptr + sample)
            noise = drawn(tile, noise_scale, id_, step, noise_stream, seed_low, seed_high, False, WIDE, FAST, BLOCK)
        residual -= noise
    if TYPE == SAMPLE:
        residual -= x0
    elif TYPE == V_PREDICTION:
        residual = tl.fma(x0, tl.load(sigma_ptr + sample), residual)
    elif TYPE != EPSILON:
        residual += x0
    weighted = residual
    if weight_ptr is not None:
        weighted = tl.load(weight_ptr + sample) * residual
    tl.store(residual_ptr + offset + element, weighted, mask=mask)
    tl.store(partials_ptr + tl.program_id(0), tl.sum(tl.where(mask, weighted * residual, 0.0)))
    if is_last(counter_ptr):
        numel = num_units.to(tl.int64) * UNIT * num_samples
        total = folded(partials_ptr, tl.num_programs(0), FOLD).to(tl.float64)
        tl.store(loss_ptr, (total / numel).to(tl.float32))


def denoising_loss(
    prediction: Tensor,
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    prediction_type: int,
    seed: int,
    step: int,
    stream: int,
    sample_ids: Tensor | None,
    sample_weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(loss (), sample_weight (prediction - target) (N, *)), both f32."""
    residual = torch.empty_like(prediction, dtype=torch.float32)
    if residual.numel() == 0:
        return prediction.new_full((), torch.nan, dtype=torch.float32), residual
    loss = prediction.new_empty((), dtype=torch.float32)
    needs_noise = prediction_type != SAMPLE.value
    layout = Layout(residual, row_major=needs_noise and noise is None)
    written = layout.write(residual)
    tiles = tiling_of(prediction)
    launch(
        denoising_loss_kernel,
        tiles.num_programs,
        prediction,
        layout.read(prediction),
        x0 if prediction_type == EPSILON.value else layout.read(x0),
        alpha.contiguous(),
        sigma.contiguous(),
        layout.read(noise) if needs_noise and noise is not None else None,
        None if sample_ids is None else sample_ids.contiguous(),
        None if sample_weight is None else sample_weight.contiguous(),
        loss,
        written,
        *workspace(prediction, tiles.num_programs),
        prediction.shape[0],
        **stream_arguments(seed, step, stream),
        TYPE=prediction_type,
        FOLD=FOLD,
        WIDE=tiles.is_wide,
        **tiles.arguments(),
    )
    return loss, layout.finish(residual, written)


def denoising_loss_backward(grad: Tensor, residual: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * 2 / numel * residual, rounded once to dtype."""
    return scaled(residual, None, grad, 2.0 / max(residual.numel(), 1), dtype)
