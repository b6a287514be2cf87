"""The adversarial losses of DMD2 (arXiv 2405.14867, section 4.4), in softplus form, and the tail of its GAN head.

    gan_generator_loss       mean softplus(-D(fake))
    gan_discriminator_loss   mean softplus(D(fake)) + mean softplus(-D(real))
    gan_head_loss            logit = proj_weight . silu(group_norm(features)) + proj_bias;  mean softplus(sign logit)

Shapes: logits of any shape, features (N, C), logits of the head (N, 1). Arithmetic is f32 (f64 for f64); losses are f32
(f64 for f64), of nothing NaN like PyTorch's means; logits have the dtype of the features, gradients that of what they
belong to. The head's loss is taken from unrounded logits. Its forward pass keeps their slopes, sign sigmoid(sign
logit), so that backward can go by channels: a logit needs them all. Errors: ValueError by argument.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from dmd2_fast.dispatch import define
from dmd2_fast.ops._common import check_batch, check_groups, check_parameter, check_tensor, store, working_dtype
from dmd2_fast.ops.norm import channels, grouped, normalise_backward, silu_slope, statistics

# --- losses of logits -------------------------------------------------------------------------------------------------


def _mean_softplus(logits: Tensor, sign: float) -> Tensor:
    # threshold: softplus turns into the identity above it; 20 is exact to f32, not to f64.
    return softplus(sign * logits.to(working_dtype(logits)), threshold=50.0).mean()


def _mean_softplus_backward(grad: Tensor, logits: Tensor, sign: float) -> Tensor:
    slope = sign * torch.sigmoid(sign * logits.to(working_dtype(logits)))
    return store(slope * (grad / max(logits.numel(), 1)), logits)


def gan_generator_loss_reference(logits: Tensor) -> Tensor:
    """mean softplus(-logits), ()."""
    return _mean_softplus(logits, -1.0)


def gan_generator_loss_backward_reference(grad: Tensor, logits: Tensor) -> Tensor:
    """-grad sigmoid(-logits) / numel."""
    return _mean_softplus_backward(grad, logits, -1.0)


def gan_discriminator_loss_reference(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """mean softplus(fake_logits) + mean softplus(-real_logits), ()."""
    return _mean_softplus(fake_logits, 1.0) + _mean_softplus(real_logits, -1.0)


def gan_discriminator_loss_backward_reference(
    grad: Tensor, real_logits: Tensor, fake_logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients in real_logits and fake_logits."""
    return _mean_softplus_backward(grad, real_logits, -1.0), _mean_softplus_backward(grad, fake_logits, 1.0)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


_gan_generator_loss_backward = define(
    "gan_generator_loss_backward",
    "(Tensor grad, Tensor logits) -> Tensor",
    reference=gan_generator_loss_backward_reference,
    fake=lambda grad, logits: torch.empty_like(logits),
)
_gan_generator_loss = define(
    "gan_generator_loss",
    "(Tensor logits) -> Tensor",
    reference=gan_generator_loss_reference,
    fake=lambda logits: logits.new_empty((), dtype=working_dtype(logits)),
    setup_context=_save_inputs,
    backward=lambda ctx, grad: _gan_generator_loss_backward(grad, *ctx.saved_tensors),
)
_gan_discriminator_loss_backward = define(
    "gan_discriminator_loss_backward",
    "(Tensor grad, Tensor real_logits, Tensor fake_logits) -> (Tensor, Tensor)",
    reference=gan_discriminator_loss_backward_reference,
    fake=lambda grad, real_logits, fake_logits: (torch.empty_like(real_logits), torch.empty_like(fake_logits)),
)
_gan_discriminator_loss = define(
    "gan_discriminator_loss",
    "(Tensor real_logits, Tensor fake_logits) -> Tensor",
    reference=gan_discriminator_loss_reference,
    fake=lambda real_logits, fake_logits: real_logits.new_empty((), dtype=working_dtype(real_logits)),
    setup_context=_save_inputs,
    backward=lambda ctx, grad: _gan_discriminator_loss_backward(grad, *ctx.saved_tensors),
)


def gan_generator_loss(logits: Tensor) -> Tensor:
    """mean softplus(-logits), an f32 scalar (f64 for f64); differentiable in logits.

    logits: of any shape, the discriminator on the generator's samples. Raises ValueError for what is not a floating
    tensor.
    """
    check_tensor("logits", logits)
    return _gan_generator_loss(logits)


def gan_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """mean softplus(fake_logits) + mean softplus(-real_logits), an f32 scalar (f64 for f64); differentiable in both.

    Each of any shape; each mean is over its own elements. Raises ValueError for what is not a floating tensor, and for
    two devices or f64 beside another dtype.
    """
    check_tensor("real_logits", real_logits)
    check_tensor("fake_logits", fake_logits, real_logits)
    return _gan_discriminator_loss(real_logits, fake_logits)


# --- the head's tail --------------------------------------------------------------------------------------------------


def _project(activation: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(N, C) to (N, 1) in the activation's dtype: no matrix product, which autocast and TF32 would round."""
    return (activation * weight.to(activation.dtype).flatten()).sum(1, keepdim=True) + bias.to(activation.dtype)


def gan_head_loss_reference(
    features: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    num_groups: int,
    sign: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss (), logits (N, 1), slope (N, 1), mean (N, G), 1 / standard deviation (N, G)); proj_weight of any shape.

    All but the logits are in the working dtype.
    """
    working = working_dtype(features)
    groups = grouped(features.to(working), num_groups)
    mean, rstd = statistics(groups, eps)
    z = (groups - mean) * rstd * channels(norm_weight, features, num_groups)
    z = (z + channels(norm_bias, features, num_groups)).flatten(1)
    logits = _project(z * z.sigmoid(), proj_weight, proj_bias)
    out = features.new_empty((features.shape[0], 1)).copy_(logits)
    slope = sign * torch.sigmoid(sign * logits)
    return _mean_softplus(logits, float(sign)), out, slope, mean.flatten(1), rstd.flatten(1)


def gan_head_loss_backward_reference(
    grad_loss: Tensor | None,
    grad_logits: Tensor | None,
    features: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    slope: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients in features and the four parameters; a None gradient is zero."""
    working, num_groups = working_dtype(features), mean.shape[1]
    groups, rstd = grouped(features.to(working), num_groups), rstd[..., None]
    normalised = (groups - mean[..., None]) * rstd
    scale = channels(norm_weight, features, num_groups)
    z = (normalised * scale + channels(norm_bias, features, num_groups)).flatten(1)
    activation, projection = z * z.sigmoid(), proj_weight.to(working).flatten()
    grad_logit = torch.zeros((features.shape[0], 1), dtype=working, device=features.device)
    if grad_logits is not None:
        grad_logit = grad_logits.to(working)
    if grad_loss is not None:
        grad_logit = grad_logit + slope * (grad_loss / max(slope.numel(), 1))
    grad_z = grouped(grad_logit * projection * silu_slope(z), num_groups)
    return (
        store(normalise_backward(grad_z, normalised, rstd, scale).flatten(1), features),
        store((grad_z * normalised).sum(0).flatten(), norm_weight),
        store(grad_z.sum(0).flatten(), norm_bias),
        store((grad_logit * activation).sum(0).reshape(proj_weight.shape), proj_weight),
        store(grad_logit.sum(0), proj_bias),
    )


def _head_fake(features: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    num_samples, num_groups, working = features.shape[0], arguments[4], working_dtype(features)
    return (
        features.new_empty((), dtype=working),
        features.new_empty((num_samples, 1)),
        features.new_empty((num_samples, 1), dtype=working),
        features.new_empty((num_samples, num_groups), dtype=working),
        features.new_empty((num_samples, num_groups), dtype=working),
    )


def _head_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, slope, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(slope, mean, rstd)
    ctx.save_for_backward(*inputs[:5], slope, mean, rstd)


def _head_backward(ctx: Any, grad_loss: Tensor | None, grad_logits: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_loss is None and grad_logits is None:
        return (None,) * 8
    return *_gan_head_loss_backward(grad_loss, grad_logits, *ctx.saved_tensors), None, None, None


_gan_head_loss_backward = define(
    "gan_head_loss_backward",
    "(Tensor? grad_loss, Tensor? grad_logits, Tensor features, Tensor norm_weight, Tensor norm_bias, "
    "Tensor proj_weight, Tensor proj_bias, Tensor slope, Tensor mean, Tensor rstd) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=gan_head_loss_backward_reference,
    fake=lambda grad_loss, grad_logits, *tensors: tuple(map(torch.empty_like, tensors[:5])),
)
_gan_head_loss = define(
    "gan_head_loss",
    "(Tensor features, Tensor norm_weight, Tensor norm_bias, Tensor proj_weight, Tensor proj_bias, int num_groups, "
    "int sign, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=gan_head_loss_reference,
    fake=_head_fake,
    setup_context=_head_setup_context,
    backward=_head_backward,
)


def gan_head_loss(
    features: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    num_groups: int,
    *,
    sign: int,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """(loss, logits): GroupNorm, SiLU, projection and mean softplus(sign logit); all gradients, through both outputs.

    features: (N, C). norm_weight, norm_bias: (C,). proj_weight: C elements as (C,), (1, C) or (1, C, 1, 1), as Linear
    and Conv2d have it. proj_bias: (1,). num_groups divides C. sign: 1 for softplus(logit) (fake samples of the
    discriminator), -1 for softplus(-logit) (its real samples; the generator). loss: f32 scalar (f64 for f64). logits:
    (N, 1) in the dtype of the features. Raises ValueError naming the argument.
    """
    check_batch("features", features)
    if features.dim() != 2:
        raise ValueError(f"features: got shape {tuple(features.shape)}, expected (N, C)")
    num_channels = features.shape[1]
    check_groups(num_groups, num_channels)
    check_parameter("norm_weight", norm_weight, features, num_channels)
    check_parameter("norm_bias", norm_bias, features, num_channels)
    check_tensor("proj_weight", proj_weight, features)
    if proj_weight.shape not in ((num_channels,), (1, num_channels), (1, num_channels, 1, 1)):
        expected = f"({num_channels},), (1, {num_channels}) or (1, {num_channels}, 1, 1)"
        raise ValueError(f"proj_weight: got shape {tuple(proj_weight.shape)}, expected {expected}")
    check_parameter("proj_bias", proj_bias, features, 1)
    if sign not in (1, -1):
        raise ValueError(f"sign: got {sign!r}, expected 1 or -1")
    loss, logits, _, _, _ = _gan_head_loss(
        features, norm_weight, norm_bias, proj_weight, proj_bias, num_groups, int(sign), float(eps)
    )
    return loss, logits
