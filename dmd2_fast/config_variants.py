"""Combinations of the variants' settings that make no sense: a part of the table in config.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from dmd2_fast.config_schema import (
    AdversarialConfig,
    Config,
    FakeScoreConfig,
    GeneratorConfig,
    R1Config,
    TimeSamplingConfig,
)


@dataclass(frozen=True)
class Combination:
    """Settings that are fine one by one and make no sense together."""

    keys: tuple[str, ...]
    """The settings concerned, dotted, without the `dmd2_fast.` prefix."""
    clashes: Callable[[Config], bool]
    """Whether a configuration has the combination."""
    reason: str
    """Why it makes no sense, and what to do."""


READ_BY = {"mean": "log_normal", "std": "log_normal", "shift": "shifted"}
"""The kind of time sampling that reads a setting."""


UNREAD_SAMPLING = "mean and std are log_normal's, shift is shifted's: leave out what the kind does not read"


def has_unread(sampling: TimeSamplingConfig) -> bool:
    """Whether a setting of the time sampling is given that its kind does not read."""
    usual = TimeSamplingConfig()
    return any(
        getattr(sampling, item.name) != getattr(usual, item.name) and sampling.kind != READ_BY[item.name]
        for item in fields(sampling)
        if item.name in READ_BY
    )


def _stage(config: Config) -> Any:
    return config.deepspeed.get("zero_optimization", {}).get("stage")


def _exact_in_samples(config: Config) -> bool:
    r1 = config.adversarial.r1
    return r1.kind == "exact" and r1.input == "sample"


def _no_fake_score(config: Config) -> bool:
    return config.distribution_matching.weight == 0 and config.adversarial.features == "teacher"


def _unread_sampling(path: str, section: Callable[[Config], Any]) -> Combination:
    return Combination(
        (f"{path}.kind", *(f"{path}.{name}" for name in READ_BY)),
        lambda c: has_unread(section(c).time_sampling),
        UNREAD_SAMPLING,
    )


VARIANTS: tuple[Combination, ...] = (
    Combination(
        ("passes", "adversarial.time_sampling.kind"),
        lambda c: c.passes == "shared" and c.adversarial.time_sampling != AdversarialConfig.time_sampling,
        "shared passes read the GAN's logits at the noise levels of the DMD and denoising losses, so that "
        'adversarial.time_sampling would be ignored: leave it out, or set passes "independent"',
    ),
    Combination(
        ("distribution_matching.divergence", "passes"),
        lambda c: c.distribution_matching.divergence != "reverse_kl" and c.passes == "independent",
        "the density ratio is read from the head's logits at the DMD loss's own noised sample, which shared passes "
        'alone have: set passes "shared"',
    ),
    Combination(
        ("distribution_matching.divergence", "adversarial.discriminator_weight"),
        lambda c: c.distribution_matching.divergence != "reverse_kl" and c.adversarial.discriminator_weight == 0,
        "the density ratio is read from the GAN head, which is not trained: give discriminator_weight a weight "
        "(generator_weight may be 0)",
    ),
    Combination(
        ("distribution_matching.divergence", "distribution_matching.ratio_histogram"),
        lambda c: (
            c.distribution_matching.divergence == "reverse_kl" and c.distribution_matching.ratio_histogram is not None
        ),
        "reverse KL weighs all samples alike and reads no density ratio: leave ratio_histogram out",
    ),
    Combination(
        ("generator.input", "generator.steps"),
        lambda c: c.generator.input != "backward_simulation" and len(c.generator.steps) == 1,
        'the only input of a 1-step generator is pure noise: set input "backward_simulation"',
    ),
    Combination(
        ("generator.input", "generator.noised_data_share"),
        lambda c: c.generator.input != "mixed" and c.generator.noised_data_share != GeneratorConfig.noised_data_share,
        'the share is for a mixed input: leave it out, or set input "mixed"',
    ),
    Combination(
        ("adversarial.levels",),
        lambda c: len(set(c.adversarial.levels)) < len(c.adversarial.levels),
        "a level is named twice: each gets one head",
    ),
    Combination(
        ("adversarial.r1.kind", "adversarial.r1.std"),
        lambda c: c.adversarial.r1.kind == "exact" and c.adversarial.r1.std != R1Config.std,
        "the exact penalty perturbs nothing: leave std out",
    ),
    Combination(
        ("adversarial.r1.kind", "adversarial.r1.input"),
        lambda c: c.adversarial.r1.kind == "fastgen_compat" and c.adversarial.r1.input != R1Config.input,
        "FastGen's form perturbs samples: leave input out",
    ),
    Combination(
        ("adversarial.r1.kind", "adversarial.r1.input", "model.fused_operators"),
        lambda c: _exact_in_samples(c) and c.model.fused_operators,
        "the fused operators inside the networks have no double backward: set model.fused_operators false, r1.input "
        '"features" or r1.kind "approximate"',
    ),
    Combination(
        ("adversarial.r1.kind", "adversarial.r1.input", "model.activation_checkpointing", "model.compile"),
        lambda c: _exact_in_samples(c) and (c.model.activation_checkpointing or c.model.compile),
        'neither recomputed nor compiled blocks have a double backward: set both false, r1.input "features" or r1.kind '
        '"approximate"',
    ),
    Combination(
        ("adversarial.r1.kind", "adversarial.r1.input", "model.lora"),
        lambda c: _exact_in_samples(c) and c.model.lora is not None,
        'the base under the adapters is made for one backward through it: set r1.input "features" or r1.kind '
        '"approximate"',
    ),
    Combination(
        ("adversarial.r1.kind", "adversarial.r1.input"),
        lambda c: _exact_in_samples(c) and _stage(c) == 3,
        "the exact penalty in the samples is a double backward through the network that the head reads, which weights "
        'sharded by ZeRO stage 3 do not survive: set r1.input "features" (through the head alone), r1.kind '
        '"approximate" (which tends to the exact one), or zero_optimization.stage 1 or 2',
    ),
    Combination(
        ("distribution_matching.weight", "teacher.skip_layer_guidance"),
        lambda c: c.distribution_matching.weight == 0 and c.teacher.skip_layer_guidance is not None,
        "guidance acts in the DMD gradient alone, whose weight is 0: leave skip_layer_guidance out",
    ),
    Combination(
        ("teacher.skip_layer_guidance", "teacher.guidance_scale"),
        lambda c: c.teacher.skip_layer_guidance is not None and c.teacher.guidance_scale == 0,
        "scale 0 leaves the conditional prediction out, from which skip-layer guidance departs: set it above 0",
    ),
    Combination(
        ("teacher.skip_layer_guidance", "model.compile"),
        lambda c: c.teacher.skip_layer_guidance is not None and c.model.compile,
        "layers are left out by hooks inside blocks, which compiled blocks do not call: set model.compile false",
    ),
    Combination(
        ("distribution_matching.weight", "adversarial.features", "fake_score.t_range", "fake_score.time_sampling"),
        lambda c: (
            _no_fake_score(c)
            and (c.fake_score.t_range, c.fake_score.time_sampling)
            != (FakeScoreConfig.t_range, FakeScoreConfig.time_sampling)
        ),
        "with the teacher's features and no distribution matching no fake score is kept and nothing is denoised: "
        "leave its t_range and time_sampling out",
    ),
    Combination(
        ("fake_score.t_range",),
        lambda c: c.fake_score.t_range[0] >= c.fake_score.t_range[1],
        "the range is empty: expected [low, high] with low < high",
    ),
    _unread_sampling("distribution_matching.time_sampling", lambda c: c.distribution_matching),
    _unread_sampling("fake_score.time_sampling", lambda c: c.fake_score),
    _unread_sampling("adversarial.time_sampling", lambda c: c.adversarial),
)
"""Refused beside what config.py lists. Allowed on purpose: teacher features with distribution matching (FastGen), one
level or several of either network's features, f-divergences without a generator weight, a mixed or noised input without
a GAN, shared passes without distribution matching (the generator's logits are at its draws all the same)."""
