"""Few-step sampling, and the same chain as the generator's training input (backward simulation).

Step i denoises, x0 = G(x_i, t_i), and noises again to the next step, x_{i+1} = alpha_{i+1} x0 + sigma_{i+1} n, with
fresh noise: LCM-type sampling (Yin et al. 2024, section 4.4). In training the generator gets the x_k that its own steps
0..k-1 made, without gradient. Noise is keyed: stream GENERATOR_INPUT at the start, ROLLOUT_STEP + i after step i.
Also here: the teacher's samplers, Euler and Heun on the probability-flow ODE.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .denoiser import Condition, Denoiser, SkipLayers, concat_conditions
from .ops.noise import add_noise, predict_x0, renoise
from .random import NoiseKey, Stream, philox_normal, philox_uniform
from .schedules import Schedule

Predict = Callable[[Tensor, Tensor, Condition], Tensor]


def initial_noise(schedule: Schedule, steps: Tensor, sample_ids: Tensor, shape: tuple[int, ...], key: NoiseKey):
    """The first input of the chain: pure noise (N, *shape) f32."""
    noise = philox_normal(sample_ids, shape, key.fork(Stream.GENERATOR_INPUT), torch.float32)
    return noise * schedule.init_sigma(steps[:1]).to(noise.device)


def chain(
    predict: Predict,
    schedule: Schedule,
    prediction_type: str,
    steps: Tensor,
    x: Tensor,
    condition: Condition,
    sample_ids: Tensor,
    key: NoiseKey,
) -> Iterator[Tensor]:
    """The inputs of steps 0, 1, ..., K - 1 and last the sample: K + 1 tensors (N, *). Lazy: take what you need."""
    for i, step in enumerate(steps):
        yield x
        t = step.expand(len(x))
        alpha, sigma = schedule.coefficients(t)
        prediction = predict(x, t, condition)
        if i + 1 == len(steps):
            yield predict_x0(x, prediction, alpha, sigma, prediction_type=prediction_type)
            return
        next_alpha, next_sigma = schedule.coefficients(steps[i + 1].expand(len(x)))
        x = renoise(
            x, prediction, alpha, sigma, next_alpha, next_sigma,
            prediction_type=prediction_type, key=key.fork(Stream.ROLLOUT_STEP + i), sample_ids=sample_ids,
        )  # fmt: skip


@torch.no_grad()
def sample(
    generator: Denoiser, steps: Tensor, condition: Condition, sample_ids: Tensor, shape: tuple[int, ...], key: NoiseKey
) -> Tensor:
    """Images or latents (N, *shape) f32 of a few-step generator."""
    x = initial_noise(generator.schedule, steps, sample_ids, shape, key)
    schedule, prediction_type = generator.schedule, generator.prediction_type
    *_, x = chain(generator.predict, schedule, prediction_type, steps, x, condition, sample_ids, key)
    return x


def rollout_index(num_steps: int, mode: str, sample_ids: Tensor, key: NoiseKey) -> Tensor:
    """The trained step, (N,) int64 in [0, num_steps): one for the whole batch (equal on all ranks) or per sample."""
    ids = torch.zeros_like(sample_ids) if mode == "batch" else sample_ids
    u = philox_uniform(ids, (1,), key.fork(Stream.ROLLOUT_INDEX))[:, 0]
    return (u * num_steps).long().clamp_(max=num_steps - 1)


@torch.no_grad()
def generator_input(
    generator: Denoiser,
    steps: Tensor,
    condition: Condition,
    sample_ids: Tensor,
    shape: tuple[int, ...],
    key: NoiseKey,
    *,
    mode: str = "batch",
) -> tuple[Tensor, Tensor]:
    """The generator's input (N, *shape) f32 and times (N,) for this step, by backward simulation.

    mode "batch": one step index, k forwards; "sample": an index for each sample out of one full chain, always K - 1
    forwards, so that every step is in every batch.
    """
    x = initial_noise(generator.schedule, steps, sample_ids, shape, key)
    if len(steps) == 1:
        return x, steps.expand(len(x))
    schedule, prediction_type = generator.schedule, generator.prediction_type
    inputs = chain(generator.predict, schedule, prediction_type, steps, x, condition, sample_ids, key)
    if mode == "batch":
        # Needed on the host, so drawn there: the integers are the same on every device and rank, and every rank runs
        # as many forwards.
        last = int(rollout_index(len(steps), mode, torch.zeros(1, dtype=torch.int64), key))
        return next(itertools.islice(inputs, last, None)), steps[last].expand(len(x))
    index = rollout_index(len(steps), mode, sample_ids, key)
    chosen = x
    for i, x_i in zip(range(len(steps)), inputs, strict=False):
        chosen = torch.where(_rows(index == i, x_i), x_i, chosen)
    return chosen, steps[index]


@torch.no_grad()
def noised_data_input(
    schedule: Schedule, steps: Tensor, x0: Tensor, sample_ids: Tensor, key: NoiseKey, *, mode: str = "batch"
) -> tuple[Tensor, Tensor]:
    """The same from real samples x0 (N, *): noised to a step's time, and pure noise where that is the first step.

    No forwards. The step indices are those of `generator_input`.
    """
    index = rollout_index(len(steps), mode, sample_ids, key)
    t = steps[index]
    alpha, sigma = schedule.coefficients(t)
    x_t = add_noise(x0.float(), alpha, sigma, key=key.fork(Stream.INPUT_NOISE), sample_ids=sample_ids)
    noise = initial_noise(schedule, steps, sample_ids, tuple(x0.shape[1:]), key)
    return torch.where(_rows(index == 0, x0), noise, x_t), t


def from_data(share: float, sample_ids: Tensor, key: NoiseKey) -> Tensor:
    """Which samples (N,) bool of a mixed input are noised data: each with this probability."""
    return philox_uniform(sample_ids, (1,), key.fork(Stream.INPUT_SOURCE))[:, 0] <= share


def _rows(mask: Tensor, x: Tensor) -> Tensor:
    """mask (N,) for use beside x (N, *)."""
    return mask.reshape(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class Guidance:
    """How a teacher's prediction is guided, in any prediction type: the formulas are linear in it.

    uncond + scale (cond - uncond) + skip_scale (cond - without layers); scale 1 and skip_scale 0 leave theirs out.
    """

    scale: float = 1.0
    skip_scale: float = 0.0
    skip_layers: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: Any) -> Guidance:
        """A run's, from its config's section `teacher`."""
        skip = config.teacher.skip_layer_guidance
        if skip is None:
            return cls(config.teacher.guidance_scale)
        return cls(config.teacher.guidance_scale, skip.scale, tuple(skip.layers))


UNGUIDED = Guidance()


def guided(teacher: Denoiser, guidance: Guidance = UNGUIDED) -> Predict:
    """The teacher's guided prediction (N, *) in one batched forward."""

    def predict(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        n, conditions, options = len(x_t), [condition], {}
        if guidance.scale != 1.0:
            conditions.append(teacher.unconditional(condition))
        if guidance.skip_scale:
            options["skip"] = SkipLayers(guidance.skip_layers, n * len(conditions), n * (len(conditions) + 1))
            conditions.append(condition)
        num = len(conditions)
        rows = teacher(torch.cat([x_t] * num), torch.cat([t] * num), concat_conditions(*conditions), **options)[0]
        cond, *others = rows.chunk(num)
        result = cond if guidance.scale == 1.0 else others[0] + guidance.scale * (cond - others[0])
        return result + guidance.skip_scale * (cond - others[-1]) if guidance.skip_scale else result

    return predict


def denoiser_of(teacher: Denoiser, guidance: Guidance = UNGUIDED) -> Predict:
    """x0 (N, *) f32 of the guided teacher at (x_t, t, condition)."""
    predict = guided(teacher, guidance)

    def denoise(x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        alpha, sigma = teacher.schedule.coefficients(t)
        return predict_x0(x_t, predict(x_t, t, condition), alpha, sigma, prediction_type=teacher.prediction_type)

    return denoise


@torch.no_grad()
def sample_ode(
    denoise: Predict, schedule: Schedule, times: Tensor, x: Tensor, condition: Condition, *, heun: bool
) -> Tensor:
    """Solve a teacher's probability-flow ODE, dx = x0 d alpha + eps d sigma, from x (N, *) at times[0] down to x0.

    `denoise` gives x0 (N, *) at (x_t, t (N,), condition); times (K,) go from much noise to little. Euler (DDIM) takes K
    evaluations; Heun two a step but for the last one: 18 steps are 35. With alpha = 1 these are EDM's (Karras et al.
    2022, algorithm 1).
    """

    def point(x_t: Tensor, i: int) -> tuple[Tensor, Tensor]:
        x0 = denoise(x_t, times[i].expand(len(x_t)), condition)
        return x0, (x_t - alphas[i] * x0) / sigmas[i]

    alphas, sigmas = schedule.coefficients(times)
    alphas, sigmas = torch.cat([alphas, torch.ones_like(alphas[:1])]), torch.cat([sigmas, torch.zeros_like(sigmas[:1])])
    for i in range(len(times)):
        x0, eps = point(x, i)
        proposal = alphas[i + 1] * x0 + sigmas[i + 1] * eps
        if heun and i + 1 < len(times):
            next_x0, next_eps = point(proposal, i + 1)
            change = (alphas[i + 1] - alphas[i]) * (x0 + next_x0) + (sigmas[i + 1] - sigmas[i]) * (eps + next_eps)
            proposal = x + change / 2
        x = proposal
    return x
