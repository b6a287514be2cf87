"""The denoising loss that trains the fake score (DMD2, arXiv 2405.14867, equation 6).

    loss = mean(sample_weight (prediction - target)^2), with x_t = alpha x0 + sigma eps and
    target = eps (epsilon), x0 (sample), alpha eps - sigma x0 (v_prediction), eps - x0 (flow)

Shapes: prediction, x0 and noise (N, *), coefficients and weights (N,) f32. Given a key, the noise is drawn again here
(unrounded) rather than kept since add_noise. The forward pass keeps the weighted residual in f32 (f64 for f64) without
the 2 / numel, which would leave f16's normal range; the gradient is rounded once. The loss is f32 (f64 for f64), the
gradient has prediction's dtype and goes to prediction alone. Non-finite values surface. Errors: ValueError by argument.
"""

from typing import Any

import torch
from torch import Tensor

from dmd2_fast.dispatch import define
from dmd2_fast.ops._common import (
    EPSILON,
    SAMPLE,
    V_PREDICTION,
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
)
from dmd2_fast.random import NoiseKey


def _target(x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor | None, prediction_type: int) -> Tensor:
    if prediction_type == SAMPLE:
        return x0
    assert noise is not None
    if prediction_type == EPSILON:
        return noise
    if prediction_type == V_PREDICTION:
        return alpha * noise - sigma * x0
    return noise - x0


def denoising_loss_reference(
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
    """(loss (), sample_weight (prediction - target) (N, *)), both in the working dtype."""
    working = working_dtype(prediction)
    drawn = None if prediction_type == SAMPLE else draw(prediction, noise, seed, step, stream, sample_ids)
    coefficients = per_sample(alpha, prediction), per_sample(sigma, prediction)
    residual = prediction.to(working) - _target(x0.to(working), *coefficients, drawn, prediction_type)
    weighted = residual if sample_weight is None else per_sample(sample_weight, prediction) * residual
    return (weighted * residual).mean(), store(weighted, prediction, working)


def denoising_loss_backward_reference(grad: Tensor, residual: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * 2 / numel * residual, rounded once to dtype."""
    return store(residual * (grad * (2.0 / max(residual.numel(), 1))), residual, dtype)


def _fake(prediction: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    working = working_dtype(prediction)
    return prediction.new_empty((), dtype=working), torch.empty_like(prediction, dtype=working)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    grad_prediction = None if grad is None else _denoising_loss_backward(grad, *ctx.saved_tensors, ctx.dtype)
    return grad_prediction, *[None] * 10


_denoising_loss_backward = define(
    "denoising_loss_backward",
    "(Tensor grad, Tensor residual, ScalarType dtype) -> Tensor",
    reference=denoising_loss_backward_reference,
    fake=lambda grad, residual, dtype: torch.empty_like(residual, dtype=dtype),
)
_denoising_loss = define(
    "denoising_loss",
    "(Tensor prediction, Tensor x0, Tensor alpha, Tensor sigma, Tensor? noise, int prediction_type, SymInt seed, "
    "SymInt step, SymInt stream, Tensor? sample_ids, Tensor? sample_weight) -> (Tensor, Tensor)",
    reference=denoising_loss_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    check=check_ids_at(9),
)


def denoising_loss(
    prediction: Tensor,
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    noise: Tensor | None = None,
    *,
    prediction_type: str,
    key: NoiseKey | None = None,
    sample_ids: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """mean(sample_weight (prediction - target)^2), a scalar; differentiable in prediction alone (formulas above).

    prediction, x0: (N, *). alpha, sigma: (N,) f32. Either noise, of x0's shape, or key with sample_ids (N,) int64: the
    same as add_noise had; "sample" needs neither. sample_weight: (N,) f32. The loss is f32 (f64 for f64); of an empty
    batch it is NaN, like PyTorch's means. Raises ValueError naming the argument.
    """
    check_batch("prediction", prediction)
    check_like("x0", x0, "prediction", prediction)
    check_vector("alpha", alpha, prediction)
    check_vector("sigma", sigma, prediction)
    if sample_weight is not None:
        check_vector("sample_weight", sample_weight, prediction)
    code = check_prediction_type(prediction_type)
    given, seed, step, stream, ids = noise_arguments(
        noise, key, sample_ids, "prediction", prediction, required=code != SAMPLE
    )
    return _denoising_loss(prediction, x0, alpha, sigma, given, code, seed, step, stream, ids, sample_weight)[0]
