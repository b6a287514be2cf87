"""Text encoders and codec of a pipeline against diffusers' own pipelines."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from pipelines import CAPTIONS, FACTOR, make_pipeline

from dmd2_fast.errors import UserError
from dmd2_fast.pipeline import LatentCodec, TextEncoders, latent_shape, time_ids

PROMPTS = [*CAPTIONS, "", "a cat " * 60]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: make_pipeline(tmp_path_factory.mktemp(kind), kind) for kind in ("sdxl", "sd15")}


def diffusers_pipeline(folder, kind):
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    return {"sdxl": StableDiffusionXLPipeline, "sd15": StableDiffusionPipeline}[kind].from_pretrained(folder)


def test_sdxl_embeddings_are_the_pipelines(folders):
    encoders = TextEncoders.load(folders["sdxl"], "sdxl")
    with torch.no_grad():
        embeds, no_embeds, pooled, no_pooled = diffusers_pipeline(folders["sdxl"], "sdxl").encode_prompt(PROMPTS)
    found, empty = encoders.encode(PROMPTS), encoders.unconditional()
    assert found["prompt_embeds"].shape == (6, 77, 32) and found["pooled_prompt_embeds"].shape == (6, 16)
    assert torch.equal(found["prompt_embeds"], embeds)
    assert torch.equal(found["pooled_prompt_embeds"], pooled)
    assert torch.equal(empty["prompt_embeds"], no_embeds[:1])
    assert torch.equal(empty["pooled_prompt_embeds"], no_pooled[:1])
    distinct = {tuple(row.flatten().tolist()) for row in embeds}
    assert len(distinct) == len(PROMPTS)  # a tokenizer that knows no word would pass the rest


def test_sd15_embeddings_are_the_pipelines(folders):
    encoders = TextEncoders.load(folders["sd15"], "sd15")
    with torch.no_grad():
        embeds, no_embeds = diffusers_pipeline(folders["sd15"], "sd15").encode_prompt(PROMPTS, "cpu", 1, True)
    found, empty = encoders.encode(PROMPTS), encoders.unconditional()
    assert set(found) == set(empty) == {"prompt_embeds"}
    assert torch.equal(found["prompt_embeds"], embeds)
    assert torch.allclose(empty["prompt_embeds"], no_embeds[:1], rtol=0, atol=1e-6)  # theirs is one of a batch of six
    assert torch.equal(empty["prompt_embeds"][0], encoders.encode([""])["prompt_embeds"][0])
    assert float(empty["prompt_embeds"].abs().max()) > 0.1


def test_time_ids_are_the_pipelines(folders):
    pipeline = diffusers_pipeline(folders["sdxl"], "sdxl")
    expected = pipeline._get_add_time_ids((40, 48), (3, 4), (32, 30), torch.float32, text_encoder_projection_dim=16)
    assert torch.equal(time_ids((40, 48), (3, 4), (32, 30))[None], expected)
    assert torch.equal(time_ids((40, 48), (3, 4), (32, 30), 2), expected.repeat(2, 1))


@pytest.mark.parametrize(
    "extra", [{}, {"shift_factor": 0.3}, {"latents_mean": [0.1, 0.2, 0, -1], "latents_std": [1, 2, 3, 4]}]
)
def test_codec_is_the_vae_scaled(folders, tmp_path, extra):
    from diffusers import AutoencoderKL

    shutil.copytree(folders["sdxl"] / "vae", tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps({**config, **extra}))
    codec = LatentCodec.load(tmp_path, dtype=torch.float16)
    vae = AutoencoderKL.from_pretrained(tmp_path, subfolder="vae").requires_grad_(False)  # which convolutions look at
    images = torch.rand(2, 3, 32, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    shift, std = extra.get("shift_factor", 0), 1
    if "latents_std" in extra:
        shift, std = (torch.tensor(extra[name]).reshape(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
    latents = codec.encode(images)
    with torch.no_grad():
        assert torch.equal(latents, (vae.encode(images).latent_dist.mean - shift) * 0.13025 / std)
        assert torch.equal(codec.decode(latents), vae.decode(latents * std / 0.13025 + shift).sample)
    assert latents.shape == (2, 4, 16, 12)
    assert codec.factor == FACTOR and latents.dtype == torch.float32  # force_upcast: not in f16


def test_codec_without_force_upcast_runs_in_the_dtype_asked_for(folders, tmp_path):
    shutil.copytree(folders["sdxl"] / "vae", tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps({**config, "force_upcast": False}))
    codec = LatentCodec.load(tmp_path, dtype=torch.bfloat16)
    assert codec.vae.dtype == torch.bfloat16
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    exact = LatentCodec.load(folders["sdxl"]).encode(images)
    assert 0 < float((codec.encode(images) - exact).norm() / exact.norm()) < 0.05


def test_latent_shape_needs_no_weights(folders, tmp_path):
    (tmp_path / "vae").mkdir()
    shutil.copy(folders["sdxl"] / "vae" / "config.json", tmp_path / "vae")
    assert latent_shape(tmp_path, 32) == (4, 16, 16)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "there is no folder"),
        (lambda folder: shutil.rmtree(folder / "text_encoder_2"), "has no text_encoder_2/"),
        (lambda folder: (folder / "text_encoder" / "config.json").unlink(), "text_encoder cannot be loaded"),
        (lambda folder: (folder / "text_encoder" / "model.safetensors").write_bytes(b"no"), "text_encoder cannot"),
        (lambda folder: (folder / "text_encoder" / "model.safetensors").unlink(), "text_encoder cannot be loaded"),
        (lambda folder: shutil.rmtree(folder / "vae"), "has no vae/"),
        (lambda folder: (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"no"), "vae cannot"),
    ],
)
def test_a_spoilt_pipeline_is_one_line(folders, tmp_path, spoil, message):
    folder = tmp_path / "pipeline"
    shutil.copytree(folders["sdxl"], folder)
    spoil(folder)
    with pytest.raises(UserError, match=message) as raised:
        TextEncoders.load(folder, "sdxl")
        LatentCodec.load(folder)
    assert "\n" not in str(raised.value) and "model.path" in str(raised.value)


def test_a_kind_without_text(folders):
    with pytest.raises(UserError, match="unet2d"):
        TextEncoders.load(folders["sdxl"], "unet2d")
