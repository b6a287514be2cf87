"""Loading a configuration: DeepSpeed's own JSON with one `dmd2_fast` section, checked before anything is built.

`load_config` refuses unknown keys, wrong types, values out of range and, from the one table below, combinations that
make no sense. Paths are taken as they are written, from the current folder.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from dmd2_fast.config_deepspeed import REFUSED_KEYS, TOP_LEVEL_KEYS, check_deepspeed, is_bf16, resolve_batch
from dmd2_fast.config_parse import (
    SCHEMA_KEY,
    SECTION,
    apply_overrides,
    field_names,
    parse,
    read_json_object,
    show,
    suggestion,
)
from dmd2_fast.config_schema import (
    AdversarialConfig,
    Config,
    DataConfig,
    DistributionMatchingConfig,
    FakeScoreConfig,
    GeneratorConfig,
    LoRAConfig,
    LRSchedulerConfig,
    ModelConfig,
    OptimizerConfig,
    R1Config,
    RatioHistogramConfig,
    RegressionConfig,
    RunConfig,
    Section,
    SkipLayerGuidanceConfig,
    TeacherConfig,
    TeacherTrainingConfig,
    TimeSamplingConfig,
)
from dmd2_fast.config_times import TIMES
from dmd2_fast.config_variants import VARIANTS, Combination
from dmd2_fast.errors import ConfigError

__all__ = [
    "COMBINATIONS",
    "AdversarialConfig",
    "Config",
    "DataConfig",
    "DistributionMatchingConfig",
    "FakeScoreConfig",
    "GeneratorConfig",
    "LRSchedulerConfig",
    "LoRAConfig",
    "ModelConfig",
    "OptimizerConfig",
    "R1Config",
    "RatioHistogramConfig",
    "RegressionConfig",
    "RunConfig",
    "SkipLayerGuidanceConfig",
    "TeacherConfig",
    "TeacherTrainingConfig",
    "TimeSamplingConfig",
    "load_config",
]

_UNET2D_ARGUMENTS = """
sample_size in_channels out_channels center_input_sample time_embedding_type time_embedding_dim freq_shift
flip_sin_to_cos down_block_types mid_block_type up_block_types block_out_channels layers_per_block
mid_block_scale_factor downsample_padding downsample_type upsample_type dropout act_fn attention_head_dim
norm_num_groups attn_norm_num_groups norm_eps resnet_time_scale_shift add_attention class_embed_type num_class_embeds
num_train_timesteps
"""
UNET2D_ARGUMENTS = frozenset(_UNET2D_ARGUMENTS.split())
"""diffusers.UNet2DModel's keyword arguments, listed so that checking a configuration does not import diffusers."""


def _not_decreasing(values: Sequence[float]) -> bool:
    return any(later >= earlier for earlier, later in itertools.pairwise(values))


def _steps_outside(config: Config, schedule: str, inside: Callable[[float], bool]) -> bool:
    training = config.teacher.training
    return training is not None and training.schedule == schedule and not all(map(inside, config.generator.steps))


def _no_labels(config: Config) -> bool:
    return config.teacher.training is not None and not config.teacher.training.network.get("num_class_embeds")


def _overlapping_folders(config: Config) -> bool:
    run = Path(config.run.folder).absolute()
    others = [Path(config.model.path).absolute(), Path(config.data.path).absolute()]
    return any(run == other or run in other.parents for other in others)


def _final_ratio_unused(scheduler: LRSchedulerConfig) -> bool:
    return scheduler.type == "constant" and scheduler.final_ratio != LRSchedulerConfig.final_ratio


R1_SPACINGS = 8
BF16_SPACING = 2**-7
"""Distance of neighbouring bf16 numbers, relative to their size (at most)."""


def _rounded_away(config: Config) -> bool:
    r1 = config.adversarial.r1
    return is_bf16(config.deepspeed) and r1.kind == "approximate" and r1.std < R1_SPACINGS * BF16_SPACING


def _is_pipeline(config: Config) -> bool:
    return config.model.kind != "unet2d"


def _same_folder(config: Config) -> bool:
    start = config.run.start_from
    return start is not None and Path(start).absolute() == Path(config.run.folder).absolute()


def _leaves_by_module(config: Config) -> bool:
    leaves = config.deepspeed.get("zero_optimization", {}).get("leaf_module")
    return bool(leaves) and config.run.gather != "network"


_OFF = "adversarial.discriminator_weight is 0, so the GAN head is never trained"

COMBINATIONS: tuple[Combination, ...] = (
    Combination(
        ("distribution_matching.weight", "adversarial.generator_weight"),
        lambda c: c.distribution_matching.weight == 0 and c.adversarial.generator_weight == 0,
        "both are 0, which leaves the generator without a loss: give one of them a weight",
    ),
    Combination(
        ("adversarial.generator_weight", "adversarial.discriminator_weight"),
        lambda c: c.adversarial.generator_weight > 0 and c.adversarial.discriminator_weight == 0,
        f"{_OFF}, and the generator would follow a random one: give it a weight, or set generator_weight 0 as well",
    ),
    Combination(
        ("adversarial.r1.kind", "adversarial.discriminator_weight"),
        lambda c: c.adversarial.r1.kind != "none" and c.adversarial.discriminator_weight == 0,
        f'{_OFF} and has nothing to be penalised for: set adversarial.r1.kind "none"',
    ),
    Combination(
        ("adversarial.r1.kind", "adversarial.r1.std"),
        _rounded_away,
        "the networks run in bf16, which rounds so small a perturbation of their input away and leaves the penalty a "
        f"measure of rounding: expected at least {R1_SPACINGS} spacings of bf16, {R1_SPACINGS * BF16_SPACING:g} of the "
        "sample's root mean square. Set adversarial.r1.std to .1, say, or train in f32",
    ),
    Combination(
        ("distribution_matching.weight", "teacher.guidance_scale"),
        lambda c: c.distribution_matching.weight == 0 and c.teacher.guidance_scale != 1,
        "guidance acts in the DMD gradient alone, whose weight is 0: set teacher.guidance_scale 1",
    ),
    Combination(
        ("teacher.guidance_scale", "teacher.training.label_dropout"),
        lambda c: (
            c.teacher.guidance_scale != 1 and c.teacher.training is not None and c.teacher.training.label_dropout == 0
        ),
        "a teacher trained without label dropout has never seen the empty label that guidance departs from: "
        "set teacher.training.label_dropout to .1, say, or teacher.guidance_scale 1",
    ),
    Combination(
        ("teacher.training.label_dropout", "teacher.training.network.num_class_embeds"),
        lambda c: c.teacher.training is not None and c.teacher.training.label_dropout > 0 and _no_labels(c),
        "a network without num_class_embeds has no labels to drop: set num_class_embeds, or label_dropout 0",
    ),
    Combination(
        ("passes", "adversarial.t_range"),
        lambda c: c.passes == "shared" and c.adversarial.t_range != AdversarialConfig.t_range,
        "shared passes read the GAN's logits at the noise levels of the DMD and denoising losses, so that "
        'adversarial.t_range would be ignored: leave it out, or set passes "independent"',
    ),
    Combination(
        ("generator.lr_scheduler.type", "generator.lr_scheduler.params.final_ratio"),
        lambda c: _final_ratio_unused(c.generator.lr_scheduler),
        "a constant rate has no final one: leave final_ratio out, or set type cosine",
    ),
    Combination(
        ("fake_score.lr_scheduler.type", "fake_score.lr_scheduler.params.final_ratio"),
        lambda c: _final_ratio_unused(c.fake_score.lr_scheduler),
        "a constant rate has no final one: leave final_ratio out, or set type cosine",
    ),
    Combination(
        ("generator.steps",),
        lambda c: _not_decreasing(c.generator.steps),
        "sampling goes from much noise to little: the steps must strictly decrease",
    ),
    Combination(
        ("generator.steps", "teacher.training.schedule"),
        lambda c: _steps_outside(c, "ddpm", lambda t: t == int(t) and t <= 999),
        "DDPM timesteps are whole numbers from 0 to 999",
    ),
    Combination(
        ("generator.steps", "teacher.training.schedule"),
        lambda c: _steps_outside(c, "karras", lambda sigma: 0 < sigma <= 80),
        "Karras steps are sigmas, above 0 and at most 80",
    ),
    Combination(
        ("generator.steps", "teacher.training.schedule"),
        lambda c: _steps_outside(c, "rectified_flow", lambda t: 0 < t <= 1),
        "rectified-flow steps are times, above 0 and at most 1",
    ),
    Combination(
        ("generator.steps", "model.kind"),
        lambda c: _is_pipeline(c) and not all(t == int(t) and t <= 999 for t in c.generator.steps),
        "SD1.5 and SDXL count noise in DDPM timesteps: whole numbers from 0 to 999",
    ),
    Combination(
        ("data.kind", "model.kind"),
        lambda c: _is_pipeline(c) != (c.data.kind == "latents"),
        "SD1.5 and SDXL are trained on latents with text embeddings, which `dmd2-fast prepare` makes (data.kind "
        "latents); a unet2d on labelled images (data.kind webdataset)",
    ),
    Combination(
        ("model.kind", "teacher.training"),
        lambda c: _is_pipeline(c) and c.teacher.training is not None,
        "`dmd2-fast teacher` trains a unet2d; a pipeline is taken as it is: leave teacher.training out",
    ),
    Combination(
        ("model.lora", "run.start_from"),
        lambda c: c.model.lora is not None and c.run.start_from is not None,
        "adapters start on the teacher's weights, which all networks share: leave one of the two out",
    ),
    Combination(
        ("run.start_from", "run.folder"),
        _same_folder,
        "a run cannot start from itself: an interrupted run goes on without start_from",
    ),
    Combination(
        ("distribution_matching.t_range",),
        lambda c: _not_decreasing(c.distribution_matching.t_range[::-1]),
        "the range is empty: expected [low, high] with low < high",
    ),
    Combination(
        ("adversarial.t_range",),
        lambda c: _not_decreasing(c.adversarial.t_range[::-1]),
        "the range is empty: expected [low, high] with low < high",
    ),
    Combination(
        ("regression.weight", "regression.warmup_iterations", "regression.path"),
        lambda c: c.regression.is_on and c.regression.path is None,
        "regression has no pairs to learn from: name the folder that `dmd2-fast pairs` writes as regression.path",
    ),
    Combination(
        ("run.sample_prompts", "model.kind"),
        lambda c: bool(c.run.sample_prompts) and not _is_pipeline(c),
        "a unet2d knows classes, which its grids show in turn, and takes no prompts: leave sample_prompts out",
    ),
    Combination(
        ("run.gather",),
        _leaves_by_module,
        "zero_optimization.leaf_module makes ZeRO-3 gather whole blocks, and it frees them before the backward through "
        'the frozen fake score needs them: set run.gather "network", or leave leaf_module out',
    ),
    Combination(
        ("run.folder", "model.path", "data.path"),
        _overlapping_folders,
        "the run folder holds the teacher's or the data's, which --fresh would move away with it: give it its own",
    ),
    *VARIANTS,
    *TIMES,
)
"""Every combination that is refused. Allowed on purpose: a discriminator without a generator weight (it warms up, and
its features train the fake score); shared passes with teacher features (the generator's logits come from the teacher's
conditional forward at the DMD draw); a warm-up longer than the run (a smoke test)."""


def _value_at(config: Config, dotted: str) -> Any:
    value: Any = config.to_dict()[SECTION]
    for name in dotted.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _check_combinations(config: Config) -> None:
    for combination in COMBINATIONS:
        if combination.clashes(config):
            settings = ", ".join(f"{key} {show(_value_at(config, key))}" for key in combination.keys)
            raise ConfigError(f"{SECTION}: {settings}: {combination.reason}.")


def _check_network(section: Section) -> None:
    training = section.teacher.training
    for name in training.network if training else ():
        if name not in UNET2D_ARGUMENTS:
            near = suggestion(name, UNET2D_ARGUMENTS)
            path = f"{SECTION}.teacher.training.network.{name}"
            raise ConfigError(f'unknown key "{path}"{near}: diffusers\' UNet2DModel takes no such argument.')


def load_config(path: str | Path, overrides: Sequence[str] = (), world_size: int = 1) -> Config:
    """Read, override and check a configuration.

    Args:
        path: the JSON file.
        overrides: `dotted.key=value` texts, as after `--set`; the `dmd2_fast.` prefix may be left out.
        world_size: ranks that the batch is split over.

    Raises:
        ConfigError: anything wrong, in one message that names the key.
    """
    return config_from_dict(apply_overrides(read_json_object(Path(path)), overrides, field_names(Section)), world_size)


def config_from_dict(raw: dict[str, Any], world_size: int = 1) -> Config:
    """`load_config` from an object in memory. Raises ConfigError."""
    raw = {key: value for key, value in raw.items() if key != SCHEMA_KEY}
    if SECTION not in raw:
        strangers = [key for key in raw if key not in TOP_LEVEL_KEYS]
        near = next((key for key in strangers if suggestion(key, [SECTION])), None)
        hint = f' (is "{near}" meant?)' if near else ""
        raise ConfigError(f'the section "{SECTION}" is missing{hint}: it holds everything that is not DeepSpeed\'s.')
    for key in raw:
        if key in field_names(Section) and key not in REFUSED_KEYS:
            raise ConfigError(f'"{key}" stands at DeepSpeed\'s top level: put it into the section "{SECTION}".')
    deepspeed = {key: value for key, value in raw.items() if key != SECTION}
    check_deepspeed(deepspeed, field_names(Section))
    micro_batch_size, accumulation = resolve_batch(deepspeed, world_size)
    section = parse(Section, raw[SECTION], SECTION)
    _check_network(section)
    config = Config(
        **{item.name: getattr(section, item.name) for item in fields(Section)},
        deepspeed=deepspeed,
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=accumulation,
        world_size=world_size,
    )
    _check_combinations(config)
    return config
