"""Sample grids of fixed prompts while a run of text trains: the picture is the generator's, decoded by the VAE."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from latents import text_section, write_latents
from one_rank import group_of_one, make_trainer, steps
from PIL import Image
from pipelines import CAPTIONS, make_pipeline
from plain_loop import write_config

from dmd2_fast.engine import full_state_dict
from dmd2_fast.errors import ConfigError
from dmd2_fast.export import SAMPLING_STEP
from dmd2_fast.networks import load_denoiser
from dmd2_fast.preflight import check_inputs
from dmd2_fast.random import NoiseKey
from dmd2_fast.rollout import sample
from dmd2_fast.sampling import encode_prompts


@pytest.fixture(scope="module")
def rank():
    with group_of_one() as rank:
        yield rank


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("previews")
    make_pipeline(folder / "pipeline")
    write_latents(folder / "latents", folder / "pipeline", "sdxl", 10)
    return folder


def expected_tiles(folder, config, weights, captions):
    """(N, H, W, 3) in 0..255: a plain module with the run's weights, and diffusers' VAE by its own arithmetic."""
    from diffusers import AutoencoderKL

    denoiser = load_denoiser(config.model)
    denoiser.load_state_dict(weights)
    condition = encode_prompts(folder / "pipeline", "sdxl", captions, (32, 32), "cpu")
    ids, key = torch.arange(len(captions)), NoiseKey(config.run.seed, step=SAMPLING_STEP)
    with torch.no_grad():
        latents = sample(denoiser, torch.tensor([999, 749, 499, 249]), condition, ids, (4, 16, 16), key)
        vae = AutoencoderKL.from_pretrained(folder / "pipeline", subfolder="vae")
        images = vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)
    return (images.permute(0, 2, 3, 1).numpy() + 1) * 127.5


@pytest.mark.parametrize("prompts", [[CAPTIONS[2], CAPTIONS[0]], []])
def test_grid_of_prompts(folder, rank, prompts):
    section = text_section(folder, folder / "pipeline", "sdxl", sample_interval=1, sample_prompts=prompts)
    section["generator"]["ema"] = None
    trainer = make_trainer(folder, f"run-{len(prompts)}", rank, **section)
    steps(trainer, 1)
    assert trainer._sample() == {}, "no classifier knows these images"
    trainer.close()
    captions = prompts or CAPTIONS  # the first training samples have them in turn
    pixels = np.asarray(Image.open(trainer.run.grid(1))).astype(float)
    assert pixels.shape == (32, 33 * len(captions) - 1, 3)
    expected = expected_tiles(folder, trainer.config, full_state_dict(trainer.engines.generator), captions)
    tiles = np.stack([pixels[:, 33 * i : 33 * i + 32] for i in range(len(captions))])
    assert np.abs(tiles - expected).max() < 0.52, "rounded to whole levels"
    assert expected.std() > 5


@pytest.mark.parametrize("part", ["vae", "tokenizer_2", "text_encoder"])
def test_missing_part_is_refused_before_training(folder, tmp_path, part):
    make_pipeline(tmp_path / "pipeline")
    (tmp_path / "pipeline" / part).rename(tmp_path / "elsewhere")
    section = text_section(folder, tmp_path / "pipeline", "sdxl", sample_interval=2, sample_prompts=["a cat"])
    with pytest.raises(ConfigError, match=rf"no {part}.*sample_interval 0"):
        check_inputs(write_config(tmp_path, "c", 1, **section)[1])
    section["run"].update(sample_interval=0)
    check_inputs(write_config(tmp_path, "c", 1, **section)[1])


def test_prompts_for_classes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="takes no prompts"):
        write_config(tmp_path, "c", 1, run={"sample_prompts": ["a cat"]})
    assert json.loads((tmp_path / "c.json").read_text())["dmd2_fast"]["model"].get("kind", "unet2d") == "unet2d"
