"""Each operator at a size: the contestants that compute the same, and what has to move.

Contestants: "ours" (the backend the operators have by default), "reference" (the same, in plain PyTorch), "compiled"
and "compiled_aten" (torch.compile of the clean version, with Inductor's or with ATen's random numbers), "dmd2" and
"fastgen" (eager, baselines.py). What ours draws from keys the others draw from PyTorch's generator.

The bytes counted are the least that any implementation has to move with the loss known before the backward pass, every
tensor in its own dtype. Sizes: latents are SDXL's, 4 x 128 x 128; predictions are of epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

import dmd2_fast
from benchmarks import baselines, harness
from dmd2_fast.schedules import DDPMSchedule

LATENT = (4, 128, 128)
DIRECTIONS = ("forward", "backward", "both")
CONTESTANTS = ("ours", "reference", "compiled", "dmd2", "fastgen")
GUIDANCE = 8.0
STD = 0.1
NUM_GROUPS = 32
DTYPE_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass
class Case:
    """One operator at one size. Functions take nothing and return the tensor that gradients flow back from."""

    operator: str
    size: str
    dtype: torch.dtype
    device: str
    leaves: tuple[Tensor, ...]
    """what gradients are taken in; () where the operator has none"""
    ours: Callable[[], Tensor]
    eager: dict[str, Callable[[], Tensor]]
    clean: Callable[..., Tensor]
    clean_arguments: tuple[Any, ...]
    moved: tuple[int, int]
    """bytes, forward and backward"""
    draws: tuple[int, ...] | None = None
    """(N, *sample shape) of the random numbers it draws: they are its limit, not memory"""
    prepared: dict[str, Callable[[], Tensor]] = field(default_factory=dict)

    def function(self, contestant: str) -> Callable[[], Tensor]:
        """The forward pass of a contestant; KeyError where this operator has no such."""
        if contestant in ("ours", "reference"):
            return self.ours
        if contestant in self.eager:
            return self.eager[contestant]
        if contestant not in ("compiled", "compiled_aten"):
            raise KeyError(contestant)
        if contestant not in self.prepared:
            compiled = harness.compiled(self.clean, contestant == "compiled_aten")
            self.prepared[contestant] = lambda: compiled(*self.clean_arguments)
        return self.prepared[contestant]

    def step(self, contestant: str, direction: str) -> harness.Function:
        """What to time, called once: forward (recording the graph, as in training), backward on a kept graph, or both.

        The backend is chosen at call time: "reference" is to be called under use_backend("reference").
        """
        forward = self.function(contestant)
        out = forward()
        if direction == "forward":
            return forward
        weight = None if out.dim() == 0 else torch.randn_like(out)

        def backward() -> Any:
            return torch.autograd.grad(out, self.leaves, weight, retain_graph=True)

        def both() -> Any:
            return torch.autograd.grad(forward(), self.leaves, weight)

        step = backward if direction == "backward" else both
        step()
        return step

    def num_bytes(self, direction: str) -> int:
        return sum(self.moved) if direction == "both" else self.moved[DIRECTIONS.index(direction)]

    def floor(self, direction: str) -> harness.Function:
        """The limit to time beside: the random numbers alone where there are any, else a copy of as many bytes."""
        if self.draws is None or direction == "backward":
            return harness.copying(self.num_bytes(direction), self.device)
        ids, key = torch.arange(self.draws[0], device=self.device), dmd2_fast.NoiseKey(1)
        draws, dtype = self.draws, self.dtype
        return lambda: dmd2_fast.philox_normal(ids, draws[1:], key, dtype)


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _normal(shape: tuple[int, ...], dtype: torch.dtype, device: str, grad: bool = False) -> Tensor:
    return torch.randn(shape, device=device).to(dtype).requires_grad_(grad)


@dataclass
class _Diffusion:
    """Times of a batch as each contestant wants them."""

    abar: Tensor
    timesteps: Tensor
    next_timesteps: Tensor
    schedule: baselines.FastGenSchedule
    alpha: Tensor
    sigma: Tensor
    next_alpha: Tensor
    next_sigma: Tensor
    ids: Tensor
    key: dmd2_fast.NoiseKey


@lru_cache(maxsize=4)
def _diffusion(batch: int, device: str) -> _Diffusion:
    schedule = DDPMSchedule()
    abar = schedule.coefficients(torch.arange(1000, device=device))[0].square()
    timesteps = torch.linspace(979, 21, batch, device=device).long()
    next_timesteps = timesteps // 2
    return _Diffusion(
        abar, timesteps, next_timesteps, baselines.FastGenSchedule(abar), *schedule.coefficients(timesteps),
        *schedule.coefficients(next_timesteps), torch.arange(batch, device=device), dmd2_fast.NoiseKey(1, 2, 3),
    )  # fmt: skip


# --- noise ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def philox_normal(batch: int, dtype: torch.dtype, device: str) -> Case:
    shape, d = (batch, *LATENT), _diffusion(batch, device)
    randn = partial(torch.randn, shape, dtype=dtype, device=device)
    return Case(
        "philox_normal", _size(shape), dtype, device, (),
        lambda: dmd2_fast.philox_normal(d.ids, LATENT, d.key, dtype), {"dmd2": randn, "fastgen": randn},
        baselines.clean_normal, (torch.empty(shape, dtype=dtype, device=device),),
        (math.prod(shape) * dtype.itemsize, 0),
    )  # fmt: skip


@lru_cache(maxsize=2)
def philox_uniform(batch: int, dtype: torch.dtype, device: str) -> Case:
    """As large as noise, to see the generator; training draws one number a sample."""
    shape, d = (batch, *LATENT), _diffusion(batch, device)
    rand = partial(torch.rand, shape, device=device)
    return Case(
        "philox_uniform", _size(shape), dtype, device, (), lambda: dmd2_fast.philox_uniform(d.ids, LATENT, d.key),
        {"dmd2": rand, "fastgen": rand}, baselines.clean_uniform, (torch.empty(shape, device=device),),
        (math.prod(shape) * 4, 0),
    )  # fmt: skip


@lru_cache(maxsize=2)
def add_noise(batch: int, dtype: torch.dtype, device: str) -> Case:
    shape, d = (batch, *LATENT), _diffusion(batch, device)
    x0 = _normal(shape, dtype, device, grad=True)
    tensor = x0.numel() * dtype.itemsize
    return Case(
        "add_noise", _size(shape), dtype, device, (x0,),
        lambda: dmd2_fast.add_noise(x0, d.alpha, d.sigma, key=d.key, sample_ids=d.ids),
        {
            "dmd2": lambda: baselines.dmd2_add_noise(x0, d.abar, d.timesteps),
            "fastgen": lambda: baselines.fastgen_add_noise(x0, d.schedule, d.timesteps.double()),
        },
        baselines.clean_add_noise, (x0, d.alpha, d.sigma), (2 * tensor, 2 * tensor), shape,
    )  # fmt: skip


@lru_cache(maxsize=2)
def predict_x0(batch: int, dtype: torch.dtype, device: str) -> Case:
    shape, d = (batch, *LATENT), _diffusion(batch, device)
    x_t, prediction = _normal(shape, dtype, device), _normal(shape, dtype, device, grad=True)
    tensor = x_t.numel() * dtype.itemsize
    return Case(
        "predict_x0", _size(shape), dtype, device, (prediction,),
        lambda: dmd2_fast.predict_x0(x_t, prediction, d.alpha, d.sigma, prediction_type="epsilon"),
        {
            "dmd2": lambda: baselines.dmd2_predict_x0(x_t, prediction, d.abar, d.timesteps),
            "fastgen": lambda: d.schedule.eps_to_x0(x_t, prediction, d.timesteps.double()),
        },
        baselines.clean_predict_x0, (x_t, prediction, d.alpha, d.sigma), (3 * tensor, 2 * tensor),
    )  # fmt: skip


@lru_cache(maxsize=2)
def renoise(batch: int, dtype: torch.dtype, device: str) -> Case:
    shape, d = (batch, *LATENT), _diffusion(batch, device)
    x_t, prediction = _normal(shape, dtype, device), _normal(shape, dtype, device, grad=True)
    coefficients = d.alpha, d.sigma, d.next_alpha, d.next_sigma
    tensor = x_t.numel() * dtype.itemsize
    return Case(
        "renoise", _size(shape), dtype, device, (prediction,),
        lambda: dmd2_fast.renoise(
            x_t, prediction, *coefficients, prediction_type="epsilon", key=d.key, sample_ids=d.ids
        ),
        {
            "dmd2": lambda: baselines.dmd2_renoise(x_t, prediction, d.abar, d.timesteps, d.next_timesteps),
            "fastgen": lambda: baselines.fastgen_renoise(
                x_t, prediction, d.schedule, d.timesteps.double(), d.next_timesteps.double()
            ),
        },
        baselines.clean_renoise, (x_t, prediction, *coefficients), (3 * tensor, 2 * tensor), shape,
    )  # fmt: skip


# --- losses on latents ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def dmd_loss(batch: int, dtype: torch.dtype, device: str, guided: bool = True) -> Case:
    shape, d = (batch, *LATENT), _diffusion(batch, device)
    x = _normal(shape, dtype, device, grad=True)
    x_t, fake, teacher = (_normal(shape, dtype, device) for _ in range(3))
    uncond, scale = (_normal(shape, dtype, device), GUIDANCE) if guided else (None, 1.0)
    inputs, tensor = (x, x_t, fake, teacher, uncond, scale), x.numel() * dtype.itemsize
    return Case(
        "dmd_loss", _size(shape) + ("" if guided else ", no guidance"), dtype, device, (x,),
        lambda: dmd2_fast.dmd_loss(
            *inputs[:5], alpha=d.alpha, sigma=d.sigma, prediction_type="epsilon", guidance_scale=scale
        ),
        {
            "dmd2": lambda: baselines.dmd2_dmd_loss(*inputs, d.abar, d.timesteps),
            "fastgen": lambda: baselines.fastgen_dmd_loss(*inputs, d.schedule, d.timesteps.double()),
        },
        # Each input once and the difference written; the difference read and the gradient written.
        baselines.clean_dmd_loss, (*inputs, d.alpha, d.sigma), ((5 + guided) * tensor, 2 * tensor),
    )  # fmt: skip


@lru_cache(maxsize=2)
def denoising_loss(batch: int, dtype: torch.dtype, device: str) -> Case:
    """With the noise that add_noise returned."""
    shape, d = (batch, *LATENT), _diffusion(batch, device)
    prediction = _normal(shape, dtype, device, grad=True)
    x0, noise = _normal(shape, dtype, device), _normal(shape, dtype, device)
    tensor = x0.numel() * dtype.itemsize
    return Case(
        "denoising_loss", _size(shape), dtype, device, (prediction,),
        lambda: dmd2_fast.denoising_loss(prediction, x0, d.alpha, d.sigma, noise, prediction_type="epsilon"),
        {
            "dmd2": lambda: baselines.dmd2_denoising_loss(prediction, noise),
            "fastgen": lambda: baselines.fastgen_denoising_loss(prediction, noise),
        },
        # Prediction and noise read; both read again, the gradient written.
        baselines.clean_denoising_loss, (prediction, noise), (2 * tensor, 3 * tensor),
    )  # fmt: skip


# --- GAN and R1 -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def gan_generator_loss(batch: int, dtype: torch.dtype, device: str) -> Case:
    logits = _normal((batch, 1), dtype, device, grad=True)
    eager = partial(baselines.eager_gan_generator_loss, logits)
    return Case(
        "gan_generator_loss", _size((batch, 1)), dtype, device, (logits,),
        lambda: dmd2_fast.gan_generator_loss(logits), {"dmd2": eager, "fastgen": eager},
        baselines.eager_gan_generator_loss, (logits,), (logits.nbytes, 2 * logits.nbytes),
    )  # fmt: skip


@lru_cache(maxsize=2)
def gan_discriminator_loss(batch: int, dtype: torch.dtype, device: str) -> Case:
    both = _normal((batch, 1), dtype, device, grad=True), _normal((batch, 1), dtype, device, grad=True)
    eager = partial(baselines.eager_gan_discriminator_loss, *both)
    return Case(
        "gan_discriminator_loss", _size((batch, 1)), dtype, device, both,
        lambda: dmd2_fast.gan_discriminator_loss(*both), {"dmd2": eager, "fastgen": eager},
        baselines.eager_gan_discriminator_loss, both, (2 * both[0].nbytes, 4 * both[0].nbytes),
    )  # fmt: skip


@lru_cache(maxsize=2)
def gan_head_loss(batch: int, dtype: torch.dtype, device: str, channels: int = 1280) -> Case:
    shapes = (batch, channels), (channels,), (channels,), (1, channels), (1,)
    inputs = tuple(_normal(shape, dtype, device, grad=True) for shape in shapes)
    eager = partial(baselines.eager_gan_head_loss, *inputs, NUM_GROUPS)
    total = sum(tensor.nbytes for tensor in inputs)
    return Case(
        "gan_head_loss", _size((batch, channels)), dtype, device, inputs,
        lambda: dmd2_fast.gan_head_loss(*inputs, NUM_GROUPS, sign=1)[0], {"dmd2": eager, "fastgen": eager},
        baselines.clean_gan_head_loss, (*inputs, NUM_GROUPS), (total, 2 * total),
    )  # fmt: skip


@lru_cache(maxsize=2)
def r1_perturb(batch: int, dtype: torch.dtype, device: str) -> Case:
    shape, d = (batch, *LATENT), _diffusion(batch, device)
    x_t = _normal(shape, dtype, device, grad=True)
    eager = partial(baselines.eager_r1_perturb, x_t, STD)
    tensor = x_t.numel() * dtype.itemsize
    return Case(
        "r1_perturb", _size(shape), dtype, device, (x_t,),
        lambda: dmd2_fast.r1_perturb(x_t, STD, key=d.key, sample_ids=d.ids), {"dmd2": eager, "fastgen": eager},
        baselines.clean_r1_perturb, (x_t, STD), (3 * tensor, 3 * tensor), shape,
    )  # fmt: skip


@lru_cache(maxsize=2)
def r1_penalty(batch: int, dtype: torch.dtype, device: str) -> Case:
    both = _normal((batch, 1), dtype, device, grad=True), _normal((batch, 1), dtype, device, grad=True)
    eager = partial(baselines.eager_r1_penalty, *both, STD)
    return Case(
        "r1_penalty", _size((batch, 1)), dtype, device, both,
        lambda: dmd2_fast.r1_penalty(*both, STD), {"dmd2": eager, "fastgen": eager},
        baselines.eager_r1_penalty, (*both, STD), (2 * both[0].nbytes, 4 * both[0].nbytes),
    )  # fmt: skip


# --- group norm -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def group_norm_silu(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, layout: torch.memory_format = torch.contiguous_format
) -> Case:
    x = torch.randn(shape, device=device).to(dtype).to(memory_format=layout).requires_grad_()
    inputs = x, _normal((shape[1],), dtype, device, grad=True), _normal((shape[1],), dtype, device, grad=True)
    name = "NHWC" if layout == torch.channels_last else "NCHW"
    return Case(
        "group_norm_silu", f"{_size(shape)} {name}", dtype, device, inputs,
        lambda: dmd2_fast.group_norm_silu(*inputs, NUM_GROUPS),
        # What diffusers' UNets run, in DMD2's trainer and in FastGen's.
        {"dmd2": lambda: baselines.eager_group_norm_silu(*inputs, NUM_GROUPS)},
        baselines.clean_group_norm_silu, (*inputs, NUM_GROUPS), (2 * x.nbytes, 3 * x.nbytes),
    )  # fmt: skip
