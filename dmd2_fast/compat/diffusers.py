"""The operators inside diffusers' pipelines and training scripts: schedulers and UNets.

    pipe.scheduler = fuse_scheduler(pipe.scheduler)     add_noise, and LCMScheduler's step
    optimize_unet(pipe.unet)                            see networks/swap.py; restore_unet undoes it

A fused scheduler is a scheduler of the same class to everybody who asks: isinstance, the pipeline's registration,
save_pretrained and from_config see diffusers' own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMScheduler,
    LCMScheduler,
    PNDMScheduler,
    SASolverScheduler,
    TCDScheduler,
    UnCLIPScheduler,
)
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from dmd2_fast.errors import UserError
from dmd2_fast.networks.swap import (
    FusedAttention,
    FusedResnetBlock2D,
    Swapped,
    restore_operators,
    swap_operators,
)
from dmd2_fast.ops._common import FLOATING, working_dtype
from dmd2_fast.ops.noise import predict_x0, renoise

from . import dmd2

# --- schedulers -------------------------------------------------------------------------------------------------------

DDPM_TYPE: tuple[Any, ...] = (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMScheduler,
    LCMScheduler,
    PNDMScheduler,
    SASolverScheduler,
    TCDScheduler,
    UnCLIPScheduler,
)
"""Those whose add_noise is sqrt(alphas_cumprod[t]) x0 + sqrt(1 - alphas_cumprod[t]) noise."""


def fuse_scheduler(scheduler: Any) -> Any:
    """A copy of one of diffusers' schedulers that computes by the fused operators; the given one stays as it is.

    add_noise, of the schedulers in DDPM_TYPE and subclasses that inherit theirs, rounds once, to the samples' dtype.
    LCMScheduler's step takes the same step index and random numbers, and rounds the denoised and the previous sample
    once each. What the operators do not cover (clipping, thresholding, mixed dtypes, a gradient in the noise) goes to
    diffusers' own methods, as does all else. Raises UserError for schedulers with another kind of add_noise.
    """
    kind: Any = type(scheduler)
    if issubclass(kind, _FusedNoise):
        return scheduler
    if getattr(kind, "add_noise", None) not in {known.add_noise for known in DDPM_TYPE}:
        names = ", ".join(known.__name__ for known in DDPM_TYPE)
        raise UserError(
            f"fuse_scheduler: {kind.__name__} does not noise as sqrt(abar[t]) x0 + sqrt(1 - abar[t]) noise, abar its "
            f"alphas_cumprod. Expected one of {names}, or a subclass that inherits add_noise. Keep the scheduler as it "
            "is, or make one of these with from_config(scheduler.config)"
        )
    fused = copy.copy(scheduler)
    fused.__class__ = _fused_class(kind)
    return fused


class _FusedNoise:
    """Goes before a scheduler's class, whose methods `super()` reaches."""

    def add_noise(self: Any, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        x, t = original_samples, torch.as_tensor(timesteps)
        if not _alike(x, noise) or (noise.requires_grad and torch.is_grad_enabled()) or t.numel() not in (1, len(x)):
            return super().add_noise(original_samples, noise, timesteps)  # type: ignore[misc]
        return dmd2.add_noise(self, x, noise, t.to(x.device).flatten().expand(len(x)))

    def __reduce__(self) -> tuple[Any, ...]:
        # A class made at run time has no name to unpickle by.
        return _unpickle, (type(self).__bases__[1], self.__dict__)


class _FusedLCM(_FusedNoise):
    def step(
        self: Any,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> LCMSchedulerOutput | tuple[Tensor, Tensor]:
        factors = None
        if self.num_inference_steps is not None and _alike(sample, model_output):
            factors = _denoising_factors(self, int(timestep))
        if factors is None:
            return super().step(model_output, timestep, sample, generator, return_dict)  # type: ignore[misc]
        if self.step_index is None:
            self._init_step_index(timestep)

        def column(value: float) -> Tensor:
            return sample.new_full((len(sample),), value, dtype=working_dtype(sample))

        # denoised = a x_t + b p is what an epsilon prediction gives at alpha = 1 / a, sigma = -b / a.
        a, b = factors
        given = (sample, model_output, column(1 / a), column(-b / a))
        previous = denoised = predict_x0(*given, prediction_type="epsilon")
        if self.step_index != self.num_inference_steps - 1:
            noise = randn_tensor(
                model_output.shape, generator=generator, device=model_output.device, dtype=sample.dtype
            )
            following = self.step_index + 1
            time = int(self.timesteps[following] if following < len(self.timesteps) else timestep)
            abar = float(self.alphas_cumprod[time] if time >= 0 else self.final_alpha_cumprod)
            next_to = column(abar**0.5), column((1 - abar) ** 0.5)
            previous = renoise(*given, *next_to, noise, prediction_type="epsilon")
        self._step_index += 1
        return LCMSchedulerOutput(previous, denoised) if return_dict else (previous, denoised)


def _denoising_factors(scheduler: Any, timestep: int) -> tuple[float, float] | None:
    """(a, b) of denoised = c_skip x_t + c_out x0(x_t, p) = a x_t + b p at a timestep; None where it is not linear."""
    config = scheduler.config
    abar = float(scheduler.alphas_cumprod[timestep])
    if config.thresholding or config.clip_sample or abar == 0:
        return None
    alpha, sigma = abar**0.5, (1 - abar) ** 0.5
    c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(timestep)
    factors = {
        "epsilon": (c_skip + c_out / alpha, -c_out * sigma / alpha),
        "sample": (c_skip, c_out),
        "v_prediction": (c_skip + c_out * alpha, -c_out * sigma),
    }
    return factors.get(config.prediction_type)


def _alike(first: Tensor, other: Tensor) -> bool:
    """Whether the operators take the two together and return what PyTorch's arithmetic would."""
    same = other.shape == first.shape and other.dtype == first.dtype and other.device == first.device
    return same and first.dtype in FLOATING and first.dim() > 0


@cache
def _fused_class(kind: type) -> Any:
    """A subclass of a scheduler's class under the same name: configurations and pipelines record that name."""
    mixin = _FusedLCM if getattr(kind, "step", None) is LCMScheduler.step else _FusedNoise
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (mixin, kind), names)


def _unpickle(kind: Any, state: dict[str, Any]) -> Any:
    fused = _fused_class(kind)
    scheduler = fused.__new__(fused)
    scheduler.__dict__.update(state)
    return scheduler


# --- UNets ------------------------------------------------------------------------------------------------------------


class Optimized(NamedTuple):
    """What `optimize_unet` did."""

    swapped: list[Swapped]
    """(path, operator) of each place that it swapped"""
    kept: dict[str, str]
    """path -> class of each attention (its processor's class) and residual block that computes as it did"""


def optimize_unet(unet: nn.Module) -> Optimized:
    """Swap operators inside a diffusers UNet, in place: normalisations with their SiLU, and attention.

    For UNet2DConditionModel (SD1.5, SDXL, ...), UNet2DModel and others built of the same blocks, in inference and in
    training, gradient checkpointing and torch.compile included. Parameters, state dict and hooks stay. Processors
    other than diffusers' defaults (IP-Adapter's, your own) and blocks with another activation are kept, and reported.
    Processors that are set afterwards replace the swapped ones: call it again. Raises UserError for what is no module.
    """
    if not isinstance(unet, nn.Module):
        hint = "pass its .unet" if hasattr(unet, "unet") else "pass the network itself"
        raise UserError(f"optimize_unet: got {type(unet).__name__}, expected a UNet: {hint}")
    swapped = swap_operators(unet)
    kept = {}
    for path, module in unet.named_modules():
        if isinstance(module, ResnetBlock2D) and not isinstance(module, FusedResnetBlock2D):
            kept[path] = type(module).__name__
        elif isinstance(module, Attention) and not isinstance(module.processor, FusedAttention):
            kept[path] = type(module.processor).__name__
    return Optimized(swapped, kept)


def restore_unet(unet: nn.Module) -> None:
    """Undo `optimize_unet`: every module has its own class, every attention the processor object it had."""
    restore_operators(unet)


@contextmanager
def optimized_unet(unet: nn.Module) -> Iterator[Optimized]:
    """`optimize_unet` for the length of a with block; a UNet that was optimized already stays so."""
    done = optimize_unet(unet)
    try:
        yield done
    finally:
        if done.swapped:
            restore_unet(unet)
