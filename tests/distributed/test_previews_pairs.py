"""Two ranks: grids of prompts from a sharded generator, and a teacher's pairs split over ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from latents import text_section, write_latents
from PIL import Image
from pipelines import CAPTIONS, make_pipeline
from plain_loop import plain_run, prepare, relative, worst_loss, write_config
from ranks import run_ranks
from test_previews import expected_tiles
from test_regression import read_pairs

from dmd2_fast.pairs import PairsOptions, make_pairs

pytestmark = pytest.mark.timeout(600)
COMMON = {"optimizer": {"params": {"lr": 1e-3, "eps": 1e-5}}, "lr_scheduler": {"params": {"warmup_iterations": 2}}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    prepare(folder)
    make_pipeline(folder / "pipeline")
    write_latents(folder / "latents", folder / "pipeline", "sdxl", 10)
    path = {"path": str(folder / "pairs")}
    make_pairs(write_config(folder, "make", 1, regression=path)[1], PairsOptions(44, num_steps=3))
    section = text_section(folder, folder / "pipeline", "sdxl", sample_interval=1, sample_prompts=list(CAPTIONS[:2]))
    section["run"]["iterations"] = 1
    section["generator"]["ema"] = None
    configs = {
        "prompts": write_config(folder, "prompts", 2, **section)[1],
        "pairs": write_config(
            folder, "pairs-run", 2, regression={**path, "weight": 0.5, "warmup_iterations": 2}, run={"iterations": 5},
            generator={"ema": 0.9, **COMMON}, fake_score={"ttur_ratio": 2, **COMMON},
        )[1],
    }  # fmt: skip
    finished = run_ranks(folder, "previews_pairs", str(folder), timeout=400)
    assert set(finished.codes) == {0}, "\n".join(text[-3000:] for text in finished.output)
    return folder, configs


def load(folder, name, rank=0):
    return torch.load(folder / f"{name}-rank{rank}.pt", weights_only=False)


def test_grid_of_prompts(runs):
    folder, configs = runs
    weights = load(folder, "prompts")["weights"]["generator"]
    expected = expected_tiles(folder, configs["prompts"], weights, CAPTIONS[:2])
    pixels = np.asarray(Image.open(folder / "prompts" / "grids" / "iteration-000001.png")).astype(float)
    tiles = np.stack([pixels[:, 33 * i : 33 * i + 32] for i in range(2)])
    assert np.abs(tiles - expected).max() < 0.52


def test_pairs_on_two_ranks(runs):
    folder, configs = runs
    fields = read_pairs(folder / "pairs")
    pairs = (fields["noise"], fields["latents"], {"class_labels": fields["class_labels"]})
    expected, got = plain_run(configs["pairs"], 5, pairs=pairs), load(folder, "pairs-run")
    assert got["updates"] == len(expected.updates["generator"]) == 4
    assert worst_loss(got["losses"], expected.losses) < 1e-4
    for name, value in expected.gradients.items():
        assert relative(got["gradients"][name], value) < 1e-6
    for name, value in expected.weights.items():
        assert relative(got["weights"][name], value) < 1e-5
