"""The whole algorithm as two pure functions of networks, a batch and a key: `generator_loss` and `fake_score_loss`.

Yin et al. 2024, "Improved Distribution Matching Distillation for Fast Image Synthesis". Symbols: N batch, x the
generator's sample, x_t its noised version, k the generator's step. The networks are anything that can be called like
a `Denoiser` / `FakeScore`: plain modules, or DeepSpeed engines around them (engine.py). All draws come from keys, so
the losses do not depend on how the global batch is split.

Generator, every `ttur_ratio`-th iteration (section 4.1-4.4):
    x = G(input); x_t = alpha x + sigma n
    dmd_weight * dmd_loss(x, x_t, F(x_t), T(x_t)) + generator_weight * E softplus(-D(x_t))
Fake score and head, every iteration, on stopgrad(x):
    E w(t) |F(x_t) - x|^2 + discriminator_weight * (E softplus(D(fake)) + E softplus(-D(real)) + r1_weight * R1)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data.batch import Batch
from .denoiser import Condition, Denoiser, concat_conditions
from .heads import GANHeads
from .ops.denoising import denoising_loss
from .ops.dmd import dmd_loss
from .ops.gan import gan_discriminator_loss, gan_generator_loss
from .ops.noise import add_noise, predict_x0
from .ops.r1 import r1_penalty, r1_perturb
from .random import NoiseKey, Stream, philox_uniform
from .rollout import generator_input
from .schedules import Schedule

Measure = Callable[[Tensor, Any], Tensor]
"""(samples, targets), both (N, C, H, W) f32, to their mean distance."""


@dataclass(frozen=True)
class Algorithm:
    """The settings the losses need; `from_config` reads them from a run's config."""

    steps: tuple[float, ...]
    """the generator's step list in the schedule's units"""
    rollout_index: str = "batch"
    """"batch" or "sample": one trained step index a batch, or one for each sample"""
    guidance_scale: float = 1.0
    """classifier-free guidance of the teacher"""
    dmd_weight: float = 1.0
    dmd_t_range: tuple[float, float] = (0.02, 0.98)
    generator_weight: float = 5e-3
    """weight of the generator's adversarial loss; 0: none"""
    discriminator_weight: float = 1e-2
    """weight of the head's loss beside the denoising loss; 0: no head"""
    features: str = "fake_score"
    """whose features the head reads: "fake_score" (DMD2) or "teacher" (FastGen, LADD: only the head is trained)"""
    levels: tuple[str, ...] = ("mid",)
    gan_t_range: tuple[float, float] = (0.0, 1.0)
    r1_kind: str = "none"
    r1_weight: float = 1.0
    r1_std: float = 0.1
    """standard deviation of the R1 perturbation as a share of each noised sample's RMS"""
    r1_interval: int = 1
    regression_weight: float = 0.0
    """weight of the regression on a teacher's pairs, where they are given"""
    passes: str = "independent"
    """"independent": the GAN draws its own times and noise (paper); "shared": it reads the passes that run anyway"""

    @property
    def adversarial(self) -> bool:
        return self.discriminator_weight > 0

    @property
    def own_levels(self) -> tuple[str, ...]:
        """Feature levels the fake score itself must return."""
        return self.levels if self.adversarial and self.features == "fake_score" else ()

    @classmethod
    def from_config(cls, config: Any) -> Algorithm:
        adversarial, matching = config.adversarial, config.distribution_matching
        return cls(
            steps=tuple(config.generator.steps),
            rollout_index=config.generator.rollout_index,
            guidance_scale=config.teacher.guidance_scale,
            dmd_weight=matching.weight,
            dmd_t_range=tuple(matching.t_range),
            generator_weight=adversarial.generator_weight,
            discriminator_weight=adversarial.discriminator_weight,
            features=adversarial.features,
            levels=tuple(adversarial.levels),
            gan_t_range=tuple(adversarial.t_range),
            r1_kind=adversarial.r1.kind,
            r1_weight=adversarial.r1.weight,
            r1_std=adversarial.r1.std,
            r1_interval=adversarial.r1.interval,
            regression_weight=config.regression.weight,
            passes=config.passes,
        )


class FakeScore(nn.Module):
    """The online fake score with its GAN head: one module, so that one engine trains both.

    `forward(x_t, t, condition, ...)` -> (prediction of the first `decode_rows` rows or None, logits (rows, levels) or
    None). The head reads rows `logit_rows` of the own features, or `features` of the teacher when given.
    """

    def __init__(self, denoiser: Denoiser, heads: GANHeads | None, levels: tuple[str, ...] = ()):
        super().__init__()
        self.denoiser = denoiser
        self.heads = heads
        self.levels = levels

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        decode_rows: int | None = None,
        decode_grad: bool = True,
        logit_rows: slice = slice(None),
        features: tuple[Tensor, ...] | None = None,
        logits: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        levels = self.levels if logits else ()
        prediction, own = self.denoiser(
            x_t, t, condition, decode_rows=decode_rows, decode_grad=decode_grad, levels=levels
        )
        if self.heads is None or not logits:
            return prediction, None
        source = features if features is not None else tuple(feature[logit_rows] for feature in own)
        return prediction, self.heads(source)


@dataclass
class Networks:
    """The three networks of a step. `generator` and `fake_score` may be engines; `teacher` is frozen."""

    generator: Callable[..., Any]
    fake_score: Callable[..., Any]
    teacher: Callable[..., Any]
    schedule: Schedule
    prediction_type: str
    unconditional: Callable[[Condition], Condition]


@dataclass
class _Noised:
    """A part of a batch on its way into a network."""

    x_t: Tensor
    t: Tensor
    alpha: Tensor
    sigma: Tensor
    condition: Condition


def _noise(networks: Networks, x: Tensor, batch: Batch, key: NoiseKey, time_stream: int, t_range) -> _Noised:
    """Noise x at a random time; times from `time_stream`, the noise from the stream after it."""
    u = philox_uniform(batch.sample_ids, (1,), key.fork(time_stream))[:, 0]
    t = networks.schedule.time(u, t_range)
    alpha, sigma = networks.schedule.coefficients(t)
    x_t = add_noise(x, alpha, sigma, key=key.fork(time_stream + 1), sample_ids=batch.sample_ids)
    return _Noised(x_t, t, alpha, sigma, batch.condition)


def _join(*parts: _Noised) -> tuple[Tensor, Tensor, Condition]:
    if len(parts) == 1:
        return parts[0].x_t, parts[0].t, parts[0].condition
    return (
        torch.cat([part.x_t for part in parts]),
        torch.cat([part.t for part in parts]),
        concat_conditions(*[part.condition for part in parts]),
    )


@lru_cache(maxsize=8)
def _steps(schedule: Schedule, values: tuple[float, ...], device: torch.device) -> Tensor:
    """The step list on the device: made once, because copying it there waits for the device."""
    return schedule.steps(values, device)


def generate(
    networks: Networks, algorithm: Algorithm, batch: Batch, key: NoiseKey, *, rollout=None, pairs: Batch | None = None
) -> Tensor:
    """The generator's sample x (N, *) f32 for this step, with a graph if gradients are on.

    `rollout` is the generator as the chain without gradient calls it (an engine's bare module; default: itself).
    `pairs`: a teacher's, whose noise goes through the same forward; their samples are the last rows.
    """
    steps, shape = _steps(networks.schedule, algorithm.steps, batch.sample_ids.device), batch.sample_shape
    x_in, t = generator_input(
        _Rollout(rollout or networks.generator, networks), steps, batch.condition, batch.sample_ids, shape, key,
        mode=algorithm.rollout_index,
    )  # fmt: skip
    condition = batch.condition
    if pairs is not None:
        noise, first = _pair_input(networks, steps, pairs)
        x_in, t = torch.cat([x_in, noise]), torch.cat([t, first])
        condition = concat_conditions(condition, pairs.condition)
    prediction, _ = networks.generator(x_in, t, condition)  # a graph, where gradients are on
    alpha, sigma = networks.schedule.coefficients(t)
    return predict_x0(x_in, prediction, alpha, sigma, prediction_type=networks.prediction_type)


def _pair_input(networks: Networks, steps: Tensor, pairs: Batch) -> tuple[Tensor, Tensor]:
    """The generator's input for pairs, at its first step: (x_t (N, *), t (N,))."""
    return pairs.extra["noise"] * networks.schedule.init_sigma(steps[:1]), steps[:1].expand(len(pairs))


def warmup_loss(
    networks: Networks, algorithm: Algorithm, pairs: Batch, measure: Measure = F.mse_loss
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) of the generator on a teacher's pairs alone: G(noise) at its first step against x0."""
    steps = _steps(networks.schedule, algorithm.steps, pairs.sample_ids.device)
    x_t, t = _pair_input(networks, steps, pairs)
    prediction, _ = networks.generator(x_t, t, pairs.condition)
    alpha, sigma = networks.schedule.coefficients(t)
    loss = measure(predict_x0(x_t, prediction, alpha, sigma, prediction_type=networks.prediction_type), pairs.x0)
    return loss, {"generator/regression": loss.detach(), "generator/loss": loss.detach()}


class _Rollout:
    """What rollout.py asks of a generator, around any callable."""

    def __init__(self, call: Callable[..., Any], networks: Networks):
        self.call, self.schedule, self.prediction_type = call, networks.schedule, networks.prediction_type

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.call(x_t, t, condition)[0]


def _teacher_pass(
    networks: Networks, algorithm: Algorithm, dmd: _Noised, gan: _Noised | None
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...] | None]:
    """One teacher forward: conditional and unconditional predictions at `dmd`, features of the rows of `gan`.

    Rows: [dmd conditional; dmd unconditional; gan of its own draw]. Features carry a graph to x, predictions none.
    """
    n, guided, wants_features = len(dmd.x_t), algorithm.guidance_scale != 1.0, gan is not None
    parts = [dmd if gan is dmd else _detached(dmd)]
    if guided:
        parts.append(_detached(dmd, networks.unconditional(dmd.condition)))
    if gan is not None and gan is not dmd:
        parts.append(gan)
    x_t, t, condition = _join(*parts)
    with torch.set_grad_enabled(wants_features and torch.is_grad_enabled()):
        prediction, features = networks.teacher(
            x_t, t, condition, decode_rows=n * (1 + guided), decode_grad=False,
            levels=algorithm.levels if wants_features else (),
        )  # fmt: skip
    uncond = prediction[n:] if guided else None
    if not wants_features:
        return prediction[:n], uncond, None
    rows = slice(0, n) if gan is dmd else slice(len(x_t) - n, None)
    return prediction[:n], uncond, tuple(feature[rows] for feature in features)


def _detached(part: _Noised, condition: Condition | None = None) -> _Noised:
    return _Noised(part.x_t.detach(), part.t, part.alpha, part.sigma, condition or part.condition)


def generator_loss(
    networks: Networks,
    algorithm: Algorithm,
    batch: Batch,
    key: NoiseKey,
    *,
    rollout=None,
    pairs: Batch | None = None,
    measure: Measure = F.mse_loss,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(loss, x detached (N, *), metrics). Only the generator may require gradients: freeze the other two around it.

    `pairs`: a teacher's, for the regression loss by `measure` (regression.py).
    """
    x = generate(networks, algorithm, batch, key, rollout=rollout, pairs=pairs)
    x, paired = x[: len(batch)], x[len(batch) :]
    dmd = _noise(networks, x, batch, key, Stream.DMD_TIME, algorithm.dmd_t_range)
    adversarial = algorithm.adversarial and algorithm.generator_weight > 0
    gan = None
    if adversarial:
        shared = algorithm.passes == "shared"
        gan = dmd if shared else _noise(networks, x, batch, key, Stream.GAN_FAKE_TIME, algorithm.gan_t_range)
    from_teacher = adversarial and algorithm.features == "teacher"
    teacher, teacher_uncond, features = _teacher_pass(networks, algorithm, dmd, gan if from_teacher else None)

    n, own = len(x), adversarial and not from_teacher
    x_t, t, condition = _join(dmd, gan) if own and gan is not None and gan is not dmd else _join(dmd)
    with torch.set_grad_enabled(adversarial and torch.is_grad_enabled()):
        fake, logits = networks.fake_score(
            x_t if own else x_t.detach(), t, condition, decode_rows=n, decode_grad=False,
            logit_rows=slice(len(x_t) - n, None), features=features, logits=adversarial,
        )  # fmt: skip
    loss_dmd = dmd_loss(
        x, dmd.x_t.detach(), fake, teacher, teacher_uncond,
        alpha=dmd.alpha, sigma=dmd.sigma, prediction_type=networks.prediction_type,
        guidance_scale=algorithm.guidance_scale,
    )  # fmt: skip
    loss = algorithm.dmd_weight * loss_dmd
    metrics = {"generator/dmd": loss_dmd}
    if adversarial:
        loss_gan = gan_generator_loss(logits)
        loss = loss + algorithm.generator_weight * loss_gan
        metrics["generator/gan"] = loss_gan
    if pairs is not None:
        loss_regression = measure(paired, pairs.x0)
        loss = loss + algorithm.regression_weight * loss_regression
        metrics["generator/regression"] = loss_regression
    metrics["generator/loss"] = loss
    return loss, x.detach(), {name: value.detach() for name, value in metrics.items()}


def fake_score_loss(
    networks: Networks, algorithm: Algorithm, batch: Batch, x: Tensor, key: NoiseKey
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) of the fake score and its head on the generator's samples x (N, *), which get no gradient."""
    x, n = x.detach(), len(x)
    fake = _noise(networks, x, batch, key, Stream.DENOISING_TIME, (0.0, 1.0))
    parts, r1_std = [fake], None
    shared = algorithm.passes == "shared"
    if algorithm.adversarial:
        if not shared:
            parts.append(_noise(networks, x, batch, key, Stream.GAN_FAKE_TIME, algorithm.gan_t_range))
        real, r1_std = _real_rows(networks, algorithm, batch, key)
        parts.append(real)
    prediction, logits = _critic_pass(networks, algorithm, parts, n, shared)

    weight = networks.schedule.loss_weight(fake.t)
    noise_key = key.fork(Stream.DENOISING_NOISE)
    loss_denoising = denoising_loss(
        prediction, x, fake.alpha, fake.sigma, prediction_type=networks.prediction_type, key=noise_key,
        sample_ids=batch.sample_ids, sample_weight=weight,
    )  # fmt: skip
    loss, metrics = loss_denoising, {"fake_score/denoising": loss_denoising}
    if logits is not None:
        fake_logits, real_logits, perturbed = logits[:n], logits[n : 2 * n], logits[2 * n :]
        loss_gan = gan_discriminator_loss(real_logits, fake_logits)
        metrics |= {"fake_score/gan": loss_gan, "logits/real": real_logits.mean(), "logits/fake": fake_logits.mean()}
        if r1_std is not None:
            penalty = r1_penalty(real_logits, perturbed, r1_std)
            metrics["fake_score/r1"] = penalty
            loss_gan = loss_gan + algorithm.r1_weight * algorithm.r1_interval * penalty
        loss = loss + algorithm.discriminator_weight * loss_gan
    metrics["fake_score/loss"] = loss
    return loss, {name: value.detach() for name, value in metrics.items()}


def _real_rows(networks: Networks, algorithm: Algorithm, batch: Batch, key: NoiseKey) -> tuple[_Noised, Tensor | None]:
    """Noised real samples, followed by their perturbed copies when R1 is due; and the perturbation's std (N,)."""
    assert batch.x0 is not None  # which the configuration's check has seen to
    real = _noise(networks, batch.x0, batch, key, Stream.GAN_REAL_TIME, algorithm.gan_t_range)
    if algorithm.r1_kind == "none" or key.step % algorithm.r1_interval:
        return real, None
    std = algorithm.r1_std * real.x_t.float().flatten(1).pow(2).mean(1).sqrt()
    both = r1_perturb(real.x_t, std, key=key.fork(Stream.R1), sample_ids=batch.sample_ids)
    doubled = {name: torch.cat([value, value]) for name, value in real.condition.items()}
    t, alpha, sigma = (torch.cat([value, value]) for value in (real.t, real.alpha, real.sigma))
    return _Noised(both, t, alpha, sigma, doubled), std


def _critic_pass(
    networks: Networks, algorithm: Algorithm, parts: list[_Noised], n: int, shared: bool
) -> tuple[Tensor, Tensor | None]:
    """One fake-score forward: a prediction for the first part, logits for [fake; real; perturbed real]."""
    first_logit_row = 0 if shared else n
    if not algorithm.adversarial or algorithm.features == "fake_score":
        x_t, t, condition = _join(*parts)
        return networks.fake_score(
            x_t, t, condition, decode_rows=n, logit_rows=slice(first_logit_row, None), logits=algorithm.adversarial
        )
    x_t, t, condition = _join(*(parts if shared else parts[1:]))
    with torch.no_grad():
        _, features = networks.teacher(x_t, t, condition, decode_rows=0, levels=algorithm.levels)
    x_t, t, condition = _join(parts[0])
    return networks.fake_score(x_t, t, condition, decode_rows=n, features=features)
