"""UNet2DConditionModel as a denoiser's network: diffusers' own forward, features, and pipelines as teachers."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from pipelines import make_pipeline

from dmd2_fast.config import ModelConfig
from dmd2_fast.errors import UserError
from dmd2_fast.networks import build_denoiser, build_without_weights, denoiser_settings, load_denoiser
from dmd2_fast.networks.source import open_source
from dmd2_fast.networks.unet import DECODER
from dmd2_fast.plan_networks import PUBLISHED

KINDS = ("sdxl", "sd15")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: make_pipeline(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def text_condition(kind: str, num: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    condition = {"prompt_embeds": torch.randn(num, 7, 32, generator=generator)}
    if kind == "sdxl":
        condition["pooled_prompt_embeds"] = torch.randn(num, 16, generator=generator)
        condition["time_ids"] = torch.tensor([[32.0, 40, 0, 4, 32, 32]]).repeat(num, 1)
    return condition


def diffusers_arguments(condition):
    if "time_ids" not in condition:
        return {"encoder_hidden_states": condition["prompt_embeds"]}
    added = {"text_embeds": condition["pooled_prompt_embeds"], "time_ids": condition["time_ids"]}
    return {"encoder_hidden_states": condition["prompt_embeds"], "added_cond_kwargs": added}


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_is_diffusers_forward(folders, kind):
    from diffusers import UNet2DConditionModel

    denoiser = load_denoiser(ModelConfig(str(folders[kind]), kind, fused_operators=False))
    unet = UNet2DConditionModel.from_pretrained(folders[kind], subfolder="unet")
    x, t, condition = torch.randn(3, 4, 16, 16), torch.tensor([1, 250, 999]), text_condition(kind)
    with torch.no_grad():
        expected = unet(x, t, **diffusers_arguments(condition)).sample
        output, features = denoiser(x, t, condition, levels=("mid", "down.0", "down.1"))
        alone = denoiser.encode(x, t, condition, levels=("mid", "down.0", "down.1"))
    assert torch.equal(output, expected)
    for level, feature, encoded in zip(("mid", "down.0", "down.1"), features, alone, strict=True):
        assert feature.shape[1:] == denoiser.network.feature_shape(level)
        assert torch.equal(feature, encoded)
    assert denoiser.network.unet.state_dict().keys() == unet.state_dict().keys()
    assert {name: value.shape[1:] for name, value in condition.items() if name != "prompt_embeds"} == {
        name: shape for name, shape in denoiser.network.condition_shapes.items() if name != "prompt_embeds"
    }


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_decoder(folders, kind):
    denoiser = load_denoiser(ModelConfig(str(folders[kind]), kind))
    x, t, condition = torch.randn(5, 4, 16, 16), torch.arange(5) * 100, text_condition(kind, 5)
    with torch.no_grad():
        whole, _ = denoiser(x, t, condition)
        rows, _ = denoiser(x, t, condition, decode_rows=2)
    torch.testing.assert_close(rows, whole[:2])
    for name, module in denoiser.network.unet.named_children():
        if f"{name}." in DECODER:
            module.register_forward_pre_hook(lambda *_: pytest.fail("the decoder ran"))
    denoiser.encode(x, t, condition)


def test_unconditional(folders):
    """SDXL: zeros, with the size conditions kept; SD1.5: the empty prompt's embedding, for every row."""
    condition = text_condition("sdxl")
    empty = load_denoiser(ModelConfig(str(folders["sdxl"]), "sdxl")).unconditional(condition)
    assert not empty["prompt_embeds"].any() and not empty["pooled_prompt_embeds"].any()
    assert torch.equal(empty["time_ids"], condition["time_ids"])
    denoiser, condition = load_denoiser(ModelConfig(str(folders["sd15"]), "sd15")), text_condition("sd15")
    with pytest.raises(ValueError, match="empty prompt"):
        denoiser.unconditional(condition)
    denoiser.network.null_prompt_embeds = torch.arange(7 * 32.0).reshape(7, 32)
    assert torch.equal(denoiser.unconditional(condition)["prompt_embeds"][2], denoiser.network.null_prompt_embeds)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gives_the_same_gradients(folders, kind):
    gradients = []
    for checkpointing in (False, True):
        denoiser = load_denoiser(ModelConfig(str(folders[kind]), kind, activation_checkpointing=checkpointing))
        assert denoiser.network.unet.is_gradient_checkpointing == checkpointing
        x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
        output, (mid,) = denoiser(x, torch.tensor([10, 900]), text_condition(kind, 2), levels=("mid",))
        parameters = dict(denoiser.named_parameters())
        loss = output.square().mean() + mid.square().mean()
        gradients.append(torch.autograd.grad(loss, [x, *parameters.values()]))
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_settings_and_sizes(folders):
    denoiser = load_denoiser(ModelConfig(str(folders["sdxl"]), "sdxl", sample_size=8))
    assert denoiser.network.image_shape == (4, 8, 8) and denoiser.network.feature_shape("mid") == (32, 2, 2)
    settings = json.loads(json.dumps(denoiser_settings(denoiser)))
    assert denoiser_settings(build_denoiser(settings)) == settings
    with pytest.raises(UserError, match="sample_size 6: expected a multiple of 4"):
        load_denoiser(ModelConfig(str(folders["sdxl"]), "sdxl", sample_size=6))


def test_weights_in_several_files(folders, tmp_path):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folders["sdxl"], subfolder="unet")
    shutil.copytree(folders["sdxl"] / "scheduler", tmp_path / "scheduler")
    unet.save_pretrained(tmp_path / "unet", max_shard_size="200KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    loaded = load_denoiser(ModelConfig(str(tmp_path), "sdxl")).network.unet.state_dict()
    for name, value in unet.state_dict().items():
        assert torch.equal(loaded[name], value)
    next((tmp_path / "unet").glob("*-of-*.safetensors")).unlink()
    with pytest.raises(UserError, match="cannot be read"):
        load_denoiser(ModelConfig(str(tmp_path), "sdxl"))


def spoil(folder, file: str, **values):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}, "beta_schedule 'linear'.*scaled-linear"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow_prediction"}, "prediction_type"),
        ("unet/config.json", {"in_channels": 9}, "in_channels 9, out_channels 4"),
        ("unet/config.json", {"addition_embed_type": "text"}, 'conditioned as "sd15"'),
        ("unet/config.json", {"block_out_channels": [16, 32]}, "refuses this configuration"),
        ("unet/config.json", {"cross_attention_dim": 48}, "does not fit the network"),
    ],
)
def test_other_models_are_refused(folders, tmp_path, file, values, message):
    folder = tmp_path / "pipeline"
    shutil.copytree(folders["sdxl"], folder)
    spoil(folder, file, **values)
    with pytest.raises(UserError, match=message):
        load_denoiser(ModelConfig(str(folder), "sdxl"))


def test_missing_pipeline(tmp_path):
    with pytest.raises(UserError, match=r"no unet/config\.json.*hub id such as"):
        open_source(ModelConfig(str(tmp_path / "missing"), "sdxl"))
    with pytest.raises(UserError, match='conditioned as "sdxl"'):
        open_source(ModelConfig(str(make_pipeline(tmp_path / "xl")), "sd15"))


def test_full_size_sdxl_on_the_meta_device():
    """The published counts: 2.567 B, of which encoder and middle block 1.243 B."""
    network = {"kind": "unet2d_condition", "config": PUBLISHED["stabilityai/stable-diffusion-xl-base-1.0"]}
    noise = {"schedule": {"kind": "ddpm"}, "prediction_type": "epsilon", "preconditioning": "none"}
    denoiser = build_without_weights({"network": network, **noise})
    sizes = {name: value.numel() for name, value in denoiser.network.unet.named_parameters()}
    assert sum(sizes.values()) == pytest.approx(2.567e9, abs=0.5e6)
    assert sum(size for name, size in sizes.items() if not name.startswith(DECODER)) == pytest.approx(
        1.243e9, abs=0.5e6
    )
    assert denoiser.network.image_shape == (4, 128, 128)
    assert denoiser.network.feature_shape("mid") == (1280, 32, 32)
    assert denoiser.network.condition_shapes == {
        "prompt_embeds": (None, 2048), "pooled_prompt_embeds": (1280,), "time_ids": (6,)
    }  # fmt: skip
