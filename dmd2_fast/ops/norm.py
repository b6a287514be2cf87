"""Group normalisation (Wu and He, arXiv 1803.08494) followed by SiLU.

    z = (x - mean) / sqrt(var + eps) * weight + bias
    y = z sigmoid(z)

mean and var (biased) are over each sample's group of C / num_groups channels and all positions, in two passes:
E[x^2] - E[x]^2 loses everything at a large mean.

Shapes: x (N, C, *) of any memory format, weight and bias (C,). Statistics and arithmetic are f32 (f64 for f64); y has
x's dtype and memory format, gradients those of what they belong to. Errors: ValueError by argument.
"""

from typing import Any

import torch
from torch import Tensor

from dmd2_fast.dispatch import define
from dmd2_fast.ops._common import check_groups, check_parameter, check_tensor, store, working_dtype


def grouped(x: Tensor, num_groups: int) -> Tensor:
    """(N, C, *) as (N, num_groups, C / num_groups, *), a view whatever the strides."""
    return x.unflatten(1, (num_groups, x.shape[1] // num_groups))


def channels(parameter: Tensor, x: Tensor, num_groups: int) -> Tensor:
    """A parameter (C,) as (G, C / G, 1, ...), in x's working dtype, to go with grouped(x)."""
    shape = (num_groups, x.shape[1] // num_groups, *[1] * (x.dim() - 2))
    return parameter.to(working_dtype(x)).reshape(shape)


def statistics(groups: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(mean, 1 / sqrt(var + eps)) of (N, G, C / G, *), each (N, G, 1, ...)."""
    dims = tuple(range(2, groups.dim()))
    mean = groups.mean(dims, keepdim=True)
    return mean, ((groups - mean).square().mean(dims, keepdim=True) + eps).rsqrt()


def silu_slope(z: Tensor) -> Tensor:
    """d silu(z) / dz."""
    gate = z.sigmoid()
    return gate * (1.0 + z * (1.0 - gate))


def normalise_backward(grad_z: Tensor, normalised: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """The gradient in (N, G, C / G, *) groups of z = normalised * weight + bias, through mean and variance."""
    dims = tuple(range(2, grad_z.dim()))
    grad = grad_z * weight
    projected = normalised * (grad * normalised).mean(dims, keepdim=True)
    return rstd * (grad - grad.mean(dims, keepdim=True) - projected)


def group_norm_silu_reference(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y (N, C, *), mean (N, G), 1 / standard deviation (N, G)), the last two in the working dtype."""
    groups = grouped(x.to(working_dtype(x)), num_groups)
    mean, rstd = statistics(groups, eps)
    z = (groups - mean) * rstd * channels(weight, x, num_groups) + channels(bias, x, num_groups)
    shape = (x.shape[0], num_groups)
    return store((z * z.sigmoid()).flatten(1, 2), x), mean.reshape(shape), rstd.reshape(shape)


def group_norm_silu_backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in x, weight and bias."""
    working, num_groups = working_dtype(x), mean.shape[1]
    groups = grouped(x.to(working), num_groups)
    shape = (*mean.shape, *[1] * (groups.dim() - 2))
    rstd = rstd.reshape(shape)
    normalised = (groups - mean.reshape(shape)) * rstd
    scale = channels(weight, x, num_groups)
    grad_z = grouped(grad.to(working), num_groups) * silu_slope(normalised * scale + channels(bias, x, num_groups))
    grad_x = normalise_backward(grad_z, normalised, rstd, scale)
    dims = (0, *range(3, groups.dim()))
    grad_weight, grad_bias = (grad_z * normalised).sum(dims), grad_z.sum(dims)
    return (
        store(grad_x.flatten(1, 2), x),
        store(grad_weight.flatten(), weight),
        store(grad_bias.flatten(), bias),
    )


def _fake(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    statistic = x.new_empty((x.shape[0], num_groups), dtype=working_dtype(x))
    return torch.empty_like(x), statistic, torch.empty_like(statistic)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _, _ = inputs
    _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, mean, rstd)


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    return *_group_norm_silu_backward(grad, *ctx.saved_tensors), None, None


_group_norm_silu_backward = define(
    "group_norm_silu_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)",
    reference=group_norm_silu_backward_reference,
    fake=lambda grad, x, weight, bias, mean, rstd: tuple(map(torch.empty_like, (x, weight, bias))),
)
_group_norm_silu = define(
    "group_norm_silu",
    "(Tensor x, Tensor weight, Tensor bias, int num_groups, float eps) -> (Tensor, Tensor, Tensor)",
    reference=group_norm_silu_reference,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float = 1e-5) -> Tensor:
    """silu(group_norm(x)): (N, C, *) in x's dtype and memory format; differentiable in x, weight and bias.

    x: (N, C, *) f16, bf16, f32 or f64. weight, bias: (C,), each of any of the first three dtypes (f64 beside f64).
    num_groups divides C. Raises ValueError naming the argument.
    """
    check_tensor("x", x)
    if x.dim() < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (N, C, ...)")
    check_groups(num_groups, x.shape[1])
    check_parameter("weight", weight, x, x.shape[1])
    check_parameter("bias", bias, x, x.shape[1])
    return _group_norm_silu(x, weight, bias, num_groups, float(eps))[0]
