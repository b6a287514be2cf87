"""The operators under the conventions of the original DMD2 trainers: `alphas_cumprod` and integer timesteps.

    get_x0_from_noise            x0 = (x_t - sigma p) / alpha
    add_noise                    x_t = alpha x0 + sigma eps
    distribution_matching_loss   the DMD loss and its gradient, from predicted noises and a guidance scale
    gen_cls_loss                 mean softplus(-D(fake))
    guidance_cls_loss            mean softplus(D(fake)) + mean softplus(-D(real))

with alpha = sqrt(alphas_cumprod[t]), sigma = sqrt(1 - alphas_cumprod[t]). Formulas: DMD2 (arXiv 2405.14867),
sections 3, 4.2 and 4.4.

Tensors are (N, ...) f16, bf16, f32 or f64; the table is (T,) f32 or f64, as a scheduler's `alphas_cumprod` is, on the
tensors' device; timesteps (N,) are integers in [0, T). Arithmetic is f32 (f64 for f64), and results are rounded once,
to the dtype of the first tensor: the original casts to float64 instead, from which this is an f32 rounding away.
Three things differ on purpose:

- The normaliser has an epsilon of 1e-6, so that samples which equal the teacher's do not divide by zero.
- Non-finite values surface. The original sets them to 0 (nan_to_num), which hides divergence.
- The difference of the two scores is taken between the predictions, where noisy_latents cancel, and not between two x0.

Errors: ValueError by argument. Timesteps outside the table are one on a CPU; on a GPU, where looking would wait for the
device, the look-up itself fails.
"""

from typing import Any

import torch
from torch import Tensor

from dmd2_fast.ops._common import check_batch, check_like, check_tensor, working_dtype
from dmd2_fast.ops.dmd import dmd_loss
from dmd2_fast.ops.gan import gan_discriminator_loss, gan_generator_loss
from dmd2_fast.ops.noise import add_noise as _add_noise
from dmd2_fast.ops.noise import predict_x0

INTEGERS = (torch.int64, torch.int32)


def coefficients(alphas_cumprod: Tensor, timesteps: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma (N,) of the timesteps, as the operators take them beside `first` (N, ...).

    Raises ValueError for a table that is not (T,) f32 or f64 on the device of `first`, and for timesteps that are not
    (N,) integers in [0, T).
    """
    if not isinstance(alphas_cumprod, Tensor) or alphas_cumprod.dim() != 1:
        came = tuple(alphas_cumprod.shape) if isinstance(alphas_cumprod, Tensor) else type(alphas_cumprod).__name__
        raise ValueError(f"alphas_cumprod: got {came}, expected a tensor (T,), one entry a timestep")
    if alphas_cumprod.dtype not in (torch.float32, torch.float64):
        # In bf16 the first entries round to 1: no noise at all.
        raise ValueError(f"alphas_cumprod: got {alphas_cumprod.dtype}, expected the scheduler's own float32 or float64")
    if not isinstance(timesteps, Tensor) or timesteps.dtype not in INTEGERS:
        came = timesteps.dtype if isinstance(timesteps, Tensor) else type(timesteps).__name__
        raise ValueError(f"timesteps: got {came}, expected an int64 or int32 tensor ({first.shape[0]},)")
    if timesteps.shape != (first.shape[0],):
        raise ValueError(f"timesteps: got shape {tuple(timesteps.shape)}, expected ({first.shape[0]},), one a sample")
    for name, tensor in (("alphas_cumprod", alphas_cumprod), ("timesteps", timesteps)):
        if tensor.device != first.device:
            raise ValueError(f"{name}: got a tensor on {tensor.device}, expected {first.device}: move it there once")
    _check_range(timesteps, len(alphas_cumprod))
    # index_select and not [], for which -1 is the last entry.
    abar, dtype = alphas_cumprod.index_select(0, timesteps), working_dtype(first)
    return abar.sqrt().to(dtype), (1 - abar).sqrt().to(dtype)


def _check_range(timesteps: Tensor, size: int) -> None:
    if timesteps.device.type != "cpu" or timesteps.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = (int(value) for value in timesteps.aminmax())
    if low < 0 or high >= size:
        raise ValueError(
            f"timesteps: got values from {low} to {high}, expected entries of alphas_cumprod, 0..{size - 1}"
        )


def get_x0_from_noise(
    sample: Tensor, model_output: Tensor, alphas_cumprod: Tensor, timestep: Tensor, *, prediction_type: str = "epsilon"
) -> Tensor:
    """x0 (N, ...) in sample's dtype from the noised sample and a network's prediction; differentiable in both.

    prediction_type: "epsilon", (sample - sigma p) / alpha, or another of `predict_x0`'s, as "v_prediction".
    """
    check_batch("sample", sample)
    check_like("model_output", model_output, "sample", sample)
    alpha, sigma = coefficients(alphas_cumprod, timestep, sample)
    return predict_x0(sample, model_output, alpha, sigma, prediction_type=prediction_type)


def add_noise(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """x_t (N, ...) in the dtype of the latents: scheduler.add_noise(latents, noise, timesteps); d/dlatents.

    scheduler: one of diffusers' with an `alphas_cumprod`, which is moved to the device of the latents and stays there,
    or the table itself. diffusers rounds the table to the dtype of the latents first; here only the result is rounded.
    """
    check_batch("latents", latents)
    check_like("noise", noise, "latents", latents)
    if not isinstance(scheduler, Tensor):
        if not isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor):
            raise ValueError(
                f"scheduler: got {type(scheduler).__name__}, expected a scheduler with alphas_cumprod, or that table"
            )
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(latents.device)
        scheduler = scheduler.alphas_cumprod
    alpha, sigma = coefficients(scheduler, timesteps, latents)
    x_t = _add_noise(latents, alpha, sigma, noise)
    assert isinstance(x_t, Tensor)
    return x_t


@torch.compiler.disable  # a compiled part would hide the graph from autograd.grad
def distribution_matching_loss(
    latents: Tensor,
    noisy_latents: Tensor,
    pred_fake_noise: Tensor,
    pred_real_noise: Tensor,
    alphas_cumprod: Tensor,
    timesteps: Tensor,
    guidance_scale: float = 1.0,
    *,
    pred_real_noise_uncond: Tensor | None = None,
    prediction_type: str = "epsilon",
) -> tuple[Tensor, Tensor]:
    """(loss, gradient) of distribution matching.

        real     = uncond + guidance_scale (cond - uncond)                       in x0, as in prediction space
        gradient = (x0(fake) - x0(real)) / (mean |latents - x0(real)| + 1e-6)    the mean per sample
        loss     = 0.5 mean(gradient^2), with d loss / d latents = gradient / latents.numel()

    latents (N, ...): the generator's, with their graph. noisy_latents: the same after `add_noise`. pred_fake_noise
    (N, ...): the fake score's prediction there. pred_real_noise: the teacher's, either the conditional one (N, ...),
    with pred_real_noise_uncond beside it where there is guidance, or both in one batch (2N, ...), [uncond; cond].
    prediction_type as in `get_x0_from_noise`, for both networks; the fake score has no guidance.

    The loss is 0.5 mse(latents, stopgrad(latents - gradient)), a scalar f32 (f64 for f64). The gradient has the dtype
    of the latents and no graph: what the original logs. torch.compile leaves this function as it is.
    """
    check_batch("latents", latents)
    check_like("noisy_latents", noisy_latents, "latents", latents)
    check_like("pred_fake_noise", pred_fake_noise, "latents", latents)
    check_tensor("pred_real_noise", pred_real_noise, latents)
    if pred_real_noise.shape == (2 * latents.shape[0], *latents.shape[1:]) and latents.shape[0] > 0:
        if pred_real_noise_uncond is not None:
            raise ValueError("pred_real_noise: got [uncond; cond] and pred_real_noise_uncond too, expected one of them")
        pred_real_noise_uncond, pred_real_noise = pred_real_noise.chunk(2)
    check_like("pred_real_noise", pred_real_noise, "latents", latents)
    if pred_real_noise_uncond is not None:
        check_like("pred_real_noise_uncond", pred_real_noise_uncond, "latents", latents)
    elif guidance_scale != 1:
        raise ValueError(
            f"guidance_scale: got {guidance_scale} with the conditional prediction alone, expected "
            f"pred_real_noise_uncond too, or pred_real_noise as [uncond; cond] ({2 * latents.shape[0]}, ...)"
        )
    alpha, sigma = coefficients(alphas_cumprod, timesteps, latents)
    has_graph = latents.requires_grad and torch.is_grad_enabled()
    # An alias: hooks on the latents are for the trainer's own backward.
    x = latents.view_as(latents) if has_graph else latents.detach().requires_grad_()
    with torch.enable_grad():
        loss = dmd_loss(
            x,
            noisy_latents,
            pred_fake_noise,
            pred_real_noise,
            pred_real_noise_uncond,
            alpha=alpha,
            sigma=sigma,
            prediction_type=prediction_type,
            guidance_scale=guidance_scale,
        )
    # The operator has kept the difference of the scores; scaled by numel, f16 does not lose it in its subnormals.
    (gradient,) = torch.autograd.grad(loss, x, torch.full_like(loss, latents.numel()), retain_graph=has_graph)
    return loss if has_graph else loss.detach(), gradient


def gen_cls_loss(pred_realism_on_fake: Tensor) -> Tensor:
    """mean softplus(-logits), f32 (f64 for f64): the generator's adversarial loss; logits of any shape."""
    check_tensor("pred_realism_on_fake", pred_realism_on_fake)
    return gan_generator_loss(pred_realism_on_fake)


def guidance_cls_loss(*, pred_realism_on_fake: Tensor, pred_realism_on_real: Tensor) -> Tensor:
    """mean softplus(fake) + mean softplus(-real), f32 (f64 for f64): the discriminator's loss; logits of any shape.

    By name only: the two in the wrong order would train the opposite.
    """
    check_tensor("pred_realism_on_real", pred_realism_on_real)
    check_tensor("pred_realism_on_fake", pred_realism_on_fake, pred_realism_on_real)
    return gan_discriminator_loss(pred_realism_on_real, pred_realism_on_fake)
