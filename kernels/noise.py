"""The operators of dmd2_fast/ops/noise.py in Triton, and the keyed draws themselves.

    philox_normal, philox_uniform   the stream of _philox.py, written only
    add_noise                       alpha x0 + sigma eps, eps a tensor or drawn in registers: x0 is read once, x_t
                                    written once
    predict_x0, renoise             one kernel: x0 from a prediction, and where asked next_alpha x0 + next_sigma eps

Tensors are (N, *) f16, bf16 or f32 of any strides and of any mixture of dtypes, coefficients (N,) f32, sample ids (N,)
int64; arithmetic is f32, rounded once at the store. Outputs are what the fakes say: the strides of torch.empty_like of
the first tensor. Arguments are checked by the public functions. Launch parameters are in _launch.py.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import TILE_ARGUMENTS, Layout, launch, tile_of, tiling, tiling_of
from ._philox import STREAM_ARGUMENTS, drawn, stream_arguments
from ._prediction import predict_x0_backward_kernel, renoise_kernel
from ._scale import scaled
from ._store import rounded

_DO_NOT_SPECIALIZE = [*STREAM_ARGUMENTS, *TILE_ARGUMENTS]


def _vector(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()


# --- draws ------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_DO_NOT_SPECIALIZE)
def draw_kernel(
    ids_ptr,  # (N,) int64
    out_ptr,  # (N, D)
    seed_low,
    seed_high,
    step,
    noise_stream,
    num_units,
    num_tiles,
    UNIFORM: tl.constexpr,
    WIDE: tl.constexpr,
    FAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, tile, offset, left = tile_of(num_units, num_tiles, UNIT, BLOCK)
    element = tl.arange(0, BLOCK)
    sample_id = tl.load(ids_ptr + sample)
    draws = drawn(tile, 1.0, sample_id, step, noise_stream, seed_low, seed_high, UNIFORM, WIDE, FAST, BLOCK)
    tl.store(out_ptr + offset + element, rounded(draws, out_ptr.dtype.element_ty, FAST), mask=element < left)


def _draw(
    sample_ids: Tensor, sample_shape: list[int], key: tuple[int, int, int], dtype: torch.dtype, uniform: bool
) -> Tensor:
    num_samples = sample_ids.shape[0]
    out = sample_ids.new_empty((num_samples, *sample_shape), dtype=dtype)
    if out.numel() == 0:
        return out
    tiles = tiling(dtype, num_samples, math.prod(sample_shape))
    launch(
        draw_kernel,
        tiles.num_programs,
        out,
        sample_ids.contiguous(),
        out,
        **stream_arguments(*key),
        UNIFORM=uniform,
        WIDE=tiles.is_wide,
        **tiles.arguments(),
    )
    return out


def philox_normal(
    sample_ids: Tensor, sample_shape: list[int], seed: int, step: int, stream: int, dtype: torch.dtype
) -> Tensor:
    """Standard normals (N, *sample_shape) of `dtype`."""
    return _draw(sample_ids, sample_shape, (seed, step, stream), dtype, False)


def philox_uniform(sample_ids: Tensor, sample_shape: list[int], seed: int, step: int, stream: int) -> Tensor:
    """Uniforms in (0, 1], (N, *sample_shape) f32."""
    return _draw(sample_ids, sample_shape, (seed, step, stream), torch.float32, True)


# --- add_noise --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_DO_NOT_SPECIALIZE)
def add_noise_kernel(
    x0_ptr,  # (N, D)
    alpha_ptr,  # (N,) f32
    sigma_ptr,  # (N,) f32
    noise_ptr,  # (N, D), or None: drawn
    ids_ptr,  # (N,) int64, or None beside noise
    x_t_ptr,  # (N, D)
    noise_out_ptr,  # (N, D) for the noise that was drawn, or None
    seed_low,
    seed_high,
    step,
    noise_stream,
    num_units,
    num_tiles,
    WIDE: tl.constexpr,
    FAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, tile, offset, left = tile_of(num_units, num_tiles, UNIT, BLOCK)
    element = tl.arange(0, BLOCK)
    mask = element < left
    # Loads first: the random numbers are computed while they are on their way.
    x0 = tl.load(x0_ptr + offset + element, mask=mask)
    alpha = tl.load(alpha_ptr + sample)
    sigma = tl.load(sigma_ptr + sample)
    if noise_ptr is not None:
        scaled_noise = sigma * tl.load(noise_ptr + offset + element, mask=mask).to(tl.float32)
    else:
        sample_id = tl.load(ids_ptr + sample)
        scaled_noise = drawn(tile, sigma, sample_id, step, noise_stream, seed_low, seed_high, False, WIDE, FAST, BLOCK)
        if noise_out_ptr is not None:
            noise = drawn(tile, 1.0, sample_id, step, noise_stream, seed_low, seed_high, False, WIDE, FAST, BLOCK)
            noise = rounded(noise, noise_out_ptr.dtype.element_ty, FAST)
            tl.store(noise_out_ptr + offset + element, noise, mask=mask)
    x_t = tl.fma(x0.to(tl.float32), alpha, scaled_noise)
    tl.store(x_t_ptr + offset + element, rounded(x_t, x_t_ptr.dtype.element_ty, FAST), mask=mask)


def _add_noise(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    key: tuple[int, int, int],
    sample_ids: Tensor | None,
    outputs: list[Tensor],
) -> None:
    """Fills outputs: x_t, and where there is a second, the noise. They have the strides of torch.empty_like(x0)."""
    if x0.numel() == 0:
        return
    layout = Layout(outputs[0], row_major=noise is None)
    written = [layout.write(out) for out in outputs]
    tiles = tiling_of(x0)
    launch(
        add_noise_kernel,
        tiles.num_programs,
        x0,
        layout.read(x0),
        alpha.contiguous(),
        sigma.contiguous(),
        None if noise is None else layout.read(noise),
        _vector(sample_ids),
        written[0],
        written[1] if len(written) > 1 else None,
        **stream_arguments(*key),
        WIDE=tiles.is_wide,
        **tiles.arguments(),
    )
    for out, buffer in zip(outputs, written, strict=True):
        layout.finish(out, buffer)


def add_noise(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    seed: int,
    step: int,
    stream: int,
    sample_ids: Tensor | None,
) -> Tensor:
    """x_t (N, *)."""
    out = torch.empty_like(x0)
    _add_noise(x0, alpha, sigma, noise, (seed, step, stream), sample_ids, [out])
    return out


def add_noise_drawing(
    x0: Tensor, alpha: Tensor, sigma: Tensor, seed: int, step: int, stream: int, sample_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """x_t and the noise it was made from, the latter rounded to x0's dtype."""
    x_t, noise = torch.empty_like(x0), torch.empty_like(x0)
    _add_noise(x0, alpha, sigma, None, (seed, step, stream), sample_ids, [x_t, noise])
    return x_t, noise


def add_noise_backward(grad: Tensor, alpha: Tensor) -> Tensor:
    """alpha * grad."""
    return scaled(grad, alpha, None, 1.0, grad.dtype)


# --- predict_x0 and renoise -------------------------------------------------------------------------------------------


def _renoise(
    x_t: Tensor,
    prediction: Tensor,
    coefficients: tuple[Tensor | None, ...],
    noise: Tensor | None,
    prediction_type: int,
    key: tuple[int, int, int],
    sample_ids: Tensor | None,
) -> Tensor:
    out = torch.empty_like(x_t)
    if out.numel() == 0:
        return out
    layout = Layout(out, row_major=sample_ids is not None)
    written = layout.write(out)
    tiles = tiling_of(x_t)
    launch(
        renoise_kernel,
        tiles.num_programs,
        x_t,
        layout.read(x_t),
        layout.read(prediction),
        *(_vector(values) for values in coefficients),
        None if noise is None else layout.read(noise),
        _vector(sample_ids),
        written,
        **stream_arguments(*key),
        TYPE=prediction_type,
        WIDE=tiles.is_wide,
        **tiles.arguments(),
    )
    return layout.finish(out, written)


def predict_x0(x_t: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: int) -> Tensor:
    """x0 (N, *)."""
    return _renoise(x_t, prediction, (alpha, sigma, None, None), None, prediction_type, (0, 0, 0), None)


def renoise(
    x_t: Tensor,
    prediction: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    next_alpha: Tensor,
    next_sigma: Tensor,
    noise: Tensor | None,
    prediction_type: int,
    seed: int,
    step: int,
    stream: int,
    sample_ids: Tensor | None,
) -> Tensor:
    """The next x_t (N, *). Without noise, samples whose next_sigma is not 0 become NaN."""
    coefficients = (alpha, sigma, next_alpha, next_sigma)
    return _renoise(x_t, prediction, coefficients, noise, prediction_type, (seed, step, stream), sample_ids)


def predict_x0_backward(
    grad: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    scale: Tensor | None,
    prediction_type: int,
    x_t_dtype: torch.dtype | None,
    prediction_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Gradients in x_t and prediction of scale * x0, each in the dtype asked for; empty where that is None."""
    dtypes = (x_t_dtype, prediction_dtype)
    grads = [grad.new_empty(0) if d is None else torch.empty_like(grad, dtype=d) for d in dtypes]
    if grad.numel() == 0 or dtypes == (None, None):
        return grads[0], grads[1]
    layout = Layout(torch.empty_like(grad))
    written = [None if d is None else layout.write(out) for d, out in zip(dtypes, grads, strict=True)]
    tiles = tiling_of(grad)
    launch(
        predict_x0_backward_kernel,
        tiles.num_programs,
        grad,
        layout.read(grad),
        alpha.contiguous(),
        sigma.contiguous(),
        _vector(scale),
        *written,
        TYPE=prediction_type,
        **tiles.arguments(),
    )
    for out, buffer in zip(grads, written, strict=True):
        if buffer is not None:
            layout.finish(out, buffer)
    return grads[0], grads[1]
