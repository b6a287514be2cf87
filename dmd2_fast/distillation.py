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

Variants are settings of `Algorithm`: a term of weight 0 costs no pass.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .algorithm import Algorithm
from .data.batch import Batch
from .denoiser import Condition, SkipLayers, concat_conditions
from .f_divergence import Divergence
from .fake_score import FakeScore
from .gradient_penalty import Penalised, penalised
from .noised import Noised, joined, noised
from .ops.denoising import denoising_loss
from .ops.dmd import dmd_loss
from .ops.gan import gan_discriminator_loss, gan_generator_loss
from .ops.noise import predict_x0
from .random import NoiseKey, Stream
from .rollout import from_data, generator_input, noised_data_input
from .schedules import Schedule

__all__ = ["Algorithm", "FakeScore", "Measure", "Networks", "fake_score_loss", "generate", "generator_loss"]

Measure = Callable[[Tensor, Any], Tensor]
"""(samples, targets), both (N, C, H, W) f32, to their mean distance."""


@dataclass
class Networks:
    """The three networks of a step. `generator` and `fake_score` may be engines; `teacher` is frozen."""

    generator: Callable[..., Any]
    fake_score: Callable[..., Any]
    teacher: Callable[..., Any]
    schedule: Schedule
    prediction_type: str
    unconditional: Callable[[Condition], Condition]


@lru_cache(maxsize=8)
def _steps(schedule: Schedule, values: tuple[float, ...], device: torch.device) -> Tensor:
    """The step list on the device: made once, because copying it there waits for the device."""
    return schedule.steps(values, device)


# --- the generator ----------------------------------------------------------------------------------------------------


def generate(
    networks: Networks, algorithm: Algorithm, batch: Batch, key: NoiseKey, *, rollout=None, pairs: Batch | None = None
) -> Tensor:
    """The generator's sample x (N, *) f32 for this step, with a graph if gradients are on.

    `rollout` is the generator as the chain without gradient calls it (an engine's bare module; default: itself).
    `pairs`: a teacher's, whose noise goes through the same forward; their samples are the last rows.
    """
    steps = _steps(networks.schedule, algorithm.steps, batch.sample_ids.device)
    x_in, t = _input(networks, algorithm, steps, batch, key, rollout or networks.generator)
    condition = batch.condition
    if pairs is not None:
        noise, first = _pair_input(networks, steps, pairs)
        x_in, t = torch.cat([x_in, noise]), torch.cat([t, first])
        condition = concat_conditions(condition, pairs.condition)
    prediction, _ = networks.generator(x_in, t, condition)  # a graph, where gradients are on
    alpha, sigma = networks.schedule.coefficients(t)
    return predict_x0(x_in, prediction, alpha, sigma, prediction_type=networks.prediction_type)


def _input(
    networks: Networks, algorithm: Algorithm, steps: Tensor, batch: Batch, key: NoiseKey, call: Callable[..., Any]
) -> tuple[Tensor, Tensor]:
    """(x_t (N, *), t (N,)) that the generator gets, of the kind that `algorithm.input` names."""
    ids, mode = batch.sample_ids, algorithm.rollout_index
    from_real = None
    if algorithm.input != "backward_simulation":
        assert batch.x0 is not None  # which the configuration's check has seen to
        from_real = noised_data_input(networks.schedule, steps, batch.x0, ids, key, mode=mode)
        if algorithm.input == "noised_data":
            return from_real
    shape, generator = batch.sample_shape, _Rollout(call, networks)
    simulated, t = generator_input(generator, steps, batch.condition, ids, shape, key, mode=mode)
    if from_real is None:
        return simulated, t
    chosen = from_data(algorithm.noised_data_share, ids, key).reshape(-1, *[1] * len(shape))
    return torch.where(chosen, from_real[0], simulated), t  # at the same steps


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


def generator_loss(
    networks: Networks,
    algorithm: Algorithm,
    batch: Batch,
    key: NoiseKey,
    *,
    rollout=None,
    pairs: Batch | None = None,
    measure: Measure = F.mse_loss,
    divergence: Divergence | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(loss, x detached (N, *), metrics). Only the generator may require gradients: freeze the other two around it.

    `pairs`: a teacher's, for the regression loss by `measure` (regression.py). `divergence`: the weights of
    f-distill with their running means (default: new ones; not read for reverse KL).
    """
    x = generate(networks, algorithm, batch, key, rollout=rollout, pairs=pairs)
    x, paired = x[: len(batch)], x[len(batch) :]
    shared = algorithm.passes == "shared"
    dmd = gan = None
    if algorithm.matching or shared:
        dmd = noised(networks.schedule, x, batch, key, Stream.DMD_TIME, (algorithm.dmd_t_range, algorithm.dmd_sampling))
    if algorithm.generator_logits:
        draws = algorithm.gan_t_range, algorithm.gan_sampling
        gan = dmd if shared else noised(networks.schedule, x, batch, key, Stream.GAN_FAKE_TIME, draws)
    matched = dmd if algorithm.matching else None
    teacher, teacher_uncond, features = _teacher_pass(networks, algorithm, matched, gan)
    fake, logits = _fake_score_pass(networks, algorithm, matched, gan, features)

    terms, metrics = [], {}
    if matched is not None:
        loss_dmd = dmd_loss(
            x, matched.x_t.detach(), fake, teacher, teacher_uncond,
            alpha=matched.alpha, sigma=matched.sigma, prediction_type=networks.prediction_type,
            guidance_scale=algorithm.guidance_scale,
            sample_weight=_divergence_weights(algorithm, divergence, logits, matched),
        )  # fmt: skip
        terms.append(algorithm.dmd_weight * loss_dmd)
        metrics["generator/dmd"] = loss_dmd
    if gan is not None and algorithm.generator_weight:
        loss_gan = gan_generator_loss(logits)
        terms.append(algorithm.generator_weight * loss_gan)
        metrics["generator/gan"] = loss_gan
    if pairs is not None:
        loss_regression = measure(paired, pairs.x0)
        terms.append(algorithm.regression_weight * loss_regression)
        metrics["generator/regression"] = loss_regression
    loss = metrics["generator/loss"] = torch.stack(terms).sum() if len(terms) > 1 else terms[0]
    return loss, x.detach(), {name: value.detach() for name, value in metrics.items()}


def _divergence_weights(
    algorithm: Algorithm, divergence: Divergence | None, logits: Tensor | None, dmd: Noised
) -> Tensor | None:
    divergence = divergence or Divergence.of(algorithm)
    if divergence is None:
        return None
    assert logits is not None  # which the configuration's check has seen to: they are of these very rows
    return divergence.weights(logits.detach(), dmd.u)


def _teacher_pass(
    networks: Networks, algorithm: Algorithm, dmd: Noised | None, gan: Noised | None
) -> tuple[Tensor | None, Tensor | None, tuple[Tensor, ...] | None]:
    """One teacher forward: conditional and unconditional predictions at `dmd`, features of the rows of `gan`.

    Rows: [dmd conditional; dmd unconditional; dmd without some layers; gan of its own draw]. Features carry a graph to
    x, predictions none. Skip-layer guidance is in the conditional prediction: see `_skip_guided`.
    """
    wanted = gan if algorithm.features == "teacher" else None
    guided, parts, options = algorithm.guidance_scale != 1.0, [], {}
    if dmd is not None:
        n = len(dmd)
        parts.append(dmd if wanted is dmd else dmd.detached())
        if guided:
            parts.append(dmd.detached(networks.unconditional(dmd.condition)))
        if algorithm.skip_scale:
            options["skip"] = SkipLayers(algorithm.skip_layers, n * len(parts), n * (len(parts) + 1))
            parts.append(dmd.detached())
    num_predictions = len(parts)
    if wanted is not None and wanted is not dmd:
        parts.append(wanted)
    if not parts:
        return None, None, None
    x_t, t, condition = joined(parts)
    with torch.set_grad_enabled(wanted is not None and torch.is_grad_enabled()):
        prediction, features = networks.teacher(
            x_t, t, condition, decode_rows=num_predictions * len(parts[0]), decode_grad=False,
            levels=() if wanted is None else algorithm.levels, **options,
        )  # fmt: skip
    if wanted is not None:
        rows = slice(0, len(wanted)) if wanted is dmd else slice(-len(wanted), None)
        features = tuple(feature[rows] for feature in features)
    if dmd is None:
        return None, None, features
    cond, *others = prediction.chunk(num_predictions)
    uncond = others[0] if guided else None
    if algorithm.skip_scale:
        cond = _skip_guided(algorithm, cond, others[-1])
    return cond, uncond, features if wanted is not None else None


def _skip_guided(algorithm: Algorithm, cond: Tensor, without: Tensor) -> Tensor:
    """A conditional prediction with which classifier-free guidance gives T + skip_scale (cond - without)."""
    share = algorithm.skip_scale / (algorithm.guidance_scale if algorithm.guidance_scale != 1.0 else 1.0)
    return cond + share * (cond - without)


def _fake_score_pass(
    networks: Networks,
    algorithm: Algorithm,
    dmd: Noised | None,
    gan: Noised | None,
    features: tuple[Tensor, ...] | None,
) -> tuple[Tensor | None, Tensor | None]:
    """The fake score's predictions at `dmd` without a graph, logits at `gan` with one to x. Rows: [dmd; gan]."""
    own = gan if algorithm.features == "fake_score" else None
    parts = [] if dmd is None else [dmd if own is dmd else dmd.detached()]
    if own is not None and own is not dmd:
        parts.append(own)
    if not parts and gan is None:
        return None, None
    x_t, t, condition = joined(parts)
    adversarial = gan is not None and algorithm.generator_weight > 0
    with torch.set_grad_enabled(adversarial and torch.is_grad_enabled()):
        prediction, logits, _ = networks.fake_score(
            x_t, t, condition, decode_rows=0 if dmd is None else len(dmd), decode_grad=False,
            logit_rows=slice(0 if own is None else -len(own), None), features=features, logits=gan is not None,
        )  # fmt: skip
    return prediction, logits


# --- the fake score and its head --------------------------------------------------------------------------------------


def fake_score_loss(
    networks: Networks, algorithm: Algorithm, batch: Batch, x: Tensor, key: NoiseKey
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) of the fake score and its head on the generator's samples x (N, *), which get no gradient."""
    x, n = x.detach(), len(x)
    shared = algorithm.passes == "shared"
    denoised: Noised | None = None
    judged: Noised | None = None
    real: Penalised | None = None
    if algorithm.keeps_fake_score or shared:
        draws = algorithm.denoising_t_range, algorithm.denoising_sampling
        denoised = noised(networks.schedule, x, batch, key, Stream.DENOISING_TIME, draws)
    if algorithm.adversarial:
        draws = algorithm.gan_t_range, algorithm.gan_sampling
        judged = denoised if shared else noised(networks.schedule, x, batch, key, Stream.GAN_FAKE_TIME, draws)
        assert batch.x0 is not None  # which the configuration's check has seen to
        rows = noised(networks.schedule, batch.x0, batch, key, Stream.GAN_REAL_TIME, algorithm.gan_draws)
        real = penalised(algorithm, rows, batch, key)
    prediction, logits, penalty = _critic_pass(networks, algorithm, denoised, judged, real)

    terms, metrics = [], {}
    if denoised is not None and algorithm.keeps_fake_score:
        weight = networks.schedule.loss_weight(denoised.t, networks.prediction_type)
        loss_denoising = denoising_loss(
            prediction, x, denoised.alpha, denoised.sigma, prediction_type=networks.prediction_type,
            key=key.fork(Stream.DENOISING_NOISE), sample_ids=batch.sample_ids, sample_weight=weight,
        )  # fmt: skip
        terms.append(loss_denoising)
        metrics["fake_score/denoising"] = loss_denoising
    if real is not None:
        assert logits is not None
        fake_logits, real_logits = logits[:n], logits[n : 2 * n]
        loss_gan = gan_discriminator_loss(real_logits, fake_logits)
        metrics |= {"fake_score/gan": loss_gan, "logits/real": real_logits.mean(), "logits/fake": fake_logits.mean()}
        if penalty is not None:
            metrics["fake_score/r1"] = penalty
            loss_gan = loss_gan + algorithm.r1_weight * algorithm.r1_interval * penalty
        terms.append(algorithm.discriminator_weight * loss_gan)
    loss = metrics["fake_score/loss"] = torch.stack(terms).sum() if len(terms) > 1 else terms[0]
    return loss, {name: value.detach() for name, value in metrics.items()}


def _critic_pass(
    networks: Networks, algorithm: Algorithm, denoised: Noised | None, judged: Noised | None, real: Penalised | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """One fake-score forward: predictions for `denoised`, logits for [judged; real; perturbed real], R1 in features."""
    parts = [] if denoised is None or not algorithm.keeps_fake_score else [denoised]
    options: dict[str, Any] = {"decode_rows": sum(len(part) for part in parts), "logits": real is not None}
    attention: Callable[[], Any] = nullcontext
    if judged is not None and real is not None:
        critic = [judged, real.rows]
        options |= {"penalty": real.feature_penalty, "penalty_rows": len(judged)}
        if (of_logits := real.penalty) is not None:
            n = len(judged)
            options["logit_penalty"] = lambda logits: of_logits(logits[n : 2 * n], logits[2 * n :])
        if real.double_backward:  # which no other kernel of attention has
            attention = partial(sdpa_kernel, SDPBackend.MATH)
        if algorithm.features == "teacher":
            x_t, t, condition = joined(critic)
            with torch.set_grad_enabled(real.double_backward), attention():
                _, options["features"] = networks.teacher(x_t, t, condition, decode_rows=0, levels=algorithm.levels)
        else:
            own = critic[1:] if judged is denoised else critic
            parts, options["logit_rows"] = parts + own, slice(-sum(len(part) for part in critic), None)
    x_t, t, condition = joined(parts)
    with attention():
        return networks.fake_score(x_t, t, condition, **options)
