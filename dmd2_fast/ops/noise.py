"""Noise injection and its inverse.

    add_noise    x_t = alpha x0 + sigma eps                                          DMD2 (arXiv 2405.14867), section 3
    predict_x0   x0 from x_t and a network's prediction, by prediction type:
                     epsilon        eps                      (x_t - sigma p) / alpha
                     sample         x0                       p
                     v_prediction   alpha eps - sigma x0     (alpha x_t - sigma p) / (alpha^2 + sigma^2)
                     flow           eps - x0                 (x_t - sigma p) / (alpha + sigma)
    renoise      next_alpha x0 + next_sigma eps', a step of few-step sampling and of backward simulation (section 4.5)

Shapes: images (N, *), coefficients (N,) f32. Arithmetic is f32 (f64 for f64) and rounded once at the store; outputs
have the dtype and memory format of the first tensor. Keyed noise enters unrounded. Errors: ValueError by argument.
"""

from typing import Any

import torch
from torch import Tensor

from dmd2_fast.dispatch import define
from dmd2_fast.ops._common import (
    SAMPLE,
    check_batch,
    check_ids_at,
    check_like,
    check_prediction_type,
    check_vector,
    draw,
    noise_arguments,
    per_sample,
    store,
    working_dtype,
    x0_from,
)
from dmd2_fast.random import NoiseKey, check_range

# --- add_noise --------------------------------------------------------------------------------------------------------


def _noised(x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    x_t = per_sample(alpha, x0) * x0.to(working_dtype(x0)) + per_sample(sigma, x0) * noise
    return store(x_t, x0)


def add_noise_reference(
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
    drawn = draw(x0, noise, seed, step, stream, sample_ids)
    assert drawn is not None
    return _noised(x0, alpha, sigma, drawn)


def add_noise_drawing_reference(
    x0: Tensor, alpha: Tensor, sigma: Tensor, seed: int, step: int, stream: int, sample_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """x_t and the noise it was made from, the latter rounded to x0's dtype."""
    drawn = draw(x0, None, seed, step, stream, sample_ids)
    assert drawn is not None
    return _noised(x0, alpha, sigma, drawn), store(drawn, x0)


def add_noise_backward_reference(grad: Tensor, alpha: Tensor) -> Tensor:
    """alpha * grad."""
    return store(per_sample(alpha, grad) * grad.to(working_dtype(grad)), grad)


def _save_alpha(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[1])
    ctx.num_inputs = len(inputs)
    if isinstance(output, tuple):
        ctx.mark_non_differentiable(output[1])


def _add_noise_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    (alpha,) = ctx.saved_tensors
    grad_x0 = None if grad is None else _add_noise_backward_op(grad, alpha)
    return grad_x0, *[None] * (ctx.num_inputs - 1)


_add_noise_backward_op = define(
    "add_noise_backward",
    "(Tensor grad, Tensor alpha) -> Tensor",
    reference=add_noise_backward_reference,
    fake=lambda grad, alpha: torch.empty_like(grad),
)
_add_noise = define(
    "add_noise",
    "(Tensor x0, Tensor alpha, Tensor sigma, Tensor? noise, SymInt seed, SymInt step, SymInt stream, "
    "Tensor? sample_ids) -> Tensor",
    reference=add_noise_reference,
    fake=lambda x0, *_: torch.empty_like(x0),
    setup_context=_save_alpha,
    backward=_add_noise_backward,
    check=check_ids_at(7),
)
_add_noise_drawing = define(
    "add_noise_drawing",
    "(Tensor x0, Tensor alpha, Tensor sigma, SymInt seed, SymInt step, SymInt stream, Tensor sample_ids) "
    "-> (Tensor, Tensor)",
    reference=add_noise_drawing_reference,
    fake=lambda x0, *_: (torch.empty_like(x0), torch.empty_like(x0)),
    setup_context=_save_alpha,
    backward=_add_noise_backward,
    check=check_ids_at(6),
)


def add_noise(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    noise: Tensor | None = None,
    *,
    key: NoiseKey | None = None,
    sample_ids: Tensor | None = None,
    return_noise: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """x_t = alpha x0 + sigma eps, or (x_t, eps) with return_noise; differentiable in x0.

    x0: (N, *) f16, bf16, f32 or f64. alpha, sigma: (N,) f32. Either noise, of x0's shape, or key with sample_ids (N,)
    int64. x_t and the returned noise have x0's dtype, but x_t is made from the unrounded noise.
    Raises ValueError naming the argument for wrong shapes, dtypes and devices, and unless exactly one of noise and key
    is given.
    """
    check_batch("x0", x0)
    check_vector("alpha", alpha, x0)
    check_vector("sigma", sigma, x0)
    arguments = noise_arguments(noise, key, sample_ids, "x0", x0, required=True)
    if return_noise and noise is None:
        return _add_noise_drawing(x0, alpha, sigma, *arguments[1:])
    x_t = _add_noise(x0, alpha, sigma, *arguments)
    return (x_t, noise.detach().to(x0.dtype)) if return_noise and noise is not None else x_t


# --- predict_x0 and renoise -------------------------------------------------------------------------------------------


def _x0(x_t: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: int) -> Tensor:
    working = working_dtype(x_t)
    coefficients = per_sample(alpha, x_t), per_sample(sigma, x_t)
    return x0_from(x_t.to(working), prediction.to(working), *coefficients, prediction_type)


def predict_x0_reference(x_t: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: int) -> Tensor:
    """x0 (N, *)."""
    x0 = _x0(x_t, prediction, alpha, sigma, prediction_type)
    # An operator must not return an argument itself.
    return store(x0.clone() if prediction_type == SAMPLE else x0, x_t)


def renoise_reference(
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
    """The next x_t (N, *). Without noise, samples whose next_sigma is not 0 become NaN rather than silently wrong."""
    x0 = _x0(x_t, prediction, alpha, sigma, prediction_type)
    drawn = draw(x_t, noise, seed, step, stream, sample_ids)
    scaled = per_sample(next_alpha, x_t) * x0
    if drawn is None:
        return store(torch.where(per_sample(next_sigma, x_t) == 0, scaled, torch.nan), x_t)
    return store(scaled + per_sample(next_sigma, x_t) * drawn, x_t)


def predict_x0_backward_reference(
    grad: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    scale: Tensor | None,
    prediction_type: int,
    x_t_dtype: torch.dtype | None,
    prediction_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Gradients in x_t and prediction of scale * x0, each in the dtype asked for; empty where that is None."""
    wide, alpha, sigma = grad.to(working_dtype(grad)), per_sample(alpha, grad), per_sample(sigma, grad)
    if scale is not None:
        wide = per_sample(scale, grad) * wide
    grad_x_t = grad_prediction = grad.new_empty(0)
    if x_t_dtype is not None:
        zero = torch.zeros_like(wide)
        grad_x_t = store(x0_from(wide, zero, alpha, sigma, prediction_type), grad, x_t_dtype)
    if prediction_dtype is not None:
        one = wide.clone() if prediction_type == SAMPLE else wide
        zero = torch.zeros_like(wide)
        grad_prediction = store(x0_from(zero, one, alpha, sigma, prediction_type), grad, prediction_dtype)
    return grad_x_t, grad_prediction


def _predict_x0_backward_fake(
    grad: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    scale: Tensor | None,
    prediction_type: int,
    x_t_dtype: torch.dtype | None,
    prediction_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    def like(dtype: torch.dtype | None) -> Tensor:
        return grad.new_empty(0) if dtype is None else torch.empty_like(grad, dtype=dtype)

    return like(x_t_dtype), like(prediction_dtype)


_predict_x0_backward_op = define(
    "predict_x0_backward",
    "(Tensor grad, Tensor alpha, Tensor sigma, Tensor? scale, int prediction_type, ScalarType? x_t_dtype, "
    "ScalarType? prediction_dtype) -> (Tensor, Tensor)",
    reference=predict_x0_backward_reference,
    fake=_predict_x0_backward_fake,
)


def _save_prediction(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    x_t, prediction, alpha, sigma = inputs[:4]
    is_renoise = len(inputs) > 5
    ctx.save_for_backward(alpha, sigma, inputs[4] if is_renoise else None)
    ctx.prediction_type = inputs[7] if is_renoise else inputs[4]
    ctx.dtypes = x_t.dtype, prediction.dtype
    ctx.num_inputs = len(inputs)


def _prediction_backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None, None]
    if grad is not None:
        needed = ctx.needs_input_grad[:2]
        dtypes = [dtype if need else None for dtype, need in zip(ctx.dtypes, needed, strict=True)]
        results = _predict_x0_backward_op(grad, *ctx.saved_tensors, ctx.prediction_type, *dtypes)
        grads = [result if need else None for result, need in zip(results, needed, strict=True)]
    return *grads, *[None] * (ctx.num_inputs - 2)


def _check_renoise(*arguments: Any) -> None:
    next_sigma, noise, sample_ids = arguments[5], arguments[6], arguments[11]
    check_range(sample_ids)
    is_silent = noise is None and sample_ids is None
    if is_silent and next_sigma.device.type == "cpu" and bool(next_sigma.any()):
        raise ValueError("next_sigma: got values other than 0 with neither noise nor key, expected 0, or one of them")


_predict_x0 = define(
    "predict_x0",
    "(Tensor x_t, Tensor prediction, Tensor alpha, Tensor sigma, int prediction_type) -> Tensor",
    reference=predict_x0_reference,
    fake=lambda x_t, *_: torch.empty_like(x_t),
    setup_context=_save_prediction,
    backward=_prediction_backward,
)
_renoise = define(
    "renoise",
    "(Tensor x_t, Tensor prediction, Tensor alpha, Tensor sigma, Tensor next_alpha, Tensor next_sigma, Tensor? noise, "
    "int prediction_type, SymInt seed, SymInt step, SymInt stream, Tensor? sample_ids) -> Tensor",
    reference=renoise_reference,
    fake=lambda x_t, *_: torch.empty_like(x_t),
    setup_context=_save_prediction,
    backward=_prediction_backward,
    check=_check_renoise,
)


def predict_x0(x_t: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor, *, prediction_type: str) -> Tensor:
    """x0 from x_t and a network's prediction, by the table above; differentiable in prediction and x_t.

    x_t, prediction: (N, *). alpha, sigma: (N,) f32. prediction_type: "epsilon", "sample", "v_prediction" or "flow". The
    result has x_t's dtype. Raises ValueError naming the argument for wrong shapes, dtypes, devices and types.
    """
    check_batch("x_t", x_t)
    check_like("prediction", prediction, "x_t", x_t)
    check_vector("alpha", alpha, x_t)
    check_vector("sigma", sigma, x_t)
    return _predict_x0(x_t, prediction, alpha, sigma, check_prediction_type(prediction_type))


def renoise(
    x_t: Tensor,
    prediction: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    next_alpha: Tensor,
    next_sigma: Tensor,
    noise: Tensor | None = None,
    *,
    prediction_type: str,
    key: NoiseKey | None = None,
    sample_ids: Tensor | None = None,
) -> Tensor:
    """One sampling step: next_alpha x0 + next_sigma eps, x0 unrounded from the prediction; d/dprediction and d/dx_t.

    x_t, prediction: (N, *). The four coefficients: (N,) f32. At most one of noise, of x_t's shape, and key with
    sample_ids (N,) int64; with neither, next_sigma must be 0 (a ValueError on the CPU; on a GPU, where looking would
    wait for the device, the samples become NaN). The result has x_t's dtype. Raises ValueError naming the argument.
    """
    check_batch("x_t", x_t)
    check_like("prediction", prediction, "x_t", x_t)
    for name, values in (
        ("alpha", alpha),
        ("sigma", sigma),
        ("next_alpha", next_alpha),
        ("next_sigma", next_sigma),
    ):
        check_vector(name, values, x_t)
    code = check_prediction_type(prediction_type)
    given, seed, step, stream, ids = noise_arguments(noise, key, sample_ids, "x_t", x_t, required=False)
    return _renoise(x_t, prediction, alpha, sigma, next_alpha, next_sigma, given, code, seed, step, stream, ids)
