"""x0 from a prediction inside Triton kernels, and the kernels of predict_x0 and renoise.

TYPE is the position in dmd2_fast.ops._common.PREDICTION_TYPES.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import TILE_ARGUMENTS, tile_of
from ._philox import STREAM_ARGUMENTS, drawn
from ._store import rounded

EPSILON = tl.constexpr(0)
SAMPLE = tl.constexpr(1)
V_PREDICTION = tl.constexpr(2)


@triton.jit
def x0_factors(alpha, sigma, TYPE: tl.constexpr):
    """(c, d) with x0 = c x_t + d prediction, or c alpha x_t + d prediction for V_PREDICTION.

    alpha and sigma are f32 scalars, c and d f64: an error here would be common to all elements of a sample, so it would
    not average out of a loss.
    """
    alpha = alpha.to(tl.float64)
    sigma = sigma.to(tl.float64)
    if TYPE == SAMPLE:
        c = alpha * 0.0
        d = c + 1.0
    else:
        if TYPE == EPSILON:
            denominator = alpha
        elif TYPE == V_PREDICTION:
            denominator = alpha * alpha + sigma * sigma
        else:
            denominator = alpha + sigma
        c = 1.0 / denominator
        d = -sigma * c
    return c, d


@triton.jit
def x0_from(x_t, prediction, alpha, sigma, TYPE: tl.constexpr):
    """x0 of blocks x_t and prediction, f32; x_t is not looked at for SAMPLE."""
    if TYPE == SAMPLE:
        x0 = prediction
    else:
        c, _ = x0_factors(alpha, sigma, TYPE)
        if TYPE == V_PREDICTION:
            x_t = alpha * x_t
        x0 = tl.fma(-sigma, prediction, x_t) * c.to(tl.float32)
    return x0


@triton.jit(do_not_specialize=[*STREAM_ARGUMENTS, *TILE_ARGUMENTS])
def renoise_kernel(
    x_t_ptr,  # (N, D)
    prediction_ptr,  # (N, D)
    alpha_ptr,  # (N,) f32
    sigma_ptr,  # (N,) f32
    next_alpha_ptr,  # (N,) f32, or None: the output is x0
    next_sigma_ptr,  # (N,) f32, or None beside it
    noise_ptr,  # (N, D) or None
    ids_ptr,  # (N,) int64, or None: with neither, samples whose next_sigma is not 0 become NaN
    out_ptr,  # (N, D)
    seed_low,
    seed_high,
    step,
    noise_stream,
    num_units,
    num_tiles,
    TYPE: tl.constexpr,
    WIDE: tl.constexpr,
    FAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, tile, offset, left = tile_of(num_units, num_tiles, UNIT, BLOCK)
    element = tl.arange(0, BLOCK)
    mask = element < left
    prediction = tl.load(prediction_ptr + offset + element, mask=mask).to(tl.float32)
    x_t = prediction
    if TYPE != SAMPLE:
        x_t = tl.load(x_t_ptr + offset + element, mask=mask).to(tl.float32)
    out = x0_from(x_t, prediction, tl.load(alpha_ptr + sample), tl.load(sigma_ptr + sample), TYPE)
    if next_alpha_ptr is not None:
        next_alpha = tl.load(next_alpha_ptr + sample)
        next_sigma = tl.load(next_sigma_ptr + sample)
        if noise_ptr is not None:
            noise = next_sigma * tl.load(noise_ptr + offset + element, mask=mask).to(tl.float32)
            out = tl.fma(out, next_alpha, noise)
        elif ids_ptr is not None:
            sample_id = tl.load(ids_ptr + sample)
            noise = drawn(
                tile, next_sigma, sample_id, step, noise_stream, seed_low, seed_high, False, WIDE, FAST, BLOCK
            )
            out = tl.fma(out, next_alpha, noise)
        else:
            out = out * tl.where(next_sigma == 0.0, next_alpha, float("nan"))
    tl.store(out_ptr + offset + element, rounded(out, out_ptr.dtype.element_ty, FAST), mask=mask)


@triton.jit(do_not_specialize=TILE_ARGUMENTS)
def predict_x0_backward_kernel(
    grad_ptr,  # (N, D)
    alpha_ptr,  # (N,) f32
    sigma_ptr,  # (N,) f32
    scale_ptr,  # (N,) f32 or None
    grad_x_t_ptr,  # (N, D) or None
    grad_prediction_ptr,  # (N, D) or None
    num_units,
    num_tiles,
    TYPE: tl.constexpr,
    FAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, _, offset, left = tile_of(num_units, num_tiles, UNIT, BLOCK)
    element = tl.arange(0, BLOCK)
    mask = element < left
    grad = tl.load(grad_ptr + offset + element, mask=mask).to(tl.float32)
    alpha = tl.load(alpha_ptr + sample)
    c, d = x0_factors(alpha, tl.load(sigma_ptr + sample), TYPE)
    if TYPE == V_PREDICTION:
        c *= alpha
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + sample)
        c *= scale
        d *= scale
    if grad_x_t_ptr is not None:
        grad_x_t = tl.zeros_like(grad) if TYPE == SAMPLE else grad * c.to(tl.float32)
        tl.store(grad_x_t_ptr + offset + element, rounded(grad_x_t, grad_x_t_ptr.dtype.element_ty, FAST), mask=mask)
    if grad_prediction_ptr is not None:
        result = rounded(grad * d.to(tl.float32), grad_prediction_ptr.dtype.element_ty, FAST)
        tl.store(grad_prediction_ptr + offset + element, result, mask=mask)
