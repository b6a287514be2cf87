"""What people write today instead of the operators, from the published formulas and signatures: to compare with.

    dmd2_*      eager PyTorch in the manner of the original DMD2 code (arXiv 2405.14867): a DDPM table of alphas_cumprod
                gathered and cast, x0 in float64, a mean squared error to a detached target, noise from torch.randn_like
    fastgen_*   eager in the manner of FastGen: alpha(t) and sigma(t) in float64, conversions and noising in float64
    eager_*     where both write the same lines
    clean_*     eager with f32 arithmetic and nothing superfluous, on alpha and sigma like ours: for torch.compile

Shapes: images (N, *), timesteps (N,) int64 into alphas_cumprod (T,) f32, t the same as f64, alpha and sigma (N,) f32.
Predictions are of epsilon, as SD's and SDXL's. Functions that draw noise take a given one instead, for the tests.
Left out, because it hides divergence and costs them time: DMD2's nan_to_num of the gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _column(values: Tensor, like: Tensor) -> Tensor:
    """(N,) as (N, 1, ..., 1) of as many dimensions as `like`."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def _sample_mean(values: Tensor) -> Tensor:
    """The mean of each sample, (N, 1, ..., 1)."""
    return values.mean(dim=tuple(range(1, values.dim())), keepdim=True)


# --- DMD2 -------------------------------------------------------------------------------------------------------------


def dmd2_add_noise(x0: Tensor, alphas_cumprod: Tensor, timesteps: Tensor, noise: Tensor | None = None) -> Tensor:
    if noise is None:
        noise = torch.randn_like(x0)
    abar = alphas_cumprod.to(x0.dtype)[timesteps]
    return _column(abar.sqrt(), x0) * x0 + _column((1 - abar).sqrt(), x0) * noise


def _dmd2_x0_double(x_t: Tensor, prediction: Tensor, alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    abar = _column(alphas_cumprod.double()[timesteps], x_t)
    return (x_t.double() - (1 - abar).sqrt() * prediction.double()) / abar.sqrt()


def dmd2_predict_x0(x_t: Tensor, prediction: Tensor, alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    return _dmd2_x0_double(x_t, prediction, alphas_cumprod, timesteps).to(x_t.dtype)


def dmd2_renoise(
    x_t: Tensor,
    prediction: Tensor,
    alphas_cumprod: Tensor,
    timesteps: Tensor,
    next_timesteps: Tensor,
    noise: Tensor | None = None,
) -> Tensor:
    x0 = dmd2_predict_x0(x_t, prediction, alphas_cumprod, timesteps)
    return dmd2_add_noise(x0, alphas_cumprod, next_timesteps, noise)


def dmd2_dmd_loss(
    x: Tensor,
    x_t: Tensor,
    fake_prediction: Tensor,
    teacher_prediction: Tensor,
    teacher_uncond_prediction: Tensor | None,
    guidance_scale: float,
    alphas_cumprod: Tensor,
    timesteps: Tensor,
) -> Tensor:
    with torch.no_grad():
        if teacher_uncond_prediction is not None:
            guided = teacher_prediction - teacher_uncond_prediction
            teacher_prediction = teacher_uncond_prediction + guidance_scale * guided
        p_real = x - _dmd2_x0_double(x_t, teacher_prediction, alphas_cumprod, timesteps)
        p_fake = x - _dmd2_x0_double(x_t, fake_prediction, alphas_cumprod, timesteps)
        grad = (p_real - p_fake) / _sample_mean(p_real.abs())
    return 0.5 * F.mse_loss(x.float(), (x - grad).detach().float())


def dmd2_denoising_loss(prediction: Tensor, noise: Tensor) -> Tensor:
    return (prediction.float() - noise.float()).square().mean()


# --- FastGen ----------------------------------------------------------------------------------------------------------


class FastGenSchedule:
    """alpha(t) and sigma(t) in float64 and the conversions that use them, for a DDPM table (T,) of alphas_cumprod."""

    def __init__(self, alphas_cumprod: Tensor):
        self.abar = alphas_cumprod.double()

    def alpha(self, t: Tensor) -> Tensor:
        return self.abar[t.long()].sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self.abar[t.long()]).sqrt()

    def forward_process(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = _column(self.alpha(t), x), _column(self.sigma(t), x)
        return (alpha * x.double() + sigma * eps.double()).to(x.dtype)

    def eps_to_x0(self, x_t: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = _column(self.alpha(t), x_t), _column(self.sigma(t), x_t)
        return ((x_t.double() - sigma * eps.double()) / alpha).to(x_t.dtype)


def fastgen_add_noise(x0: Tensor, schedule: FastGenSchedule, t: Tensor, noise: Tensor | None = None) -> Tensor:
    return schedule.forward_process(x0, torch.randn_like(x0) if noise is None else noise, t)


def fastgen_renoise(
    x_t: Tensor,
    prediction: Tensor,
    schedule: FastGenSchedule,
    t: Tensor,
    next_t: Tensor,
    noise: Tensor | None = None,
) -> Tensor:
    return fastgen_add_noise(schedule.eps_to_x0(x_t, prediction, t), schedule, next_t, noise)


def fastgen_dmd_loss(
    x: Tensor,
    x_t: Tensor,
    fake_prediction: Tensor,
    teacher_prediction: Tensor,
    teacher_uncond_prediction: Tensor | None,
    guidance_scale: float,
    schedule: FastGenSchedule,
    t: Tensor,
) -> Tensor:
    """Guidance on the teacher's x0, then the variational score distillation loss."""
    with torch.no_grad():
        fake = schedule.eps_to_x0(x_t, fake_prediction, t)
        teacher = schedule.eps_to_x0(x_t, teacher_prediction, t)
        if teacher_uncond_prediction is not None:
            uncond = schedule.eps_to_x0(x_t, teacher_uncond_prediction, t)
            teacher = uncond + guidance_scale * (teacher - uncond)
        weight = 1 / (_sample_mean((x.float() - teacher.float()).abs()) + 1e-6)
        target = x - (fake - teacher) * weight.to(x.dtype)
    return 0.5 * F.mse_loss(x, target)


def fastgen_denoising_loss(prediction: Tensor, noise: Tensor) -> Tensor:
    return F.mse_loss(prediction, noise)


# --- both -------------------------------------------------------------------------------------------------------------


def eager_gan_generator_loss(logits: Tensor) -> Tensor:
    return F.softplus(-logits).mean()


def eager_gan_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    return F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()


def eager_gan_head_loss(
    features: Tensor, norm_weight: Tensor, norm_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor, num_groups: int
) -> Tensor:
    """The last layers of a head on (N, C) features and softplus(logit): a 1 x 1 convolution, as the heads have it."""
    activation = F.silu(F.group_norm(features[:, :, None, None], num_groups, norm_weight, norm_bias))
    return F.softplus(F.conv2d(activation, proj_weight[:, :, None, None], proj_bias)).mean()


def eager_r1_perturb(x_t: Tensor, std: float, noise: Tensor | None = None) -> Tensor:
    """The original DMD2 has no R1; these are the lines of FastGen's perturbation, here at x_t."""
    return torch.cat([x_t, x_t + std * (torch.randn_like(x_t) if noise is None else noise)])


def eager_r1_penalty(logits: Tensor, perturbed_logits: Tensor, std: float) -> Tensor:
    return ((perturbed_logits - logits) / std).square().mean()


def eager_group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int) -> Tensor:
    return F.silu(F.group_norm(x, num_groups, weight, bias))


# --- clean f32, for torch.compile -------------------------------------------------------------------------------------


def _noise_for(x: Tensor, noise: Tensor | None) -> Tensor:
    return torch.randn_like(x, dtype=torch.float32) if noise is None else noise.float()


def clean_normal(like: Tensor) -> Tensor:
    return torch.randn_like(like)


def clean_uniform(like: Tensor) -> Tensor:
    return torch.rand_like(like)


def clean_add_noise(x0: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor | None = None) -> Tensor:
    return (_column(alpha, x0) * x0.float() + _column(sigma, x0) * _noise_for(x0, noise)).to(x0.dtype)


def _clean_x0(x_t: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return (x_t.float() - _column(sigma, x_t) * prediction.float()) / _column(alpha, x_t)


def clean_predict_x0(x_t: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return _clean_x0(x_t, prediction, alpha, sigma).to(x_t.dtype)


def clean_renoise(
    x_t: Tensor,
    prediction: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    next_alpha: Tensor,
    next_sigma: Tensor,
    noise: Tensor | None = None,
) -> Tensor:
    x0 = _clean_x0(x_t, prediction, alpha, sigma)
    return (_column(next_alpha, x_t) * x0 + _column(next_sigma, x_t) * _noise_for(x_t, noise)).to(x_t.dtype)


def clean_dmd_loss(
    x: Tensor,
    x_t: Tensor,
    fake_prediction: Tensor,
    teacher_prediction: Tensor,
    teacher_uncond_prediction: Tensor | None,
    guidance_scale: float,
    alpha: Tensor,
    sigma: Tensor,
    eps: float = 1e-6,
) -> Tensor:
    with torch.no_grad():
        teacher = teacher_prediction.float()
        if teacher_uncond_prediction is not None:
            uncond = teacher_uncond_prediction.float()
            teacher = uncond + guidance_scale * (teacher - uncond)
        teacher_x0 = _clean_x0(x_t, teacher, alpha, sigma)
        fake_x0 = _clean_x0(x_t, fake_prediction, alpha, sigma)
        grad = (fake_x0 - teacher_x0) / (_sample_mean((x.float() - teacher_x0).abs()) + eps)
        target = x.float() - grad
    return 0.5 * F.mse_loss(x.float(), target)


def clean_denoising_loss(prediction: Tensor, noise: Tensor) -> Tensor:
    return F.mse_loss(prediction.float(), noise.float())


def clean_gan_head_loss(
    features: Tensor, norm_weight: Tensor, norm_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor, num_groups: int
) -> Tensor:
    normalised = F.group_norm(features.float(), num_groups, norm_weight.float(), norm_bias.float())
    return F.softplus(F.linear(F.silu(normalised), proj_weight.float(), proj_bias.float())).mean()


def clean_r1_perturb(x_t: Tensor, std: float, noise: Tensor | None = None) -> Tensor:
    return torch.cat([x_t, (x_t.float() + std * _noise_for(x_t, noise)).to(x_t.dtype)])


def clean_group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int) -> Tensor:
    """Unlike eager's, unrounded between normalisation and SiLU."""
    return eager_group_norm_silu(x.float(), weight.float(), bias.float(), num_groups).to(x.dtype)
