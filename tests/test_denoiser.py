"""The UNet adapter against diffusers' own forward, the EDM wrapping against the paper's formula, features, heads."""

import math

import pytest
import torch
from tiny import NETWORK, SHAPE, random_batch, tiny_denoiser

from dmd2_fast.config import ModelConfig
from dmd2_fast.denoiser import Denoiser, concat_conditions
from dmd2_fast.errors import UserError
from dmd2_fast.heads import GANHead, GANHeads, num_groups
from dmd2_fast.networks import build_denoiser, build_network, denoiser_settings, load_denoiser, save_denoiser
from dmd2_fast.networks.unet2d import UNet2D
from dmd2_fast.ops._common import PREDICTION_TYPES
from dmd2_fast.schedules import DDPMSchedule, KarrasSchedule, make_schedule


def network(**changes) -> UNet2D:
    torch.manual_seed(0)
    return UNet2D.from_config({**NETWORK, **changes}, patch_size=1).eval()


VARIANTS = {
    "plain": {},
    "attention": {
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": 8,
        "add_attention": True,
    },
    "three levels, two layers": {
        "sample_size": 8,
        "block_out_channels": [16, 32, 32],
        "down_block_types": ["DownBlock2D"] * 3,
        "up_block_types": ["UpBlock2D"] * 3,
        "layers_per_block": 2,
    },
    "no classes": {"num_class_embeds": None},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapter_is_diffusers_forward(variant):
    net = network(**VARIANTS[variant])
    size = net.unet.config.sample_size
    x, t = torch.randn(3, 4, size, size), torch.tensor([1.0, 250.0, 999.0])
    labels = torch.tensor([1, 5, 10]) if net.unet.config.num_class_embeds else None
    with torch.no_grad():
        expected = net.unet(x, t, class_labels=labels).sample
        output, features = net(x, t, {"class_labels": labels}, levels=("mid", "down.0"))
    assert torch.equal(output, expected)
    for level, feature in zip(("mid", "down.0"), features, strict=True):
        assert feature.shape[1:] == net.feature_shape(level)


def test_mid_features_are_the_middle_blocks_output():
    net = network()
    seen = []
    net.unet.mid_block.register_forward_hook(lambda module, args, output: seen.append(output))
    _, (mid,) = net(torch.randn(2, 4, 4, 4), torch.ones(2), {"class_labels": torch.tensor([0, 1])}, levels=("mid",))
    assert mid is seen[0]


def test_only_the_first_rows_are_decoded_and_the_others_change_nothing():
    net = network()
    x, t, labels = torch.randn(5, 4, 4, 4), torch.rand(5), torch.arange(5)
    with torch.no_grad():
        whole, all_features = net(x, t, {"class_labels": labels}, levels=("mid",))
        rows, features = net(x, t, {"class_labels": labels}, decode_rows=2, levels=("mid",))
        alone, _ = net(x[:2], t[:2], {"class_labels": labels[:2]})
    torch.testing.assert_close(rows, whole[:2])
    torch.testing.assert_close(rows, alone)
    assert torch.equal(features[0], all_features[0])


def test_encode_does_not_run_the_decoder():
    denoiser = tiny_denoiser()

    def fail(*_):
        raise AssertionError("the decoder ran")

    for block in [*denoiser.network.unet.up_blocks, denoiser.network.unet.conv_out]:
        block.register_forward_pre_hook(fail)
    batch = random_batch()
    (mid,) = denoiser.encode(batch.x0, torch.ones(4), batch.condition)
    assert mid.shape == (4, 16, 2, 2)


def test_decode_grad_off_leaves_the_encoders_gradient_alone():
    """The adversarial gradient to the input must be that of the encoder, and the prediction must carry none."""
    denoiser, batch = tiny_denoiser(), random_batch()
    gradients = []
    for decode_rows in (0, None):
        x = batch.x0.clone().requires_grad_()
        prediction, (mid,) = denoiser(
            x, torch.ones(4), batch.condition, decode_rows=decode_rows, decode_grad=False, levels=("mid",)
        )
        assert prediction is None or not prediction.requires_grad
        gradients.append(torch.autograd.grad(mid.square().sum(), x)[0])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("sigma", [0.01, 0.8, 60.0])
def test_edm_preconditioning(sigma):
    """D = c_skip x + c_out F(c_in x; ln(sigma) / 4), coefficients from table 1 of Karras et al. 2022."""
    data = 0.75
    torch.manual_seed(0)
    net = UNet2D.from_config(NETWORK, patch_size=2).eval()
    denoiser = Denoiser(net, KarrasSchedule(sigma_data=data), "sample", "edm")
    x, labels = torch.randn(2, *SHAPE), torch.tensor([3, 4])
    c_skip = data**2 / (sigma**2 + data**2)
    c_out = sigma * data / math.sqrt(sigma**2 + data**2)
    c_in = 1 / math.sqrt(sigma**2 + data**2)
    with torch.no_grad():
        raw, _ = net(c_in * x, torch.full((2,), math.log(sigma) / 4), {"class_labels": labels})
        output = denoiser.predict(x, torch.full((2,), sigma), {"class_labels": labels})
    torch.testing.assert_close(output, c_skip * x + c_out * raw, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "t"), [("karras", [0.01, 60.0]), ("ddpm", [3, 999]), ("rectified_flow", [0.1, 1.0])])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_without_preconditioning_the_network_gets_what_it_is_given(kind, t, prediction_type):
    net, x, labels = UNet2D.from_config(NETWORK, patch_size=2).eval(), torch.randn(2, *SHAPE), torch.tensor([3, 4])
    denoiser = Denoiser(net, make_schedule(kind), prediction_type)
    with torch.no_grad():
        raw, _ = net(x, torch.tensor(t), {"class_labels": labels})
        assert torch.equal(denoiser.predict(x, torch.tensor(t), {"class_labels": labels}), raw)


@pytest.mark.parametrize("kind", ["ddpm", "karras", "rectified_flow"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_step_without_an_x0_is_refused(kind, prediction_type):
    """alpha is 0 at the flow's time 1: x0 = (x_t - sigma eps) / alpha alone divides by it."""
    denoiser = Denoiser(network(), make_schedule(kind), prediction_type)
    if (kind, prediction_type) == ("rectified_flow", "epsilon"):
        with pytest.raises(ValueError, match=r"alpha is 0 at 1\.0, where epsilon says nothing of x0"):
            denoiser.steps((1.0, 0.5))
        assert denoiser.steps((0.98, 0.5)).tolist() == pytest.approx([0.98, 0.5])
    else:
        assert denoiser.steps((1.0,)).tolist() == [1]
    with pytest.raises(ValueError, match="steps: 1001"):
        denoiser.steps((1001.0,))


def test_pixel_patches_are_undone():
    net = UNet2D(network().unet, patch_size=2)
    assert net.image_shape == (1, 8, 8)
    output, _ = net(torch.randn(2, 1, 8, 8), torch.ones(2), {"class_labels": torch.tensor([0, 1])})
    assert output.shape == (2, 1, 8, 8)


def test_unconditional_is_the_last_embedding():
    condition = {"class_labels": torch.tensor([0, 7])}
    assert tiny_denoiser().unconditional(condition)["class_labels"].tolist() == [10, 10]


def test_senseless_denoisers_are_refused():
    with pytest.raises(ValueError, match="karras"):
        Denoiser(network(), KarrasSchedule(), "epsilon", "edm")
    with pytest.raises(ValueError, match="karras"):
        Denoiser(network(), DDPMSchedule(), "sample", "edm")
    with pytest.raises(ValueError, match="eps"):
        Denoiser(network(), DDPMSchedule(), "eps")
    with pytest.raises(ValueError, match=r"up\.3"):
        network().feature_shape("up.3")


def test_a_bf16_network_does_not_round_its_output():
    """What trains is the difference of two predictions: the last layer runs in f32, with bf16 weights too."""
    denoiser, batch = tiny_denoiser(0, "ddpm", "epsilon").bfloat16(), random_batch()
    t = torch.tensor([10, 300, 600, 999])
    with torch.no_grad():
        output = denoiser.predict(batch.x0, t, batch.condition)
        wide = tiny_denoiser(0, "ddpm", "epsilon").predict(batch.x0, t, batch.condition)
    assert output.dtype == torch.float32 and not torch.equal(output, output.bfloat16().float())
    torch.testing.assert_close(output, wide, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    "changes",
    [
        {"sample_size": None}, {"sample_size": "4"}, {"norm_num_groups": 0}, {"out_channels": 8}, {"in_channels": 3},
        {"down_block_types": []}, {"block_out_channels": [-16, 16]}, {"num_class_embeds": -1},
        {"class_embed_type": "timestep"}, {"time_embedding_type": "fourier"}, {"time_embedding_type": "learned"},
        {"up_block_types": ["SkipUpBlock2D", "UpBlock2D"]}, {"sample_sizes": 4},
        {"add_attention": True, "attention_head_dim": 0},
    ],
)  # fmt: skip
def test_networks_that_cannot_be_built_are_refused(changes):
    with pytest.raises(UserError, match="network: UNet2DModel refuses this configuration"):
        build_network({"kind": "unet2d", "config": {**NETWORK, **changes}, "patch_size": 2})


def test_a_loaded_network_draws_no_random_numbers(tmp_path):
    """Dropout in distillation would depend on ranks and resuming."""
    denoiser = Denoiser(UNet2D.from_config({**NETWORK, "dropout": 0.5}, 2), KarrasSchedule(), "sample", "edm")
    save_denoiser(denoiser, tmp_path)
    loaded, batch = load_denoiser(tmp_path), random_batch()
    with torch.no_grad():
        first, second = (loaded.predict(batch.x0, torch.ones(4), batch.condition) for _ in range(2))
    assert torch.equal(first, second)


def test_concat_conditions():
    joined = concat_conditions({"a": torch.zeros(2), "b": torch.ones(2)}, {"b": torch.ones(1), "a": torch.zeros(1)})
    assert joined["a"].tolist() == [0, 0, 0] and joined["b"].tolist() == [1, 1, 1]


# ---------------------------------------------------------------------------------------------------- folders


def test_a_folder_gives_the_same_denoiser_and_loads_in_diffusers(tmp_path):
    from diffusers import UNet2DModel

    denoiser, batch = tiny_denoiser(), random_batch()
    save_denoiser(denoiser, tmp_path / "teacher")
    again = load_denoiser(ModelConfig(str(tmp_path / "teacher"), fused_operators=False))
    assert denoiser_settings(again) == denoiser_settings(denoiser)
    sigma = torch.full((4,), 0.7)
    with torch.no_grad():
        assert torch.equal(
            again.predict(batch.x0, sigma, batch.condition), denoiser.predict(batch.x0, sigma, batch.condition)
        )
    plain = UNet2DModel.from_pretrained(tmp_path / "teacher" / "unet")
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), denoiser.parameters(), strict=True))


def test_bad_folders_give_one_clear_message(tmp_path):
    with pytest.raises(UserError, match="there is no denoiser"):
        load_denoiser(tmp_path / "nothing")
    save_denoiser(tiny_denoiser(), tmp_path / "teacher")
    weights = tmp_path / "teacher" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        load_denoiser(tmp_path / "teacher")
    (tmp_path / "teacher" / "denoiser.json").write_text("{")
    with pytest.raises(UserError, match=r"denoiser\.json cannot be read"):
        load_denoiser(tmp_path / "teacher")


def test_weights_of_other_shapes_are_named(tmp_path):
    save_denoiser(tiny_denoiser(), tmp_path / "a")
    settings = denoiser_settings(tiny_denoiser())
    settings["network"]["config"]["block_out_channels"] = [32, 32]
    save_denoiser(build_denoiser(settings), tmp_path / "b")
    (tmp_path / "b" / "unet" / "diffusion_pytorch_model.safetensors").replace(
        tmp_path / "a" / "unet" / "diffusion_pytorch_model.safetensors"
    )
    with pytest.raises(UserError, match=r"conv_in.weight is \(32, 4, 3, 3\), expected \(16, 4, 3, 3\)"):
        load_denoiser(tmp_path / "a")


# ---------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize(
    ("channels", "size", "strided"), [(1280, 32, 3), (1280, 8, 1), (768, 8, 1), (64, 2, 0), (64, 4, 0)]
)
def test_head_shapes_are_the_published_ones(channels, size, strided):
    """Counted from the description: 4x4 stride 2 down to 4x4, one convolution over the rest, one projection."""
    with torch.device("meta"):
        head = GANHead(channels, size)
        logits = head(torch.empty(2, channels, size, size))
    last = min(size, 4)
    convolutions = strided * (channels * channels * 16 + channels) + channels * channels * last**2 + channels
    norms = (strided + 1) * 2 * channels
    assert sum(p.numel() for p in head.parameters()) == convolutions + norms + channels + 1
    assert logits.shape == (2, 1)


def test_sdxl_head_uses_32_groups_and_small_heads_keep_several_values_a_group():
    assert num_groups(1280) == 32 and num_groups(64) == 8 and num_groups(768) == 32
    head = GANHead(64, 2)
    torch.manual_seed(0)
    logits = head(torch.randn(16, 64, 2, 2))
    assert logits.std() > 1e-2, "a head whose groups hold one value gives every sample the same logit"


def test_heads_of_several_levels():
    heads = GANHeads(((16, 4, 4), (32, 2, 2)))
    features = (torch.randn(3, 16, 4, 4), torch.randn(3, 32, 2, 2))
    logits = heads(features)
    assert logits.shape == (3, 2) and logits.dtype == torch.float32
    torch.testing.assert_close(logits[:, 1:], heads.heads[1](features[1]))
