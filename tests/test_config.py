"""Configurations: what is read, what is refused and what the message says, batches over ranks, the shipped files."""

import dataclasses
import inspect
import json
from pathlib import Path

import pytest
from test_config_times import TIME_CLASHES
from test_config_variants import VARIANT_CLASHES

from dmd2_fast import config_deepspeed
from dmd2_fast.config import COMBINATIONS, UNET2D_ARGUMENTS, Config, config_from_dict, load_config
from dmd2_fast.config_deepspeed import (
    REFUSED_KEYS,
    STAGE_3_KEYS,
    TOP_LEVEL_KEYS,
    ZERO_KEYS,
    resolve_batch,
    shards_weights,
)
from dmd2_fast.config_schema import LoRAConfig, Section
from dmd2_fast.errors import ConfigError, UserError

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "ds_digits.json"
MINIMAL = {
    "train_batch_size": 8,
    "zero_optimization": {"stage": 3},
    "dmd2_fast": {
        "model": {"path": "teacher"},
        "generator": {"steps": [999, 749, 499, 249]},
        "data": {"path": "data"},
        "run": {"folder": "runs/x"},
    },
}


def refusal(*overrides: str, world_size: int = 1) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(DIGITS, overrides, world_size)
    return str(error.value)


def test_the_digits_recipe():
    """The one that docs/design.md explains; docs/results.md has its figures."""
    config = load_config(DIGITS)
    assert config.generator.steps == (5.0, 1.6, 0.6, 0.2) and config.generator.rollout_index == "sample"
    assert config.generator.optimizer.lr == 1.5e-4 and config.fake_score.optimizer.lr == 5e-4
    assert config.generator.optimizer.betas == (0.0, 0.999) and config.generator.optimizer.weight_decay == 0.01
    for network in (config.generator, config.fake_score):
        assert network.lr_scheduler.type == "cosine" and network.lr_scheduler.final_ratio == 0.1
        assert network.lr_scheduler.warmup_iterations == 10 * config.fake_score.ttur_ratio
        assert network.gradient_clipping == 10
    assert config.adversarial.generator_weight == config.adversarial.discriminator_weight == 0.1
    assert config.passes == "shared" and config.generator.ema == 0.985
    assert config.distribution_matching.t_range == (0.3, 0.55)
    assert config.run.gather == "network" and config.global_batch_size == 64
    assert config.deepspeed["zero_optimization"]["stage"] == 3


def test_the_one_step_config_shares_teacher_and_data_but_not_the_run_folder():
    four, one = load_config(DIGITS), load_config(ROOT / "configs/ds_digits_1step.json")
    assert one.generator.steps == (2.5,)
    assert (one.teacher, one.model, one.data) == (four.teacher, four.model, four.data)
    assert one.deepspeed == four.deepspeed and one.run.folder != four.run.folder


PUBLISHED = {
    # rate, global batch, guidance, ratio, generator's GAN weight, steps: the published recipes
    "ds_sdxl.json": (5e-7, 128, 8, 5, 5e-3, (999, 749, 499, 249)),
    "configs/ds_sdxl_1step.json": (5e-7, 128, 8, 5, 5e-3, (399,)),
    "configs/ds_sdxl_lora.json": (5e-5, 128, 8, 5, 5e-3, (999, 749, 499, 249)),
    "configs/ds_sdxl_1gpu.json": (5e-7, 128, 8, 5, 5e-3, (999, 749, 499, 249)),
    "configs/ds_sdxl_1gpu_nvme.json": (5e-7, 128, 8, 5, 5e-3, (999, 749, 499, 249)),
    "configs/ds_sdxl_2gpu.json": (5e-7, 128, 8, 5, 5e-3, (999, 749, 499, 249)),
    "configs/ds_sd15_stage1.json": (1e-5, 2048, 1.75, 10, 0, (999,)),
    "configs/ds_sd15_stage2.json": (5e-7, 2048, 1.75, 10, 1e-3, (999,)),
    "configs/ds_imagenet64_stage1.json": (2e-6, 280, 1, 5, 0, (80,)),
    "configs/ds_imagenet64_stage2.json": (5e-7, 280, 1, 5, 3e-3, (80,)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes(name):
    """Yin et al. 2024, appendix; AdamW (.9, .999), decay .01, 500 iterations of warm-up, clipping at 10, bf16."""
    rate, batch, guidance, ratio, gan, steps = PUBLISHED[name]
    config = load_config(ROOT / name)
    for network in (config.generator, config.fake_score):
        assert network.optimizer.lr == rate and network.optimizer.weight_decay == 0.01
        assert network.optimizer.betas == (0.9, 0.999) and network.gradient_clipping == 10
        assert network.lr_scheduler.type == "constant" and network.lr_scheduler.warmup_iterations == 500
    assert config.global_batch_size == batch == config.deepspeed["train_batch_size"]
    assert config.deepspeed["bf16"] == {"enabled": True}
    assert (config.teacher.guidance_scale, config.fake_score.ttur_ratio) == (guidance, ratio)
    assert config.adversarial.generator_weight == gan and config.generator.steps == steps
    assert config.adversarial.discriminator_weight == (1e-2 if gan else 0)
    assert config.distribution_matching.t_range == (0.02, 0.98)
    assert config.model.lora == (LoRAConfig(rank=64, alpha=8) if "lora" in name else None)


def test_defaults_are_the_paper_s_sdxl_recipe():
    config = config_from_dict(MINIMAL)
    assert config.generator.optimizer.lr == config.fake_score.optimizer.lr == 5e-7
    assert config.generator.optimizer.betas == (0.9, 0.999) and config.generator.optimizer.weight_decay == 0.01
    assert config.generator.lr_scheduler.type == "constant" and config.generator.lr_scheduler.warmup_iterations == 500
    assert config.fake_score.ttur_ratio == 5 and config.passes == "independent"
    assert config.adversarial.generator_weight == 5e-3 and config.adversarial.discriminator_weight == 1e-2
    assert config.teacher.guidance_scale == 1 and config.teacher.training is None


@pytest.mark.parametrize("overrides", [(), ("generator.ema=null", "teacher.training=null", "generator.steps=[0.7]")])
def test_to_dict_loads_again_as_the_same(tmp_path, overrides):
    config = load_config(DIGITS, overrides, 2)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert load_config(path, (), 2) == config


def test_a_partial_optimizer_keeps_the_defaults_of_its_place():
    raw = json.loads(json.dumps(MINIMAL))
    raw["dmd2_fast"]["generator"]["steps"] = [5]
    raw["dmd2_fast"]["teacher"] = {"training": {"network": {"sample_size": 4}, "optimizer": {"params": {"eps": 1e-6}}}}
    optimizer = config_from_dict(raw).teacher.training.optimizer
    assert optimizer.eps == 1e-6 and optimizer.lr == 1e-3
    assert config_from_dict(raw).generator.optimizer.lr == 5e-7


def test_configurations_are_frozen():
    config = load_config(DIGITS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.run.seed = 3


REFUSED = {
    # Unknown keys, with the nearest known one.
    "generator.stpes=[1]": ('"dmd2_fast.generator.stpes"', '"steps"'),
    "adversarial.r1.weigt_=1": ('"dmd2_fast.adversarial.r1.weigt_"', '"weight"'),
    "zero_optimisation={}": ('"zero_optimisation"', '"zero_optimization"'),
    "zero_optimization.stage3_max_live_parameter=1": ('"stage3_max_live_parameters"',),
    "generatorr.ema=0.9": ('"generatorr"', '"generator"'),
    "generator.optimizer.lr=1": ("dmd2_fast.generator.optimizer.params",),
    "generator.optimizer.params.beta=1": ('"betas"',),
    "teacher.training.network.class_embeds=3": ("UNet2DModel", '"num_class_embeds"'),
    # Types.
    "run.iterations=1.5": ("dmd2_fast.run.iterations", "1.5", "whole number"),
    "run.iterations=many": ("dmd2_fast.run.iterations", '"many"', "whole number"),
    "run.seed=true": ("dmd2_fast.run.seed", "true", "whole number"),
    "run.progress=1": ("dmd2_fast.run.progress", "true or false"),
    'generator.ema="x"': ("dmd2_fast.generator.ema", "a number"),
    "generator.steps=5": ("dmd2_fast.generator.steps", "a list"),
    'generator.steps=[5, "2"]': ("dmd2_fast.generator.steps[1]", "a number"),
    "generator.optimizer.params.betas=[0.1]": ("generator.optimizer.params.betas", "2 entries"),
    "model=null": ("dmd2_fast.model", "object"),
    "dmd2_fast=[]": ("dmd2_fast", "object"),
    "teacher.training.network=[]": ("teacher.training.network", "object"),
    "zero_optimization=3": ("zero_optimization", "object"),
    "bf16.enabled=1": ("bf16.enabled", "true or false"),
    "data.path=": ("dmd2_fast.data.path", "empty"),
    # Ranges and choices.
    "run.log_interval=0": ("dmd2_fast.run.log_interval", ">= 1"),
    "generator.ema=1": ("dmd2_fast.generator.ema", "< 1"),
    "generator.optimizer.params.lr=0": ("generator.optimizer.params.lr", "> 0"),
    "run.seed=9223372036854775808": ("dmd2_fast.run.seed", "2^63"),
    f"run.seed={'9' * 5000}": ("has 5000 digits",),
    f"generator.gradient_clipping={'9' * 400}": ("has 400 digits",),
    r'run.folder="a\u0000b"': ("can be written to a file",),
    r'data.path="\ud800"': ("can be written to a file",),
    "run.num_samples=3": ("dmd2_fast.run.num_samples", ">= 4"),
    "distribution_matching.t_range=[0.1, 1.1]": ("distribution_matching.t_range[1]", "<= 1"),
    "generator.steps=[]": ("dmd2_fast.generator.steps", "empty"),
    "adversarial.features=teachr": ('"fake_score" or "teacher"', 'did you mean "teacher"'),
    "generator.ema=NaN": ("NaN",),
    "generator.ema=1e999": ("1e999",),
    # Not in this release, or not ours.
    "model.lora=64": ("dmd2_fast.model.lora", "object"),
    'model.lora={"rnk": 64}': ("dmd2_fast.model.lora.rnk", '"rank"'),
    'model.lora={"rank": 0}': ("dmd2_fast.model.lora.rank", ">= 1"),
    'model.lora={"targets": []}': ("dmd2_fast.model.lora.targets", "empty"),
    "fp16.enabled=true": ("fp16", "bf16"),
    "zero_optimization.stage=0": ("zero_optimization.stage is 0", "expected 3", "averag"),
    "zero_optimization.stage=4": ("zero_optimization.stage is 4",),
    "zero_optimization.stage=true": ("zero_optimization.stage",),
    "zero_optimization.offload_param=true": ("zero_optimization.offload_param is true", "object"),
    'zero_optimization.offload_optimizer={"device": "disk"}': ("offload_optimizer.device", '"disk"', "nvme"),
    'zero_optimization.offload_param={"device": "nvme"}': ("offload_param.nvme_path is null", "folder"),
    'zero_optimization.offload_optimizer={"device": "nvme", "nvme_path": "/tmp"}': ("other gradients", '"cpu"'),
    'zero_optimization.offload_optimizer={"device": "cpu", "ratio": 0.5}': ("offload_optimizer.ratio is 0.5",),
    "zero_optimization.cpu_offload=true": ("zero_optimization.cpu_offload", "offload_optimizer"),
    "zero_optimization.zero_quantized_weights=true": ("zero_optimization.zero_quantized_weights",),
    "zero_optimization.zero_hpz_partition_size=2": ("zero_optimization.zero_hpz_partition_size",),
    "optimizer={}": ('"optimizer"', "put it in dmd2_fast.generator"),
    "scheduler={}": ('"scheduler"', "put it in dmd2_fast.generator"),
    "gradient_clipping=1.0": ('"gradient_clipping"', "put it in dmd2_fast.generator"),
    "tensor_parallel={}": ('"tensor_parallel"',),
    # The shape of an override.
    "run.iterations": ("dotted.key=value",),
    "run..iterations=3": ("dotted.key=value",),
    "model.path.deeper=1": ("dmd2_fast.model.path", "not an object"),
}


@pytest.mark.parametrize("override", REFUSED)
def test_a_wrong_setting_is_refused_with_its_path(override):
    message = refusal(override)
    for part in REFUSED[override]:
        assert part in message


REFUSED_AT_A_STAGE = {
    ('zero_optimization={"stage": 2, "stage3_max_live_parameters": 0}',): ("stage3_max_live_parameters 0", "stage 2"),
    ('zero_optimization={"stage": 1, "offload_param": {"device": "cpu"}}',): ("offload_param", "every rank has all"),
    ('zero_optimization={"stage": 2, "leaf_module": {}}',): ("zero_optimization.leaf_module", "stage 3"),
    ('zero_optimization={"stage": 2, "compute_grad_norm": false}',): ("compute_grad_norm is false", "skip a step"),
    ('zero_optimization={"stage": 1}', "bf16.enabled=true"): ("stage is 1 and bf16 is enabled", "Use stage 2"),
}


@pytest.mark.parametrize("overrides", REFUSED_AT_A_STAGE)
def test_what_a_stage_cannot_do_is_refused(overrides):
    message = refusal(*overrides)
    for part in REFUSED_AT_A_STAGE[overrides]:
        assert part in message


@pytest.mark.parametrize(
    "overrides", [('zero_optimization={"stage": 1}',), ('zero_optimization={"stage": 2}', "bf16.enabled=true")]
)
def test_stages_without_sharded_weights(overrides):
    config = load_config(DIGITS, overrides)
    config_deepspeed.validate_with_deepspeed(config.deepspeed)
    assert STAGE_3_KEYS < ZERO_KEYS
    assert not shards_weights(config.deepspeed) and shards_weights(load_config(DIGITS).deepspeed)


CLASHES = {
    ("distribution_matching.weight=0", "adversarial.generator_weight=0"): "without a loss",
    ("adversarial.discriminator_weight=0",): "follow a random one",
    ("adversarial.generator_weight=0", "adversarial.discriminator_weight=0", "adversarial.r1.kind=approximate"): (
        "nothing to be penalised"
    ),
    ("bf16.enabled=true", "adversarial.r1.kind=approximate", "adversarial.r1.std=0.06"): "rounds so small",
    ("distribution_matching.weight=0", "teacher.guidance_scale=2", "teacher.training.label_dropout=0.1"): (
        "guidance acts in the DMD gradient alone"
    ),
    ("teacher.guidance_scale=2",): "never seen the empty label",
    ("teacher.training.label_dropout=0.1", "teacher.training.network.num_class_embeds=null"): "no labels to drop",
    ("adversarial.t_range=[0.0, 0.5]",): "would be ignored",
    ("generator.lr_scheduler.type=constant", "generator.lr_scheduler.params.final_ratio=0.2"): "no final one",
    ("fake_score.lr_scheduler.type=constant", "fake_score.lr_scheduler.params.final_ratio=0.2"): "no final one",
    ("generator.steps=[1, 2]",): "strictly decrease",
    ("generator.steps=[2, 2]",): "strictly decrease",
    ("teacher.training.schedule=ddpm",): "whole numbers from 0 to 999",
    ("generator.steps=[81, 2]",): "Karras steps are sigmas",
    ("generator.steps=[2, 0]",): "Karras steps are sigmas",
    ("teacher.training.schedule=rectified_flow",): "rectified-flow steps are times",
    ("distribution_matching.t_range=[0.5, 0.5]",): "the range is empty",
    ("passes=independent", "adversarial.t_range=[0.9, 0.1]"): "the range is empty",
    ('zero_optimization.leaf_module={"classes": ["x.Y"]}', "run.gather=module"): "frees them before the backward",
    ("run.folder=runs",): "the run folder holds",
    ("model.kind=sdxl", "data.kind=latents", "teacher.training=null"): "SD1.5 and SDXL count noise in DDPM timesteps",
    ("model.kind=sdxl", "generator.steps=[999]", "teacher.training=null"): "trained on latents with text embeddings",
    ("data.kind=latents",): "trained on latents with text embeddings",
    (
        "model.kind=sd15",
        "data.kind=latents",
        "generator.steps=[999]",
        "teacher.training.schedule=ddpm",
    ): "a pipeline is taken as it is",
    ('run.sample_prompts=["a cat"]',): "a unet2d knows classes",
    ("regression.weight=0.25",): "no pairs to learn from",
    ("model.lora={}", "run.start_from=runs/other"): "adapters start on the teacher's weights",
    ("run.start_from=runs/digits",): "a run cannot start from itself",
    ("run.folder=data/digits",): "the run folder holds",
}


@pytest.mark.parametrize("overrides", CLASHES)
def test_a_combination_without_sense_is_refused_with_its_reason(overrides):
    assert CLASHES[overrides] in refusal(*overrides)


def test_every_combination_of_the_table_is_tested_and_names_real_settings():
    clashes = {**CLASHES, **VARIANT_CLASHES, **TIME_CLASHES}
    reached = {next(c for c in COMBINATIONS if c.reason in refusal(*overrides)).reason for overrides in clashes}
    assert reached == {combination.reason for combination in COMBINATIONS}
    section = load_config(DIGITS).to_dict()["dmd2_fast"]
    for combination in COMBINATIONS:
        for key in combination.keys:
            value = section
            for name in key.split("."):
                assert name in value
                value = value[name]


@pytest.mark.parametrize(
    "overrides",
    [
        ("adversarial.generator_weight=0", "adversarial.discriminator_weight=0"),  # no GAN
        ("adversarial.generator_weight=0",),  # a discriminator that warms up
        ("distribution_matching.weight=0",),  # a GAN alone
        ("adversarial.features=teacher",),
        ("bf16.enabled=true", "adversarial.r1.kind=approximate", "adversarial.r1.std=0.0625"),  # 8 spacings exactly
        ("adversarial.r1.kind=approximate", "adversarial.r1.std=0.01"),  # f32
        ("adversarial.features=teacher", "passes=independent", "adversarial.t_range=[0.1, 0.9]"),
        ("adversarial.r1.kind=approximate", "adversarial.r1.interval=4"),
        ("teacher.guidance_scale=2", "teacher.training.label_dropout=0.1"),
        ("teacher.training.schedule=ddpm", "generator.steps=[999, 749, 499, 249]"),
        ("teacher.training.schedule=rectified_flow", "generator.steps=[1.0, 0.5]"),
        ("run.iterations=20",),  # shorter than the warm-up: a smoke test
        ("generator.ema=null", "generator.gradient_clipping=0", "run.sample_interval=0"),
        ("bf16.enabled=true",),
        ("run.gather=module",),
        ('zero_optimization.leaf_module={"classes": ["x.Y"]}',),
    ],
)
def test_combinations_with_sense_are_not_refused(overrides):
    load_config(DIGITS, overrides)


def test_overrides_take_json_or_text_with_or_without_the_prefix():
    config = load_config(
        DIGITS,
        [
            "dmd2_fast.run.seed=7",
            "run.folder=runs/true story",
            "generator.steps=[3, 1]",
            "train_batch_size=32",
            "run.seed=8",
        ],
    )
    assert config.run.seed == 8 and config.run.folder == "runs/true story"
    assert config.generator.steps == (3.0, 1.0) and config.global_batch_size == 32
    assert load_config(DIGITS, ["data.path=a=b"]).data.path == "a=b"
    raw = config_from_dict(MINIMAL)
    assert raw.teacher.training is None  # and an override may open it
    opened = load_config(DIGITS, ["teacher.training=null", "teacher.training.network.sample_size=4"])
    assert opened.teacher.training.network == {"sample_size": 4}


def test_overriding_leaves_the_original_alone():
    raw = json.loads(json.dumps(MINIMAL))
    config = config_from_dict(raw)
    config.to_dict()["dmd2_fast"]["run"]["folder"] = "elsewhere"
    assert raw == MINIMAL and config.run.folder == "runs/x"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"a": 1,\n  "b": }', (":2:8:", "not valid JSON")),
        ('{"dmd2_fast": {"run": {"seed": 1, "seed": 2}}}', ('"seed"', "twice")),
        ('{"train_batch_size": NaN}', ("NaN",)),
        ('{"train_batch_size": -Infinity}', ("-Infinity",)),
        ("[]", ("object",)),
        ("", (":1:1:",)),
        ("[" * 100000, ("deeply",)),
        ('{"train_batch_size": 4}', ('"dmd2_fast" is missing',)),
        ('{"dmd2fast": {}}', ('is "dmd2fast" meant?',)),
        ('{"dmd2_fast": {}, "generator": {}}', ('"generator"', 'into the section "dmd2_fast"')),
        ('{"train_batch_size": 4, "dmd2_fast": {}}', ("zero_optimization.stage is 0 (DeepSpeed's default)",)),
    ],
)
def test_a_file_that_is_not_a_configuration(tmp_path, text, parts):
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    for part in parts:
        assert part in str(error.value)


def test_unreadable_files(tmp_path):
    for path in (tmp_path / "missing.json", tmp_path):
        with pytest.raises(UserError, match=path.name):
            load_config(path)
    binary = tmp_path / "b.json"
    binary.write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(binary)


@pytest.mark.parametrize("missing", ["model.path", "generator.steps", "data.path", "run.folder", "model", "run"])
def test_the_four_required_settings(missing):
    raw = json.loads(json.dumps(MINIMAL))
    section, _, key = missing.partition(".")
    if key:
        del raw["dmd2_fast"][section][key]
    else:
        del raw["dmd2_fast"][section]
    with pytest.raises(ConfigError, match=rf"dmd2_fast\.{missing}.*is missing"):
        config_from_dict(raw)


BATCHES = [  # (total, micro, accumulation, ranks) -> (micro, accumulation)
    ((64, None, None, 1), (64, 1)),
    ((64, None, None, 2), (32, 1)),
    ((64, 16, None, 2), (16, 2)),
    ((64, None, 4, 2), (8, 4)),
    ((64, 16, 2, 2), (16, 2)),
    ((None, 3, None, 7), (3, 1)),
    ((None, 3, 5, 7), (3, 5)),
]


@pytest.mark.parametrize(("given", "expected"), BATCHES)
def test_batches_from_any_consistent_subset(given, expected):
    *values, ranks = given
    section = {key: value for key, value in zip(config_deepspeed.BATCH_KEYS, values, strict=True) if value is not None}
    assert resolve_batch(section, ranks) == expected
    if values[0] is not None:
        assert expected[0] * expected[1] * ranks == values[0]


def test_batches_that_do_not_come_out_even_name_numbers_that_would():
    message = refusal(world_size=3)
    assert "train_batch_size 64 does not divide by 3 ranks" in message
    assert "63 or 66 would work" in message and "2 ranks or 4 ranks" in message
    message = refusal("train_micro_batch_size_per_gpu=16", "gradient_accumulation_steps=3", world_size=2)
    assert "16 x gradient_accumulation_steps 3 x 2 ranks = 96" in message
    message = refusal("train_micro_batch_size_per_gpu=48")
    assert "48 x 1 rank = 48: 48 or 96 would work" in message
    for value in ("0", "2.5", '"64"', "true"):
        assert "train_batch_size" in refusal(f"train_batch_size={value}")
    assert "no batch size" in refusal("train_batch_size=null")


def test_a_newer_deepspeed_is_asked_for_its_own_names(monkeypatch):
    monkeypatch.setattr(config_deepspeed, "_installed_version", lambda: "99.0")
    monkeypatch.setattr(config_deepspeed, "installed_top_level_keys", lambda: frozenset({"brand_new"}))
    assert load_config(DIGITS, ["brand_new={}"]).deepspeed["brand_new"] == {}
    assert '"brand_neww"' in refusal("brand_neww={}")

    def broken():
        raise RuntimeError("no such attribute")

    monkeypatch.setattr(config_deepspeed, "installed_top_level_keys", broken)
    assert "brand_new" in refusal("brand_new={}")


def test_without_deepspeed_the_list_serves(monkeypatch):
    monkeypatch.setattr(config_deepspeed, "_installed_version", lambda: None)
    load_config(DIGITS)
    assert '"zero_optimization"' in refusal("zero_optimisation={}")


def test_the_lists_are_the_installed_deepspeed_s():
    pytest.importorskip("deepspeed")
    if config_deepspeed._installed_version() != config_deepspeed.LISTED_VERSION:
        pytest.skip(f"the lists are those of DeepSpeed {config_deepspeed.LISTED_VERSION}")
    assert config_deepspeed.installed_zero_keys() == ZERO_KEYS
    assert config_deepspeed.installed_top_level_keys() == TOP_LEVEL_KEYS
    assert set(REFUSED_KEYS) <= TOP_LEVEL_KEYS


def test_deepspeed_s_own_complaints_become_one_message():
    pytest.importorskip("deepspeed")
    config = load_config(DIGITS, ["zero_optimization.reduce_bucket_size=big"])
    with pytest.raises(ConfigError, match=r"DeepSpeed refuses its part.*reduce_bucket_size") as error:
        config_deepspeed.validate_with_deepspeed(config.deepspeed, 2)
    assert "\n" not in str(error.value)
    config_deepspeed.validate_with_deepspeed(load_config(DIGITS, (), 2).deepspeed, 2)


def test_the_network_s_arguments_are_the_installed_diffusers_s():
    models = pytest.importorskip("diffusers.models.unets.unet_2d")
    assert set(inspect.signature(models.UNet2DModel.__init__).parameters) - {"self"} == UNET2D_ARGUMENTS


def test_every_setting_is_documented():
    def check(cls):
        source = inspect.getsource(cls)
        for item in dataclasses.fields(cls):
            if cls is Config and item.name in {inherited.name for inherited in dataclasses.fields(Section)}:
                continue
            _, _, after = source.partition(f"    {item.name}: ")
            assert after.split("\n", 1)[1].lstrip().startswith('"""'), f"{cls.__name__}.{item.name}"
            kind = item.default if dataclasses.is_dataclass(item.default) else None
            if kind is not None:
                check(type(kind))

    check(Section)
    check(Config)
    for cls in (type(load_config(DIGITS).model), type(load_config(DIGITS).generator), type(load_config(DIGITS).run)):
        check(cls)
    check(type(load_config(DIGITS).teacher.training))


@pytest.mark.parametrize("compatible", [True, False])
def test_nvme_needs_libaio(monkeypatch, compatible):
    op_builder = pytest.importorskip("deepspeed.ops.op_builder")
    monkeypatch.setattr(op_builder.AsyncIOBuilder, "is_compatible", lambda self: compatible)
    nvme = 'zero_optimization.offload_param={"device": "nvme", "nvme_path": "/tmp/swap"}'
    config = load_config(DIGITS, [nvme])
    if compatible:
        config_deepspeed.validate_with_deepspeed(config.deepspeed)
    else:
        with pytest.raises(ConfigError, match=r"offload_param.*libaio-dev.*cpu"):
            config_deepspeed.validate_with_deepspeed(config.deepspeed)
