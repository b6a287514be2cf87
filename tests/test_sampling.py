"""`dmd2-fast sample` for text: prompts through encoders, generator and VAE, from a run and from exports."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pipelines import CAPTIONS, make_pipeline
from safetensors import safe_open
from safetensors.torch import load_file
from test_export import FOUR, finished_run, our_samples

from dmd2_fast.cli import main
from dmd2_fast.config import ModelConfig
from dmd2_fast.export_folder import export_run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run, what rollout.sample makes of it for two prompts (seed 5), and exports without and with the pipeline."""
    folder = tmp_path_factory.mktemp("sampling")
    model = ModelConfig(str(make_pipeline(folder / "teacher")), "sdxl")
    run = finished_run(folder / "run", model, FOUR)
    export_run(run, "diffusers", folder / "unet")
    export_run(run, "diffusers", folder / "full", full=True)
    return folder, our_samples(run, model)[1] * 2 - 1


@pytest.mark.parametrize("source", ["run", "unet", "full"])
def test_prompts_to_pictures(world, tmp_path, source):
    folder, expected = world
    if source == "full":  # stands for itself, wherever the teacher has gone
        metadata = json.loads((folder / "full" / "generator.json").read_text())
        metadata["model"]["path"] = str(tmp_path / "gone")
        (folder / "full" / "generator.json").write_text(json.dumps(metadata))
    (tmp_path / "prompts.txt").write_text(f"\n{CAPTIONS[1]}\n\n")
    out = tmp_path / "out.safetensors"
    arguments = ["sample", str(folder / source), "--seed", "5", "--prompt", CAPTIONS[0], "--prompts"]
    assert main([*arguments, str(tmp_path / "prompts.txt"), "--out", str(out)]) == 0
    images = load_file(out)["images"]
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["prompts"]) == list(CAPTIONS[:2])


def test_grid_and_repeated_prompts(world, tmp_path):
    from PIL import Image

    folder, expected = world
    arguments = ["sample", "--run", str(folder / "run"), "--seed", "5", "--num", "5"]
    for caption in CAPTIONS[:2]:
        arguments += ["--prompt", caption]
    assert main([*arguments, "--out", str(tmp_path / "grid.png")]) == 0
    pixels = np.asarray(Image.open(tmp_path / "grid.png")).astype(int)
    assert pixels.shape == (3 * 33 - 1, 2 * 33 - 1, 3), "a column a prompt"
    for i, image in enumerate(expected):
        tile = pixels[:32, 33 * i : 33 * i + 32]
        assert np.abs(tile - ((image.permute(1, 2, 0).numpy() + 1) * 127.5)).max() < 0.51
    assert np.abs(pixels[33:65, :32] - pixels[:32, :32]).max() > 5, "the same prompt with other noise"


def test_bad_input(world, tmp_path, capsys):
    folder, _ = world
    run, out = str(folder / "run"), ["--out", str(tmp_path / "a.png")]
    (tmp_path / "empty.txt").write_text("\n \n")
    for arguments, message in (
        ([run], "give it --prompt"),
        ([run, "--prompts", str(tmp_path / "none.txt")], "cannot be read"),
        ([run, "--prompts", str(tmp_path / "empty.txt")], "holds no prompts"),
        ([run, "--prompt", "a", "--pipeline", str(tmp_path)], "has no vae/"),
        ([str(tmp_path), "--prompt", "a"], "has no config.json"),
    ):
        assert main(["sample", *arguments, *out]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "a.png").exists()
