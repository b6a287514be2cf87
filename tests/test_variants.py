"""Every configs/ds_digits_*.json: it is what docs/methods.md says, and it makes the few-step generator better.

The short run: the default network on the digits, two of the steps, a teacher of its own schedule trained for a few
seconds, and a ratio and a rate of the fake score that suit so few updates. Better: the Frechet distance in the features
of the digits' classifier is below that of the start, the teacher's weights sampled in the same steps.
"""

import json
import math
import re
from pathlib import Path

import pytest
from one_rank import group_of_one
from tiny import ROOT

from dmd2_fast.config import load_config
from dmd2_fast.data import prepare_digits
from dmd2_fast.evaluation import load_reference
from dmd2_fast.export import FewStepGenerator, cycling_labels
from dmd2_fast.networks import load_denoiser
from dmd2_fast.pairs import PairsOptions, make_pairs
from dmd2_fast.runs import RunFolder, differences, open_run, read_metrics
from dmd2_fast.teacher import train_teacher
from dmd2_fast.trainer import Trainer

DEFAULT = ROOT / "ds_digits.json"
CONFIGS = {path.stem.removeprefix("ds_digits_"): path for path in sorted((ROOT / "configs").glob("ds_digits_*.json"))}
ROW = re.compile(r"^\| [^|]+ \| (?P<settings>`.+`) \| `ds_digits_(?P<name>\w+)\.json` \|$", re.MULTILINE)
SETTINGS = {
    row["name"]: re.findall("`([^`]+)`", row["settings"])
    for row in ROW.finditer((ROOT / "docs/methods.md").read_text())
}

ITERATIONS = 48
UNTRAINED_HEAD = {"gan": 112, "ladd": 160}
"""Iterations where the generator has nothing to follow until the head has learnt something."""
BETTER = 0.85
SHORT = (
    "train_batch_size=32", "teacher.training.iterations=300", "data.loader=plain", "run.progress=false",
    "run.sample_interval=0", "run.log_interval=1", "fake_score.ttur_ratio=2",
    "generator.ema=0.8", "generator.lr_scheduler.params.warmup_iterations=8",
    "fake_score.lr_scheduler.params.warmup_iterations=8", "fake_score.optimizer.params.lr=1e-3",
    'zero_optimization.leaf_module={"classes": ["diffusers.models.resnet.ResnetBlock2D"]}',
)  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS.keys() - {"1step"})
def test_config_is_the_default_but_for_what_the_page_says(name):
    config, folder = load_config(CONFIGS[name]), f"run.folder=runs/digits-{name.replace('_', '-')}"
    assert config == load_config(DEFAULT, [*SETTINGS[name], folder])
    changed = [
        key.removeprefix("dmd2_fast.") for key, *_ in differences(load_config(DEFAULT).to_dict(), config.to_dict())
    ]
    for setting in SETTINGS[name]:  # and each of them is a change
        key = setting.partition("=")[0]
        assert any((other + ".").startswith(key + ".") for other in changed), setting
    text = json.loads(CONFIGS[name].read_text())
    assert text.keys() == json.loads(DEFAULT.read_text()).keys()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder with the digits; teachers and pairs are made in it when a configuration first asks for them."""
    folder = tmp_path_factory.mktemp("variants")
    prepare_digits(folder / "data")
    return folder


def short_run(name, folder):
    """The configuration of a short run under `folder`, its teacher trained, its pairs made where it has any."""
    config = load_config(CONFIGS[name], SHORT)
    paths = [f"model.path={folder / Path(config.model.path).name}", f"data.path={folder / 'data'}"]
    paths += [
        f"run.iterations={UNTRAINED_HEAD.get(name, ITERATIONS)}",
        f"run.folder={folder / name}",
        f"generator.steps={list(config.generator.steps[::2])}",
    ]
    if config.regression.is_on:
        paths.append(f"regression.path={folder / 'pairs'}")
    config = load_config(CONFIGS[name], [*SHORT, *paths])
    train_teacher(config)
    if config.regression.is_on:
        make_pairs(config, PairsOptions(num=256, num_steps=8))
    return config


def train(config, score):
    """A whole run: the score of its averaged generator, and what it logged."""
    with group_of_one() as rank:
        open_run(config)
        trainer = Trainer(config, RunFolder(config.run.folder), rank)
        assert trainer.train()
        with trainer.averaged(), trainer.engines.bare(trainer.engines.generator) as generator:
            reached = score(generator)
        trainer.close()
        return reached, read_metrics(trainer.run.metrics)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_short_run_is_finite_and_better_than_the_start(name, digits):
    config = short_run(name, digits)
    reference, labels = load_reference(config), cycling_labels(500, 10)

    def score(generator):
        return reference.evaluate(FewStepGenerator(generator, config.generator.steps).sample(labels), labels)["fd"]

    start = score(load_denoiser(config.model).eval())
    reached, lines = train(config, score)
    print(f"{name}: {start:.3f} -> {reached:.3f}")
    assert reached < BETTER * start
    assert len(lines) == config.run.iterations and all(
        math.isfinite(value) for line in lines for value in line.values()
    )
    assert all(line["skipped/generator"] == line["skipped/fake_score"] == 0 for line in lines)
