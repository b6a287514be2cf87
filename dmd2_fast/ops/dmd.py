"""The distribution matching loss of DMD2 (arXiv 2405.14867, section 3), normalised as in DMD (arXiv 2311.18828).

    T  = uncond + guidance_scale (teacher - uncond)      the guided teacher, in prediction space
    m  = mean|x - T_x0| + eps                            per sample
    G  = h (F_x0 - T_x0) / m                             F the fake score, h the sample weight
    loss = 0.5 mean(G^2), with d loss / d x = G / x.numel() by definition

x_t cancels from F_x0 - T_x0 = c (F - T) with c = -sigma / alpha (epsilon), 1 (sample), -sigma / (alpha^2 + sigma^2)
(v_prediction), -sigma / (alpha + sigma) (flow). The difference is the fragile quantity: it is taken in f32 (f64 for
f64), where nothing cancels, and kept for the backward pass in x's dtype: forward and backward together then move each
tensor once, at the price of a second rounding where the gradient is scaled.

Shapes: x, x_t and predictions (N, *), coefficients and weights (N,) f32. The loss is f32 (f64 for f64), the gradient
has x's dtype. Non-finite values surface. Errors: ValueError by argument.
"""

from typing import Any

import torch
from torch import Tensor

from dmd2_fast.dispatch import define
from dmd2_fast.ops._common import (
    check_batch,
    check_like,
    check_prediction_type,
    check_vector,
    per_sample,
    store,
    working_dtype,
    x0_from,
)


def dmd_loss_reference(
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
    """(loss (), F_x0 - T_x0 (N, *) in x's dtype, h / m (N,)), loss and h / m in the working dtype."""
    working = working_dtype(x)
    alpha, sigma = per_sample(alpha, x), per_sample(sigma, x)
    fake, teacher = fake_prediction.to(working), teacher_prediction.to(working)
    if teacher_uncond_prediction is not None:
        uncond = teacher_uncond_prediction.to(working)
        teacher = uncond + guidance_scale * (teacher - uncond)
    teacher_x0 = x0_from(x_t.to(working), teacher, alpha, sigma, prediction_type)
    distance = (x.to(working) - teacher_x0).abs()
    if x.dim() > 1:
        distance = distance.flatten(1).mean(1)
    scale = 1.0 / (distance + eps)
    if sample_weight is not None:
        scale = sample_weight.to(working) * scale
    zero = torch.zeros((), dtype=working, device=x.device)
    difference = x0_from(zero, fake - teacher, alpha, sigma, prediction_type)
    loss = 0.5 * (difference * per_sample(scale, x)).square().mean()
    return loss, store(difference, x), scale


def dmd_loss_backward_reference(grad: Tensor, difference: Tensor, scale: Tensor) -> Tensor:
    """grad * G / numel (N, *)."""
    factor = per_sample(scale, difference) * (grad / max(difference.numel(), 1))
    return store(difference.to(working_dtype(difference)) * factor, difference)


def _fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    working = working_dtype(x)
    return (
        x.new_empty((), dtype=working),
        torch.empty_like(x),
        x.new_empty((x.shape[0],), dtype=working),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, difference, scale = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(difference, scale)
    ctx.save_for_backward(difference, scale)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    grad_x = None if grad is None else _dmd_loss_backward(grad, *ctx.saved_tensors)
    return grad_x, *[None] * 10


_dmd_loss_backward = define(
    "dmd_loss_backward",
    "(Tensor grad, Tensor difference, Tensor scale) -> Tensor",
    reference=dmd_loss_backward_reference,
    fake=lambda grad, difference, scale: torch.empty_like(difference),
)
_dmd_loss = define(
    "dmd_loss",
    "(Tensor x, Tensor x_t, Tensor fake_prediction, Tensor teacher_prediction, Tensor? teacher_uncond_prediction, "
    "Tensor alpha, Tensor sigma, int prediction_type, float guidance_scale, Tensor? sample_weight, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    reference=dmd_loss_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def dmd_loss(
    x: Tensor,
    x_t: Tensor,
    fake_prediction: Tensor,
    teacher_prediction: Tensor,
    teacher_uncond_prediction: Tensor | None = None,
    *,
    alpha: Tensor,
    sigma: Tensor,
    prediction_type: str,
    guidance_scale: float = 1.0,
    sample_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """The distribution matching loss, a scalar; its gradient goes to x alone and is G / x.numel() (formulas above).

    x: (N, *) the generator's samples. x_t: x after noise injection with alpha and sigma, (N,) f32 each; both networks'
    predictions on it, of x's shape. teacher_uncond_prediction and guidance_scale: classifier-free guidance of the
    teacher, both or neither. sample_weight: (N,) f32, the h of f-distill. The loss is f32 (f64 for f64); of an empty
    batch it is NaN, like PyTorch's means. Raises ValueError naming the argument.
    """
    check_batch("x", x)
    check_like("x_t", x_t, "x", x)
    check_like("fake_prediction", fake_prediction, "x", x)
    check_like("teacher_prediction", teacher_prediction, "x", x)
    if teacher_uncond_prediction is not None:
        check_like("teacher_uncond_prediction", teacher_uncond_prediction, "x", x)
    elif guidance_scale != 1.0:
        raise ValueError(
            f"guidance_scale: got {guidance_scale} without teacher_uncond_prediction, expected 1.0 or both"
        )
    check_vector("alpha", alpha, x)
    check_vector("sigma", sigma, x)
    if sample_weight is not None:
        check_vector("sample_weight", sample_weight, x)
    return _dmd_loss(
        x,
        x_t,
        fake_prediction,
        teacher_prediction,
        teacher_uncond_prediction,
        alpha,
        sigma,
        check_prediction_type(prediction_type),
        float(guidance_scale),
        sample_weight,
        float(eps),
    )[0]
