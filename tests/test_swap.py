"""Swapped operators in small UNets: values and gradients against plain diffusers in float64, and what stays."""

from __future__ import annotations

import copy
import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor
from pipelines import UNET_SD15, UNET_SDXL

from dmd2_fast.config import ModelConfig
from dmd2_fast.networks import describe_network, prepare_network, swap
from dmd2_fast.networks.swap import restore_operators, swap_operators, swapped_operators
from dmd2_fast.networks.text_unet import TextUNet
from dmd2_fast.networks.unet2d import UNet2D

ATTENDING = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "num_class_embeds": 11,
}
SCALED = {
    "resnet_time_scale_shift": "scale_shift",
    "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
    "upsample_type": "resnet",
}
CONFIGS = {
    "sdxl": (UNet2DConditionModel, UNET_SDXL, {"group_norm_silu": 23, "scaled_dot_product_attention": 22}),
    "sd15": (UNet2DConditionModel, UNET_SD15, {"group_norm_silu": 23, "scaled_dot_product_attention": 14}),
    "unet2d": (UNet2DModel, ATTENDING, {"group_norm_silu": 17, "scaled_dot_product_attention": 4}),
    "scale_shift": (UNet2DModel, ATTENDING | SCALED, {"group_norm_silu": 11, "scaled_dot_product_attention": 4}),
}


def build(name: str) -> torch.nn.Module:
    kind, config, _ = CONFIGS[name]
    torch.manual_seed(0)
    unet = kind(**config).eval()
    with torch.no_grad():  # weights and biases of normalisations other than 1 and 0
        for parameter in unet.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return unet


def arguments(name: str, num: int = 2, mask: bool = False) -> tuple[torch.Tensor, dict]:
    generator = torch.Generator().manual_seed(1)
    kind, config, _ = CONFIGS[name]
    x = torch.randn(num, 4, config["sample_size"], config["sample_size"], generator=generator)
    given = {"timestep": torch.tensor([3, 700])[:num]}
    if kind is UNet2DModel:
        return x, given | {"class_labels": torch.tensor([1, 10])[:num]}
    given["encoder_hidden_states"] = torch.randn(num, 7, 32, generator=generator)
    if mask:
        given["encoder_attention_mask"] = torch.arange(7)[None] < torch.tensor([[4], [7]])
    if name == "sdxl":
        sizes = torch.tensor([[32.0, 40, 0, 4, 32, 32]]).repeat(num, 1)
        given["added_cond_kwargs"] = {"text_embeds": torch.randn(num, 16, generator=generator), "time_ids": sizes}
    return x, given


def cast(value, dtype: torch.dtype):
    if isinstance(value, dict):
        return {name: cast(item, dtype) for name, item in value.items()}
    return value.to(dtype) if value.is_floating_point() else value


def results(unet, x, given, dtype: torch.dtype, memory_format=torch.contiguous_format) -> dict[str, torch.Tensor]:
    """The output, and the gradients of a fixed weighting of it in the input and every parameter."""
    unet, given = unet.to(dtype), cast(given, dtype)
    x = x.to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    output = unet(x, **given).sample
    weighting = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    parameters = dict(unet.named_parameters())
    gradients = torch.autograd.grad(output, [x, *parameters.values()], weighting)
    return {"output": output.detach(), **dict(zip(("x", *parameters), gradients, strict=True))}


def assert_twice_plain(ours: dict, plain: dict, exact: dict) -> None:
    """Relative errors against float64 are at most twice plain diffusers' own in the same dtype.

    Of the output, of the gradient in the input, and of the parameters' gradients: their root mean square and their
    worst. Of hundreds of tensors some come out better in plain diffusers by luck: none is held to its own.
    """
    # A key's bias cancels in the softmax: its gradient is 0, and what is found instead has the size of the others'.
    scales = {name: value.norm() + 1e-3 * exact["output"].norm() for name, value in exact.items()}
    errors = [
        {name: float((run[name].double() - value).norm() / scales[name]) for name, value in exact.items()}
        for run in (ours, plain)
    ]
    error, own = [
        {"output": run.pop("output"), "x": run.pop("x"), "worst": max(run.values()),
         "all": math.sqrt(sum(value**2 for value in run.values()) / len(run))}
        for run in errors
    ]  # fmt: skip
    eps = torch.finfo(ours["output"].dtype).eps
    for name in error:
        assert 0 < error[name] <= 2 * own[name] + eps, (
            f"{name}: error {error[name]:.3g}, plain diffusers {own[name]:.3g}"
        )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients(name, dtype, memory_format):
    unet = build(name).to(dtype)
    x, given = arguments(name)
    x, given = x.to(dtype), cast(given, dtype)
    plain = results(copy.deepcopy(unet), x, given, dtype, memory_format)
    exact = results(copy.deepcopy(unet), x, given, torch.float64)
    swapped = swap_operators(unet)
    assert swapped_operators(unet) == CONFIGS[name][2] and len(swapped) == sum(CONFIGS[name][2].values())
    assert_twice_plain(results(unet, x, given, dtype, memory_format), plain, exact)


@pytest.mark.parametrize("name", CONFIGS)
def test_swapping_is_reversible(name):
    unet = build(name)
    x, given = arguments(name)
    modules, state = dict(unet.named_modules()), unet.state_dict()
    parameters, classes = dict(unet.named_parameters()), {path: type(module) for path, module in modules.items()}
    before = results(unet, x, given, torch.float32)

    for path, operator in swap_operators(unet):
        assert path in modules and operator in ("group_norm_silu", "scaled_dot_product_attention")
    assert swap_operators(unet) == []  # nothing is left to swap
    assert list(unet.state_dict()) == list(state)
    assert all(now is parameters[path] for path, now in unet.named_parameters())
    fused = results(unet, x, given, torch.float32)
    assert not torch.equal(fused["output"], before["output"])  # other operators, in the last bits
    copied = copy.deepcopy(unet)
    assert swapped_operators(copied) == swapped_operators(unet)
    assert torch.equal(results(copied, x, given, torch.float32)["output"], fused["output"])

    restore_operators(unet)
    assert {path: type(module) for path, module in unet.named_modules()} == classes and not swapped_operators(unet)
    for path, value in results(unet, x, given, torch.float32).items():
        assert torch.equal(value, before[path]), path


@pytest.mark.parametrize("name", ["sdxl", "unet2d"])
def test_checkpointing_and_meta(name):
    unet = build(name)
    swap_operators(unet)
    x, given = arguments(name)
    kept = results(unet, x, given, torch.float32)
    unet.enable_gradient_checkpointing()
    for path, value in results(unet.train(), x, given, torch.float32).items():
        assert torch.equal(value, kept[path]), path
    with torch.device("meta"):
        empty = CONFIGS[name][0](**CONFIGS[name][1])
    swap_operators(empty)
    on_meta = {key: {k: v.to("meta") for k, v in value.items()} if isinstance(value, dict) else value.to("meta")
               for key, value in given.items()}  # fmt: skip
    assert empty(x.to("meta"), **on_meta).sample.shape == x.shape


def test_hooks_of_a_normalisation_run_around_its_fused_forward():
    """ZeRO-3 gathers a module's own parameters in its forward hooks: the fused operator must be inside them."""
    unet = build("unet2d")
    swap_operators(unet)
    x, given = arguments("unet2d")
    with torch.no_grad():
        expected = unet(x, **given).sample
    seen = []
    for path, module in unet.named_modules():
        if isinstance(module, torch.nn.GroupNorm):
            weights = {name: value.clone() for name, value in module.named_parameters()}

            def gather(module, _, path=path, weights=weights):
                seen.append(path)
                for name, value in module.named_parameters():
                    value.data = weights[name]

            def release(module, *_):
                for value in module.parameters():
                    value.data = torch.empty(0)

            release(module)
            module.register_forward_pre_hook(gather)
            module.register_forward_hook(release)
    with torch.no_grad():
        assert torch.equal(unet(x, **given).sample, expected)
    assert len(seen) == len(set(seen)) == 17 + 4  # those before the attentions too


def test_other_modules_are_left_alone():
    unet = UNet2DModel(**ATTENDING | {"act_fn": "gelu"})
    assert {operator for _, operator in swap_operators(unet)} == {"scaled_dot_product_attention", "group_norm_silu"}
    # conv_act is a SiLU whatever act_fn says
    assert swapped_operators(unet)["group_norm_silu"] == 1

    class OwnNorm(torch.nn.GroupNorm):
        pass

    unet = UNet2DModel(**ATTENDING)
    unet.mid_block.resnets[0].norm2.__class__ = OwnNorm
    swap_operators(unet)
    assert swapped_operators(unet)["group_norm_silu"] == 17 - 2  # the whole block keeps its own
    assert type(unet.mid_block.resnets[0].norm2) is OwnNorm


@pytest.mark.parametrize("mask", [False, True])
def test_explicit_attention_is_replaced(mask):
    unet = build("sd15")
    x, given = arguments("sd15", mask=mask)
    unet.set_attn_processor(AttnProcessor())
    plain = results(copy.deepcopy(unet), x, given, torch.float32)
    exact = results(copy.deepcopy(unet), x, given, torch.float64)
    swap_operators(unet)
    assert_twice_plain(results(unet, x, given, torch.float32), plain, exact)


@pytest.fixture
def flash_calls(monkeypatch):
    """A stand-in for flash-attn that runs on the CPU: shapes of the queries it was given."""
    calls = []

    def flash_attn_func(q, k, v, softmax_scale=None):
        calls.append(tuple(q.shape))
        q, k, v = (part.transpose(1, 2).float() for part in (q, k, v))
        weights = (q @ k.transpose(2, 3) * softmax_scale).softmax(3)
        return (weights @ v).transpose(1, 2).to(torch.bfloat16)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=flash_attn_func))
    monkeypatch.setattr(swap, "FLASH_DEVICES", ("cpu",))
    return calls


def test_flash_attention_where_it_fits(flash_calls):
    unet = build("sd15").to(torch.bfloat16)  # heads of 8 and 16 channels
    x, given = arguments("sd15")
    x, given = x.to(torch.bfloat16), cast(given, torch.bfloat16)
    plain = results(copy.deepcopy(unet), x, given, torch.bfloat16)
    exact = results(copy.deepcopy(unet), x, given, torch.float64)
    swap_operators(unet)
    assert swapped_operators(unet)["flash_attn"] == 14
    assert_twice_plain(results(copy.deepcopy(unet), x, given, torch.bfloat16), plain, exact)
    assert len(flash_calls) == 14 and set(flash_calls) == {(2, 256, 2, 8), (2, 64, 2, 16), (2, 16, 2, 16)}

    flash_calls.clear()
    with torch.no_grad():
        copy.deepcopy(unet).float()(x.float(), **cast(given, torch.float32))  # not in f32
        _, masked = arguments("sd15", mask=True)
        unet(x, **cast(masked, torch.bfloat16))  # not with a mask: 7 attentions to themselves have none
    assert len(flash_calls) == 7


def test_flash_attention_takes_multiples_of_eight(flash_calls):
    assert swap.fits_flash(torch.zeros(1, 2, 3, 256, dtype=torch.bfloat16))
    for shape, dtype in (
        ((1, 2, 3, 264), torch.bfloat16),
        ((1, 2, 3, 12), torch.float16),
        ((1, 2, 3, 8), torch.float32),
    ):
        assert not swap.fits_flash(torch.zeros(shape, dtype=dtype))


def test_flash_attention_needs_a_gpu():
    assert not swap.fits_flash(torch.zeros(1, 2, 3, 64, dtype=torch.bfloat16))
    assert swap.find_flash() is None or torch.cuda.is_available()


def adapter(name: str):
    return TextUNet(build(name)) if name in ("sdxl", "sd15") else UNet2D(build(name))


def forward(network, dtype=torch.float32):
    x, given = arguments("unet2d")
    x = x.to(dtype).requires_grad_()
    output, (mid,) = network(x, given["timestep"], {"class_labels": given["class_labels"]}, levels=("mid",))
    (output.square().mean() + mid.float().square().mean()).backward()
    return output.detach(), mid.detach(), x.grad


def test_switches_of_the_config():
    network = adapter("unet2d")
    prepare_network(network, ModelConfig("-", fused_operators=False))
    assert describe_network(network) == "diffusers' own operators"
    expected = forward(network)
    prepare_network(network, ModelConfig("-", channels_last=True))
    assert describe_network(network) == "17 x group_norm_silu, 4 x scaled_dot_product_attention, channels_last"
    got = forward(network)
    assert got[1].is_contiguous(memory_format=torch.channels_last) and not got[1].is_contiguous()
    for ours, plain in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_blocks_compile_without_a_break():
    network = adapter("unet2d")
    swap_operators(network.unet)
    expected = forward(network)
    network.compile_blocks(backend="aot_eager", fullgraph=True)
    assert describe_network(network).endswith("torch.compile") and network.is_compiled
    for ours, eager in zip(forward(network), expected, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)


def test_prepare_compiles_when_asked_to():
    network = adapter("unet2d")
    prepare_network(network, ModelConfig("-", compile=True))
    assert network.is_compiled and list(network.state_dict()) == list(adapter("unet2d").state_dict())


def test_scale_of_the_flash_call_is_the_attention_own(flash_calls):
    """(N, L, heads, D) goes in and comes out: a transposed layout would still have the right number of elements."""
    attn = build("sd15").mid_block.attentions[0].transformer_blocks[0].attn1.to(torch.bfloat16)
    h = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    q, k, v = (layer(h).unflatten(2, (attn.heads, -1)).transpose(1, 2) for layer in (attn.to_q, attn.to_k, attn.to_v))
    expected = attn.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    attn.processor = swap.FusedAttention(attn.processor)
    torch.testing.assert_close(attn(h), expected, rtol=0.02, atol=2e-3)
    assert flash_calls == [(2, 16, 2, 16)]
