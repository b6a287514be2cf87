"""The JSON Schema: the shipped file is the generated one, and it accepts and refuses what load_config does."""

import copy
import dataclasses
import json
from pathlib import Path

import jsonschema
import pytest

from dmd2_fast.cli import main
from dmd2_fast.config import config_from_dict, load_config
from dmd2_fast.config_deepspeed import REFUSED_KEYS, TOP_LEVEL_KEYS
from dmd2_fast.config_json_schema import config_schema_document, schema_text
from dmd2_fast.config_parse import apply_overrides, field_names
from dmd2_fast.config_schema import Section
from dmd2_fast.errors import ConfigError
from dmd2_fast.runs import inspect_run, open_run

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "configs/dmd2_fast.schema.json"
CONFIGS = sorted([*ROOT.glob("ds_*.json"), *(ROOT / "configs").glob("ds_*.json")])
DIGITS = json.loads((ROOT / "ds_digits.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(config_schema_document())


def changed(*overrides):
    return apply_overrides(DIGITS, overrides, field_names(Section))


def without(dotted):
    raw = copy.deepcopy(DIGITS)
    *path, last = dotted.split(".")
    inside = raw
    for name in path:
        inside = inside[name]
    del inside[last]
    return raw


def test_the_shipped_file_is_what_is_generated(capsys):
    jsonschema.Draft202012Validator.check_schema(config_schema_document())
    assert SHIPPED.read_text() == schema_text(), "dmd2-fast config --schema > configs/dmd2_fast.schema.json"
    assert main(["config", "--schema"]) == 0
    assert capsys.readouterr().out == schema_text()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configurations_hold_and_name_the_schema(path):
    raw = json.loads(path.read_text())
    VALIDATOR.validate(raw)
    VALIDATOR.validate(load_config(path).to_dict())  # with every default written out
    assert (path.parent / raw["$schema"]).resolve() == SHIPPED


GOOD = (
    (),
    ("generator.ema=null", "generator.gradient_clipping=0", "run.seed=9223372036854775807"),
    ("teacher.training=null", "generator.optimizer={}", 'fake_score.lr_scheduler={"params": {}}'),
    ("model.lora={}", 'model.lora.targets=["to_q"]', "model.sample_size=null"),
    ("bf16.enabled=true", "fp16.enabled=false", "torch_autocast={}", "wandb.enabled=false", "steps_per_print=5"),
    ("train_micro_batch_size_per_gpu=8", "train_batch_size=null"),
    ('zero_optimization.offload_param={"device": "nvme", "nvme_path": "/nvme"}',),
    ('zero_optimization.offload_optimizer={"device": "cpu", "ratio": 1.0}', "zero_optimization.offload_param=null"),
    ('zero_optimization={"stage": 2, "overlap_comm": true, "offload_optimizer": {"device": "cpu"}}',),
    ('zero_optimization={"stage": 1}',),
    ("zero_optimization.zero_hpz_partition_size=1", "zero_optimization.cpu_offload=false"),
    ("zero_optimization.zenflow=null", 'zero_optimization.cpu_offload_param={"device": "none"}'),
)


@pytest.mark.parametrize("overrides", GOOD, ids=" ".join)
def test_both_accept(overrides):
    raw = changed(*overrides)
    config_from_dict(raw)
    VALIDATOR.validate(raw)


BAD = (
    # unknown keys
    "generator.stpes=[1]", "zero_optimisation={}", "zero_optimization.stage3_max=1", "generatorr={}", "extra=1",
    "generator.optimizer.lr=1", "generator.optimizer.params.beta=1", "teacher.training.network.class_embeds=3",
    "run.more=null", "model.lora.rnk=64",
    # types
    "run.iterations=1.5", "run.iterations=many", "run.seed=true", "run.progress=1", 'generator.ema="x"',
    "generator.steps=5", 'generator.steps=[5, "2"]', "model=null", "dmd2_fast=[]", "run.folder=null", "data.path=",
    "teacher.training.network=[]", "zero_optimization=3", "bf16.enabled=1", "bf16=true", "model.lora=64",
    "passes=null", "train_batch_size=8.5",
    # how many entries
    "generator.optimizer.params.betas=[0.1]", "generator.optimizer.params.betas=[0.1, 0.2, 0.3]", "generator.steps=[]",
    "teacher.training.network={}", "model.lora.targets=[]", "adversarial.levels=[]",
    # ranges
    "run.log_interval=0", "generator.ema=1", "generator.optimizer.params.lr=0", "run.seed=9223372036854775808",
    "run.num_samples=3", "distribution_matching.t_range=[0.1, 1.1]", "generator.optimizer.params.betas=[1, 0.9]",
    "generator.steps=[-1]", "train_batch_size=0", "model.lora.rank=0", "teacher.training.label_dropout=1",
    # choices
    "adversarial.features=teachr", "generator.optimizer.type=Adam", "model.kind=sd3", 'adversarial.levels=["top"]',
    "adversarial.r1.kind=null",
    # DeepSpeed's
    "fp16.enabled=true", "torch_autocast.enabled=true", "zero_optimization.stage=0", "zero_optimization.stage=true",
    "zero_optimization.stage=2", 'zero_optimization={"stage": 2, "compute_grad_norm": false}',
    "zero_optimization.offload_param=true", 'zero_optimization.offload_optimizer={"device": "disk"}',
    'zero_optimization.offload_param={"device": "nvme"}', 'zero_optimization.offload_optimizer={"device": "nvme"}',
    'zero_optimization.offload_optimizer={"device": "cpu", "ratio": 0.5}', "zero_optimization.cpu_offload=true",
    "zero_optimization.zero_quantized_weights=true", "zero_optimization.zero_hpz_partition_size=2",
    "train_batch_size=null", *(f"{key}={{}}" for key in REFUSED_KEYS),
)  # fmt: skip
MISSING = (
    "train_batch_size", "zero_optimization", "zero_optimization.stage", "dmd2_fast", "dmd2_fast.model",
    "dmd2_fast.model.path", "dmd2_fast.generator.steps", "dmd2_fast.run.folder", "dmd2_fast.data.path",
    "dmd2_fast.teacher.training.network",
)  # fmt: skip


@pytest.mark.parametrize(
    "raw",
    [*(changed(override) for override in BAD), *map(without, MISSING)],
    ids=[*BAD, *(f"without {key}" for key in MISSING)],
)
def test_both_refuse(raw):
    with pytest.raises(ConfigError):
        config_from_dict(raw)
    assert not VALIDATOR.is_valid(raw)


def test_what_a_schema_cannot_say_is_said():
    """Combinations are load_config's; the schema accepts them, and its first words say so."""
    raw = changed("generator.steps=[1, 2]")
    VALIDATOR.validate(raw)
    with pytest.raises(ConfigError, match="strictly decrease"):
        config_from_dict(raw)
    assert "make no sense together" in VALIDATOR.schema["description"]


def test_every_key_is_there_with_its_text_and_default():
    properties = VALIDATOR.schema["properties"]
    assert set(properties) == {"$schema", "dmd2_fast", *TOP_LEVEL_KEYS} - set(REFUSED_KEYS)
    assert set(properties["dmd2_fast"]["properties"]) == {item.name for item in dataclasses.fields(Section)}

    def texts(schema, path):
        for key, inner in schema.get("properties", {}).items():
            yield (*path, key), inner.get("description")
            for form in (inner, *inner.get("anyOf", ())):
                yield from texts(form, (*path, key))

    described = dict(texts(properties["dmd2_fast"], ()))
    bare = {path for path, text in described.items() if not text}
    assert all(path[-1] == "params" or path[:-1] == ("teacher", "training", "network") for path in bare)
    assert described["generator", "ema"].startswith("Decay of the averaged weights per generator update, in [0, 1), or")
    section = properties["dmd2_fast"]["properties"]
    assert section["fake_score"]["properties"]["ttur_ratio"]["default"] == 5
    assert section["generator"]["required"] == ["steps"] and "required" not in section["fake_score"]
    # The default of its place, not of its class: the teacher's optimizer has a rate of its own.
    training = section["teacher"]["properties"]["training"]["anyOf"][0]["properties"]
    rates = [place["optimizer"]["properties"]["params"]["properties"]["lr"] for place in (
        section["generator"]["properties"], training)]  # fmt: skip
    assert [rate["default"] for rate in rates] == [5e-7, 1e-3]


def test_the_schema_key_changes_nothing(tmp_path):
    """A run goes on whether its configuration names a schema, another one, or none; DeepSpeed never sees the key."""
    raw = changed(f"run.folder={tmp_path / 'run'}")
    plain = config_from_dict({key: value for key, value in raw.items() if key != "$schema"})
    named = config_from_dict({**raw, "$schema": "elsewhere/x.json"})
    assert named == plain and "$schema" not in named.deepspeed
    open_run(named)
    assert "$schema" not in json.loads((tmp_path / "run" / "config.json").read_text())
    assert inspect_run(plain) is True and inspect_run(named) is True
