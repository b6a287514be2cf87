"""One 1:5 cycle as the original DMD2 and as FastGen are built, in plain eager PyTorch: to compare ours with.

Written from their published structure (DMD2: arXiv 2405.14867, sections 4.1-4.5), with the operators of baselines.py:

    dmd2      backward simulation before every sample; conditional, unconditional and fake predictions each in a forward
              of their own; so is the adversarial loss, at its own times and noise, real and fake apart; x0 in float64
    fastgen   one step; the head reads the frozen teacher's features, whose forward keeps a graph; the unconditional
              forward apart; every fake-score update makes its own samples; schedules in float64

Both clip with clip_grad_norm_ and step torch's AdamW, each with its defaults; FastGen averages parameter by parameter.
Networks are the adapters of dmd2_fast.networks around unchanged diffusers UNets: diffusers' own sequence of operators.
Predictions are of epsilon, the schedule is DDPM's. All times and noise come from `draws`, which tests replace.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import baselines
from dmd2_fast.data.batch import Batch
from dmd2_fast.denoiser import Condition
from dmd2_fast.engine import frozen

LIMIT = 10.0
"""largest norm of a gradient"""


class Draws:
    """Times and noise from PyTorch's generator; the rollout index is given, so that all contestants run as many."""

    def __init__(self, index: int = 0):
        self.index = index

    def times(self, part: str, num: int, low: int = 0, high: int = 1000) -> Tensor:
        return torch.randint(low, high, (num,))

    def noise(self, part: str, like: Tensor) -> Tensor:
        return torch.randn_like(like)


@dataclass
class Plain:
    """Three networks, a head on the bottleneck, and the numbers of a recipe."""

    generator: nn.Module
    fake: nn.Module
    teacher: nn.Module
    head: nn.Module
    abar: Tensor
    """alphas_cumprod (1000,) f32"""
    steps: tuple[int, ...]
    guidance_scale: float
    generator_weight: float
    discriminator_weight: float
    t_range: tuple[int, int] = (20, 980)


def _predict(network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    return network(x, t, condition)[0]


def _encode(network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, ...]:
    return network(x, t, condition, decode_rows=0, levels=("mid",))[1]


def _uncond(nets: Plain, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor | None:
    """The teacher without condition, where guidance asks for it."""
    return None if nets.guidance_scale == 1 else _predict(nets.teacher, x_t, t, nets.teacher.unconditional(condition))


# --- DMD2 -------------------------------------------------------------------------------------------------------------


def dmd2_generate(nets: Plain, batch: Batch, draws: Any) -> Tensor:
    """Backward simulation without gradient, then the step that is trained."""
    assert batch.x0 is not None
    x, num = draws.noise("input", batch.x0), len(batch)
    times = [torch.full((num,), step) for step in nets.steps]
    with torch.no_grad():
        for i in range(draws.index):
            prediction = _predict(nets.generator, x, times[i], batch.condition)
            noise = draws.noise(f"step {i}", x)
            x = baselines.dmd2_renoise(x, prediction, nets.abar, times[i], times[i + 1], noise)
    t = times[draws.index]
    return baselines.dmd2_predict_x0(x, _predict(nets.generator, x, t, batch.condition), nets.abar, t)


def dmd2_generator_loss(nets: Plain, batch: Batch, draws: Any) -> tuple[Tensor, Tensor]:
    """(loss, samples)"""
    x, condition = dmd2_generate(nets, batch, draws), batch.condition
    t = draws.times("dmd", len(x), *nets.t_range)
    with torch.no_grad():
        x_t = baselines.dmd2_add_noise(x, nets.abar, t, draws.noise("dmd", x))
        fake = _predict(nets.fake, x_t, t, condition)
        teacher = _predict(nets.teacher, x_t, t, condition)
        uncond = _uncond(nets, x_t, t, condition)
    loss = baselines.dmd2_dmd_loss(x, x_t, fake, teacher, uncond, nets.guidance_scale, nets.abar, t)
    logits = _dmd2_logits(nets, x, condition, draws, "gan fake")
    return loss + nets.generator_weight * baselines.eager_gan_generator_loss(logits), x.detach()


def _dmd2_logits(nets: Plain, x: Tensor, condition: Condition, draws: Any, part: str) -> Tensor:
    t = draws.times(part, len(x))
    x_t = baselines.dmd2_add_noise(x, nets.abar, t, draws.noise(part, x))
    return nets.head(_encode(nets.fake, x_t, t, condition))


def dmd2_fake_score_loss(nets: Plain, batch: Batch, x: Tensor, draws: Any) -> Tensor:
    assert batch.x0 is not None
    t, noise = draws.times("denoising", len(x)), draws.noise("denoising", x)
    x_t = baselines.dmd2_add_noise(x, nets.abar, t, noise)
    loss = baselines.dmd2_denoising_loss(_predict(nets.fake, x_t, t, batch.condition), noise)
    real = _dmd2_logits(nets, batch.x0, batch.condition, draws, "gan real")
    fake = _dmd2_logits(nets, x, batch.condition, draws, "gan fake")
    return loss + nets.discriminator_weight * baselines.eager_gan_discriminator_loss(real, fake)


# --- FastGen ----------------------------------------------------------------------------------------------------------


def fastgen_generate(nets: Plain, batch: Batch, draws: Any) -> Tensor:
    assert batch.x0 is not None
    x, t = draws.noise("input", batch.x0), torch.full((len(batch),), nets.steps[0])
    schedule = baselines.FastGenSchedule(nets.abar)
    return schedule.eps_to_x0(x, _predict(nets.generator, x, t, batch.condition), t)


def fastgen_student_loss(nets: Plain, batch: Batch, draws: Any) -> Tensor:
    schedule, condition = baselines.FastGenSchedule(nets.abar), batch.condition
    x = fastgen_generate(nets, batch, draws)
    t = draws.times("dmd", len(x), *nets.t_range)
    x_t = schedule.forward_process(x, draws.noise("dmd", x), t)
    teacher, features = nets.teacher(x_t, t, condition, levels=("mid",))
    with torch.no_grad():
        fake = _predict(nets.fake, x_t, t, condition)
        uncond = _uncond(nets, x_t, t, condition)
    loss = baselines.fastgen_dmd_loss(x, x_t, fake, teacher, uncond, nets.guidance_scale, schedule, t)
    return loss + nets.generator_weight * baselines.eager_gan_generator_loss(nets.head(features))


def fastgen_fake_score_loss(nets: Plain, batch: Batch, draws: Any) -> Tensor:
    assert batch.x0 is not None
    schedule, condition = baselines.FastGenSchedule(nets.abar), batch.condition
    with torch.no_grad():
        x = fastgen_generate(nets, batch, draws)
    t, noise = draws.times("denoising", len(x)), draws.noise("denoising", x)
    x_t = schedule.forward_process(x, noise, t)
    loss = baselines.fastgen_denoising_loss(_predict(nets.fake, x_t, t, condition), noise)
    with torch.no_grad():
        fake = _encode(nets.teacher, x_t, t, condition)
        t = draws.times("gan real", len(x))
        real_t = schedule.forward_process(batch.x0, draws.noise("gan real", batch.x0), t)
        real = _encode(nets.teacher, real_t, t, condition)
    gan = baselines.eager_gan_discriminator_loss(nets.head(real), nets.head(fake))
    return loss + nets.discriminator_weight * gan


# --- cycles -----------------------------------------------------------------------------------------------------------


def _update(loss: Tensor, modules: Iterable[nn.Module], optimizers: Iterable[torch.optim.Optimizer]) -> None:
    loss.backward()
    for module in modules:
        torch.nn.utils.clip_grad_norm_(module.parameters(), LIMIT)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


class DMD2:
    """`cycle(batch, indices)`: a generator update, and len(indices) fake-score updates, the first on its samples."""

    def __init__(self, nets: Plain, lr: float = 1e-6):
        self.nets, self.guidance = nets, nn.ModuleList([nets.fake, nets.head])
        self.generator_optimizer = torch.optim.AdamW(nets.generator.parameters(), lr=lr)
        self.guidance_optimizer = torch.optim.AdamW(self.guidance.parameters(), lr=lr)

    def cycle(self, batch: Batch, indices: list[int]) -> None:
        nets = self.nets
        for i, index in enumerate(indices):
            draws = Draws(index)
            if i == 0:
                with frozen(self.guidance):
                    loss, x = dmd2_generator_loss(nets, batch, draws)
                    _update(loss, [nets.generator], [self.generator_optimizer])
            else:
                with torch.no_grad():
                    x = dmd2_generate(nets, batch, draws)
            loss = dmd2_fake_score_loss(nets, batch, x, draws)
            _update(loss, [self.guidance], [self.guidance_optimizer])


class FastGen:
    """`cycle(batch, indices)`: a student update, then len(indices) fake-score updates, each on samples of its own."""

    def __init__(self, nets: Plain, lr: float = 1e-6, ema: float = 0.999):
        self.nets, self.decay = nets, ema
        self.average = copy.deepcopy(nets.generator)
        self.optimizers = {m: torch.optim.AdamW(m.parameters(), lr=lr) for m in (nets.generator, nets.fake, nets.head)}

    def cycle(self, batch: Batch, indices: list[int]) -> None:
        nets = self.nets
        with frozen(nets.fake), frozen(nets.head):
            loss = fastgen_student_loss(nets, batch, Draws())
            _update(loss, [nets.generator], [self.optimizers[nets.generator]])
        with torch.no_grad():
            for average, parameter in zip(self.average.parameters(), nets.generator.parameters(), strict=True):
                average.lerp_(parameter, 1 - self.decay)
        for _ in indices:
            loss = fastgen_fake_score_loss(nets, batch, Draws())
            trained = [nets.fake, nets.head]
            _update(loss, trained, [self.optimizers[module] for module in trained])
