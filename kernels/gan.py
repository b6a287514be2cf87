"""The adversarial losses and the tail of the GAN head in Triton: f32 inside, rounded once at the store.

Tensors are tiny here and launches are the cost: every operator is one launch. No atomics in gradients, and losses are
added up in a fixed order: the same bits every time.

Legend: N batch, C channels, G groups, K = C / G channels a group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._fold import counter, fold
from ._launch import IS_COMPILED, laid_out_like, launch
from ._precise import over, sigmoid, softplus
from ._store import rounded

# Logits a program of the losses, with 4 warps.
_LOGITS = 1024
# Elements a program of the head holds at once, and a thread of them, the head's three sums beside.
_HEAD = 4096
_HEAD_PER_THREAD = 16


@triton.jit
def _mean_softplus_kernel(
    real_ptr,  # (num_real,)
    fake_ptr,  # (num_fake,) or None
    loss_ptr,  # () f32: mean softplus(-real) + mean softplus(fake)
    sums_ptr,  # (number of programs,) f32
    counter_ptr,  # () int32
    num_real,
    num_fake,
    BLOCK: tl.constexpr,
):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < num_real
    real = tl.load(real_ptr + element, mask=mask, other=0.0).to(tl.float32)
    loss = over(tl.sum(tl.where(mask, softplus(-real), 0.0), 0), num_real)
    if fake_ptr is not None:
        mask = element < num_fake
        fake = tl.load(fake_ptr + element, mask=mask, other=0.0).to(tl.float32)
        loss += over(tl.sum(tl.where(mask, softplus(fake), 0.0), 0), num_fake)
    fold(loss, loss_ptr, sums_ptr, counter_ptr)


@triton.jit
def _mean_softplus_backward_kernel(
    grad_ptr,  # ()
    real_ptr,  # (num_real,)
    fake_ptr,  # (num_fake,) or None
    grad_real_ptr,  # (num_real,)
    grad_fake_ptr,  # (num_fake,) or None
    num_real,
    num_fake,
    FAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    grad = tl.load(grad_ptr).to(tl.float32)
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = tl.load(real_ptr + element, mask=element < num_real).to(tl.float32)
    slope = -sigmoid(-real) * over(grad, num_real)
    tl.store(grad_real_ptr + element, rounded(slope, grad_real_ptr.dtype.element_ty, FAST), mask=element < num_real)
    if fake_ptr is not None:
        fake = tl.load(fake_ptr + element, mask=element < num_fake).to(tl.float32)
        slope = sigmoid(fake) * over(grad, num_fake)
        tl.store(grad_fake_ptr + element, rounded(slope, grad_fake_ptr.dtype.element_ty, FAST), mask=element < num_fake)


def _mean_softplus(real: Tensor, fake: Tensor | None) -> Tensor:
    num_real, num_fake = real.numel(), 1 if fake is None else fake.numel()
    if num_real == 0 or num_fake == 0:
        return torch.full((), torch.nan, dtype=torch.float32, device=real.device)
    loss = torch.empty((), dtype=torch.float32, device=real.device)
    num_programs = triton.cdiv(max(num_real, num_fake), _LOGITS)
    launch(
        _mean_softplus_kernel,
        num_programs,
        real,
        laid_out_like(real, torch.empty_like(real)),
        None if fake is None else laid_out_like(fake, torch.empty_like(fake)),
        loss,
        torch.empty(num_programs, dtype=torch.float32, device=real.device),
        counter(real),
        num_real,
        num_fake,
        BLOCK=_LOGITS,
    )
    return loss


def _mean_softplus_backward(grad: Tensor, real: Tensor, fake: Tensor | None) -> tuple[Tensor, Tensor | None]:
    grad_real = torch.empty_like(real)
    grad_fake = None if fake is None else torch.empty_like(fake)
    num_real, num_fake = real.numel(), 1 if fake is None else fake.numel()
    if max(real.numel(), 0 if fake is None else fake.numel()):
        launch(
            _mean_softplus_backward_kernel,
            triton.cdiv(max(num_real, num_fake), _LOGITS),
            real,
            grad,
            laid_out_like(real, grad_real),
            None if fake is None or grad_fake is None else laid_out_like(fake, grad_fake),
            grad_real,
            grad_fake,
            num_real,
            num_fake,
            FAST=IS_COMPILED,
            BLOCK=_LOGITS,
        )
    return grad_real, grad_fake


def gan_generator_loss(logits: Tensor) -> Tensor:
    """mean softplus(-logits), () f32; logits of any shape, strides and dtype."""
    return _mean_softplus(logits, None)


def gan_generator_loss_backward(grad: Tensor, logits: Tensor) -> Tensor:
    """The gradient like logits."""
    return _mean_softplus_backward(grad, logits, None)[0]


def gan_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """mean softplus(fake_logits) + mean softplus(-real_logits), () f32; each of any shape, strides and dtype."""
    return _mean_softplus(real_logits, fake_logits)


def gan_discriminator_loss_backward(grad: Tensor, real_logits: Tensor, fake_logits: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients like real_logits and fake_logits."""
    grad_real, grad_fake = _mean_softplus_backward(grad, real_logits, fake_logits)
    assert grad_fake is not None
    return grad_real, grad_fake


@triton.jit
def _head_forward_kernel(
    features_ptr,  # (N, C)
    norm_weight_ptr,  # (C,)
    norm_bias_ptr,  # (C,)
    proj_weight_ptr,  # (C,)
    proj_bias_ptr,  # (1,)
    loss_ptr,  # () f32
    logits_ptr,  # (N,)
    slope_ptr,  # (N,) f32
    mean_ptr,  # (N, G) f32
    rstd_ptr,  # (N, G) f32
    losses_ptr,  # (N,) f32
    counter_ptr,  # () int32
    num_samples,  # N, the number of programs
    num_groups,  # G
    stride_sample,
    stride_channel,
    sign,  # 1.0 or -1.0
    eps,
    GROUP_CHANNELS: tl.constexpr,  # K
    FAST: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)[None, :]
    products = tl.zeros((BLOCK_G, BLOCK_K), tl.float32)
    for first in range(0, num_groups, BLOCK_G):
        group = first + tl.arange(0, BLOCK_G)[:, None]
        mask = (group < num_groups) & (k < GROUP_CHANNELS)
        channel = group * GROUP_CHANNELS + k
        pointer = features_ptr + sample * stride_sample + tl.cast(channel, tl.int64) * stride_channel
        x = tl.load(pointer, mask=mask, other=0.0).to(tl.float32)
        norm_weight = tl.load(norm_weight_ptr + channel, mask=mask, other=0.0).to(tl.float32)
        norm_bias = tl.load(norm_bias_ptr + channel, mask=mask, other=0.0).to(tl.float32)
        proj_weight = tl.load(proj_weight_ptr + channel, mask=mask, other=0.0).to(tl.float32)
        mean = over(tl.sum(x, 1, keep_dims=True), GROUP_CHANNELS)
        difference = tl.where(mask, x - mean, 0.0)
        # The rounding of the mean is the same for all channels of the group, and would add up in the logit.
        difference -= tl.where(mask, over(tl.sum(difference, 1, keep_dims=True), GROUP_CHANNELS), 0.0)
        variance = over(tl.sum(difference * difference, 1, keep_dims=True), GROUP_CHANNELS)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
        z = tl.fma(difference * rstd, norm_weight, norm_bias)
        products += tl.where(mask, z * sigmoid(z) * proj_weight, 0.0)
        statistic = sample * num_groups + group
        tl.store(mean_ptr + statistic, mean, mask=group < num_groups)
        tl.store(rstd_ptr + statistic, rstd, mask=group < num_groups)
    logit = tl.sum(tl.sum(products, 1), 0) + tl.load(proj_bias_ptr).to(tl.float32)
    tl.store(logits_ptr + sample, rounded(logit, logits_ptr.dtype.element_ty, FAST))
    tl.store(slope_ptr + sample, sign * sigmoid(sign * logit))
    fold(over(softplus(sign * logit), num_samples), loss_ptr, losses_ptr, counter_ptr)


@triton.jit
def _head_backward_kernel(
    grad_loss_ptr,  # () or None
    grad_logits_ptr,  # (N,) or None
    features_ptr,  # (N, C)
    norm_weight_ptr,  # (C,)
    norm_bias_ptr,  # (C,)
    proj_weight_ptr,  # (C,)
    slope_ptr,  # (N,) f32
    mean_ptr,  # (N, G) f32
    rstd_ptr,  # (N, G) f32
    grad_features_ptr,  # (N, C)
    grad_norm_weight_ptr,  # (C,)
    grad_norm_bias_ptr,  # (C,)
    grad_proj_weight_ptr,  # (C,)
    grad_proj_bias_ptr,  # (1,)
    num_samples,  # N
    num_groups,  # G, the number of programs
    stride_grad,  # of grad_logits
    stride_sample,  # of features
    stride_channel,
    grad_stride_sample,  # of grad_features
    grad_stride_channel,
    GROUP_CHANNELS: tl.constexpr,  # K
    FAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    group = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)[None, :]
    channel = group * GROUP_CHANNELS + k
    in_group = k < GROUP_CHANNELS
    norm_weight = tl.load(norm_weight_ptr + channel, mask=in_group, other=0.0).to(tl.float32)
    norm_bias = tl.load(norm_bias_ptr + channel, mask=in_group, other=0.0).to(tl.float32)
    proj_weight = tl.load(proj_weight_ptr + channel, mask=in_group, other=0.0).to(tl.float32)
    sums_weight = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    sums_bias = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    sums_proj = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    sums_logit = tl.zeros((BLOCK_N, 1), tl.float32)
    for first in range(0, num_samples, BLOCK_N):
        sample = tl.cast(first + tl.arange(0, BLOCK_N)[:, None], tl.int64)
        in_batch = sample < num_samples
        mask = in_batch & in_group
        grad_logit = tl.zeros((BLOCK_N, 1), tl.float32)
        if grad_logits_ptr is not None:
            grad_logit += tl.load(grad_logits_ptr + sample * stride_grad, mask=in_batch, other=0.0).to(tl.float32)
        if grad_loss_ptr is not None:
            scale = over(tl.load(grad_loss_ptr).to(tl.float32), num_samples)
            grad_logit += tl.load(slope_ptr + sample, mask=in_batch, other=0.0) * scale
        x = tl.load(
            features_ptr + sample * stride_sample + tl.cast(channel, tl.int64) * stride_channel, mask=mask, other=0.0
        ).to(tl.float32)
        mean = tl.load(mean_ptr + sample * num_groups + group, mask=in_batch, other=0.0)
        rstd = tl.load(rstd_ptr + sample * num_groups + group, mask=in_batch, other=0.0)
        difference = tl.where(mask, x - mean, 0.0)
        difference -= tl.where(mask, over(tl.sum(difference, 1, keep_dims=True), GROUP_CHANNELS), 0.0)  # as forward
        normalised = difference * rstd
        z = tl.fma(normalised, norm_weight, norm_bias)
        gate = sigmoid(z)
        grad_z = grad_logit * proj_weight * (gate * tl.fma(z, 1.0 - gate, 1.0))
        sums_weight = tl.fma(grad_z, normalised, sums_weight)
        sums_bias += grad_z
        sums_proj = tl.fma(grad_logit, z * gate, sums_proj)
        sums_logit += grad_logit
        grad = grad_z * norm_weight
        constant = over(tl.sum(grad, 1, keep_dims=True), GROUP_CHANNELS)
        slope = over(tl.sum(grad * normalised, 1, keep_dims=True), GROUP_CHANNELS)
        grad_x = rstd * (grad - constant - normalised * slope)
        pointer = grad_features_ptr + sample * grad_stride_sample + tl.cast(channel, tl.int64) * grad_stride_channel
        tl.store(pointer, rounded(grad_x, grad_features_ptr.dtype.element_ty, FAST), mask=mask)
    for_weight = tl.sum(sums_weight, 0, keep_dims=True)
    tl.store(grad_norm_weight_ptr + channel, rounded(for_weight, grad_norm_weight_ptr.dtype.element_ty, FAST), in_group)
    for_bias = tl.sum(sums_bias, 0, keep_dims=True)
    tl.store(grad_norm_bias_ptr + channel, rounded(for_bias, grad_norm_bias_ptr.dtype.element_ty, FAST), in_group)
    for_proj = tl.sum(sums_proj, 0, keep_dims=True)
    tl.store(grad_proj_weight_ptr + channel, rounded(for_proj, grad_proj_weight_ptr.dtype.element_ty, FAST), in_group)
    if group == 0:
        for_offset = tl.sum(tl.sum(sums_logit, 1), 0)
        tl.store(grad_proj_bias_ptr, rounded(for_offset, grad_proj_bias_ptr.dtype.element_ty, FAST))


def gan_head_loss(
    features: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    num_groups: int,
    sign: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss (), logits (N, 1) in the features' dtype, slope (N, 1), mean (N, G), rstd (N, G)), f32 but the logits.

    features (N, C) of any strides, norm_weight, norm_bias and proj_weight (C,), proj_bias (1,), each f32, bf16 or f16.
    Arguments are checked by `dmd2_fast.gan_head_loss`.
    """
    num_samples, num_channels = features.shape
    f32 = {"dtype": torch.float32, "device": features.device}
    loss = torch.empty((), **f32) if num_samples else torch.full((), torch.nan, **f32)
    logits, slope = features.new_empty((num_samples, 1)), torch.empty((num_samples, 1), **f32)
    mean, rstd = torch.empty((num_samples, num_groups), **f32), torch.empty((num_samples, num_groups), **f32)
    if num_samples:
        block_k = triton.next_power_of_2(num_channels // num_groups)
        block_g = max(1, min(triton.next_power_of_2(num_groups), _HEAD // block_k))
        launch(
            _head_forward_kernel,
            num_samples,
            features,
            features,
            norm_weight.contiguous(),
            norm_bias.contiguous(),
            proj_weight.contiguous(),
            proj_bias,
            loss,
            logits,
            slope,
            mean,
            rstd,
            torch.empty(num_samples, **f32),
            counter(features),
            num_samples,
            num_groups,
            *features.stride(),
            float(sign),
            eps,
            GROUP_CHANNELS=num_channels // num_groups,
            FAST=IS_COMPILED,
            BLOCK_G=block_g,
            BLOCK_K=block_k,
            num_warps=_num_warps(block_g * block_k),
        )
    return loss, logits, slope, mean, rstd


def gan_head_loss_backward(
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
    """Gradients like features and the four parameters; grad_loss () and grad_logits (N, 1), None for zero."""
    num_samples, num_groups = mean.shape
    group_channels = features.shape[1] // num_groups
    grads = [torch.empty_like(t) for t in (features, norm_weight, norm_bias, proj_weight, proj_bias)]
    block_k = triton.next_power_of_2(group_channels)
    block_n = max(1, min(triton.next_power_of_2(num_samples), _HEAD // block_k))
    launch(
        _head_backward_kernel,
        num_groups,
        features,
        grad_loss,
        grad_logits,
        features,
        norm_weight.contiguous(),
        norm_bias.contiguous(),
        proj_weight.contiguous(),
        slope,
        mean,
        rstd,
        *grads,
        num_samples,
        num_groups,
        0 if grad_logits is None else grad_logits.stride(0),
        *features.stride(),
        *grads[0].stride(),
        GROUP_CHANNELS=group_channels,
        FAST=IS_COMPILED,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=_num_warps(block_n * block_k),
    )
    grad_features, grad_norm_weight, grad_norm_bias, grad_proj_weight, grad_proj_bias = grads
    return grad_features, grad_norm_weight, grad_norm_bias, grad_proj_weight, grad_proj_bias


def _num_warps(block: int) -> int:
    return max(1, min(16, block // _HEAD_PER_THREAD // 32))
