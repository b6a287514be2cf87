"""Adapters on one base: against W x + (alpha / rank) B A x written out here, with and without checkpointing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lora_oracle import LORA as TRAINED
from lora_oracle import PlainLoRA, plain_lora_run, prepare_with_attention, start_apart
from one_rank import group_of_one, make_trainer
from pipelines import make_pipeline
from plain_loop import relative, worst_loss, write_config
from safetensors.torch import load_file
from test_text_unet import diffusers_arguments, text_condition

from dmd2_fast.config import LoRAConfig, ModelConfig
from dmd2_fast.engine import full_state_dict
from dmd2_fast.errors import ConfigError, UserError
from dmd2_fast.export import load_generator, save_generator
from dmd2_fast.networks import load_denoiser
from dmd2_fast.networks.lora import (
    AdaptedDenoiser,
    SharedBase,
    _BoundCheckpoint,
    check_targets,
    merge_adapter,
)

LORA = LoRAConfig(rank=4, alpha=8, targets=("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "conv1"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_pipeline(tmp_path_factory.mktemp("lora"), "sdxl")


def make(folder, **model):
    """Base and both adapters in f64, all weights drawn."""
    base = SharedBase(load_denoiser(ModelConfig(str(folder), "sdxl", **model)).requires_grad_(False), LORA)
    base.inject()
    base.denoiser.double()
    adapted = {name: AdaptedDenoiser(base, name) for name in ("generator", "fake_score")}
    torch.manual_seed(0)
    for module in adapted.values():
        for parameter in module.parameters():
            parameter.data.normal_(0, 0.1)
    return base, adapted


def weights(module):
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 16, 16, generator=generator), torch.tensor([1, 250, 999]), text_condition("sdxl")


def loss_of(output, direction):
    prediction, (feature,) = output
    return (prediction * direction).sum() + feature.square().sum()


def largest_difference(folder, base, adapted):
    """Of gradients (relative) and outputs, from forwards of every network before one backward."""
    direction = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    outputs = {name: module(*inputs(), levels=("mid",)) for name, module in adapted.items()}
    base(None, *inputs())
    sum(loss_of(output, direction) for output in outputs.values()).backward()
    worst = 0.0
    for name, module in adapted.items():
        plain = PlainLoRA(load_denoiser(ModelConfig(str(folder), "sdxl")).double(), weights(module), 2.0).double()
        expected = plain(*inputs(), levels=("mid",))
        loss_of(expected, direction).backward()
        got = {key: parameter.grad for key, parameter in module.named_parameters()}
        worst = max(worst, relative(got, {key: parameter.grad for key, parameter in plain.named_parameters()}))
        torch.testing.assert_close(outputs[name][0], expected[0], rtol=1e-6, atol=1e-6)
    return worst


@pytest.mark.parametrize("checkpointing", [False, True])
def test_each_adapter_has_the_gradients_of_the_formula(folder, checkpointing):
    assert largest_difference(folder, *make(folder, activation_checkpointing=checkpointing)) < 1e-6


def test_recompute_without_its_adapter_would_be_wrong(folder, monkeypatch):
    """The test above can fail: here the recompute uses whatever is bound at backward time, as plain peft does."""
    monkeypatch.setattr(
        _BoundCheckpoint, "__call__", lambda self, function, *inputs: self.checkpoint(function, *inputs)
    )
    base, adapted = make(folder, activation_checkpointing=True)
    with base.bound("generator"):
        assert largest_difference(folder, base, adapted) > 0.1


def test_base_alone_keeps_its_bits(folder):
    base, adapted = make(folder)
    base.denoiser.float()
    expected = load_denoiser(ModelConfig(str(folder), "sdxl"))(*inputs())[0]
    assert torch.equal(base(None, *inputs())[0], expected)
    assert not torch.equal(adapted["generator"](*inputs())[0], expected)
    with base.bound("generator"):
        assert torch.equal(base(None, *inputs())[0], expected)


def test_adapters_own_their_weights_alone(folder):
    """Two adapters and a base: no parameter belongs to two of them."""
    base, adapted = make(folder)
    unet = load_denoiser(ModelConfig(str(folder), "sdxl")).network.unet
    layers = [name for name, _ in unet.named_modules() if any(name.endswith("." + end) for end in LORA.targets)]
    for module in adapted.values():
        assert len(weights(module)) == 2 * len(layers)
        assert sum(p.numel() for p in module.parameters() if p.requires_grad) == sum(
            LORA.rank * (layer.weight.shape[0] + layer.weight[0].numel()) for layer in map(unet.get_submodule, layers)
        )
    owned = {id(p) for module in adapted.values() for p in module.parameters()}
    frozen = [p for p in base.denoiser.parameters() if id(p) not in owned]
    assert len(owned) == 4 * len(layers)
    assert sum(p.numel() for p in frozen) == sum(p.numel() for p in unet.parameters())
    assert not any(p.requires_grad for p in frozen)


@pytest.fixture(scope="module")
def trained_adapter(folder, tmp_path_factory):
    """(the generator's output with its adapter, the file it is exported to), in f32."""
    base, adapted = make(folder)
    base.denoiser.float()
    path = tmp_path_factory.mktemp("export") / "generator.safetensors"
    model = ModelConfig(str(folder), "sdxl", lora=LORA)
    save_generator(path, weights(adapted["generator"]), base.denoiser, (999, 499), model=model)
    with torch.no_grad():
        return adapted["generator"](*inputs())[0], path


def test_diffusers_loads_the_exported_adapter(folder, trained_adapter):
    from diffusers import StableDiffusionXLPipeline

    expected, path = trained_adapter
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    x, t, condition = inputs()
    with torch.no_grad():
        got = pipeline.unet(x, t, **diffusers_arguments(condition)).sample
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_exported_adapter_is_merged_into_its_base(folder, trained_adapter):
    expected, path = trained_adapter
    generator = load_generator(path)
    assert generator.steps == (999, 499)
    with torch.no_grad():
        torch.testing.assert_close(generator.denoiser(*inputs())[0], expected, rtol=1e-5, atol=1e-5)
    unet = load_denoiser(ModelConfig(str(folder), "sdxl")).network.unet
    state = load_file(path)
    state.popitem()
    with pytest.raises(UserError, match=r"file does not fit the network: unet\.\S+ is missing"):
        merge_adapter(unet, state, LORA, "file")


def test_unknown_target_is_refused(folder):
    unet = load_denoiser(ModelConfig(str(folder), "sdxl")).network.unet
    with pytest.raises(ConfigError, match=r"targets: 'to_w' .*; expected some of conv, conv1, .*to_out\.0, to_q"):
        check_targets(unet, LoRAConfig(targets=("to_q", "to_w")))
    with pytest.raises(ConfigError, match="q' is the end"):
        check_targets(unet, LoRAConfig(targets=("q",)))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    prepare_with_attention(folder)
    return folder


RATES = {"optimizer": {"params": {"lr": 1e-3, "eps": 1e-5}}}
SECTION = {
    "model": {"lora": TRAINED, "activation_checkpointing": True},
    "generator": {"steps": [5, 0.8], "ema": 0.9, **RATES},
    "fake_score": {"ttur_ratio": 2, **RATES},
    "adversarial": {"generator_weight": 0.1, "discriminator_weight": 0.1},
}


@pytest.mark.parametrize(("gather", "features"), [("module", "teacher"), ("network", "fake_score")])
def test_one_rank_trains_as_plain_low_rank_layers(digits, monkeypatch, gather, features):
    monkeypatch.syspath_prepend(Path(__file__).parent / "distributed")
    from worker import run_case

    section = {**SECTION, "adversarial": {**SECTION["adversarial"], "features": features}, "run": {"gather": gather}}
    section["run"]["iterations"] = 3
    path, config = write_config(digits, f"one-{gather}", 1, **section)
    start_apart(monkeypatch)
    with group_of_one() as rank:
        got = run_case(rank, path)
    expected = plain_lora_run(config, 3, got["start"])
    for network in ("generator", "fake_score"):
        assert relative(got["gradients"][network], expected.gradients[network]) < 1e-6
        assert relative(got["weights"][network], expected.weights[network]) < 1e-5
    assert worst_loss(got["losses"], expected.losses) < 1e-4


def test_adapters_start_on_the_teacher_and_alike(digits):
    """B is zero, so the generator is the teacher, and A is drawn from the run's seed."""
    with group_of_one() as rank:
        without_gan = {"adversarial": {"generator_weight": 0, "discriminator_weight": 0}}
        first, second = (make_trainer(digits, f"start-{i}", rank, **{**SECTION, **without_gan}) for i in range(2))
        one, two = (full_state_dict(trainer.engines.generator) for trainer in (first, second))
        fake = full_state_dict(first.engines.fake_score)
        x, t, condition = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 3.0]), {"class_labels": torch.tensor([1, 2])}
        with torch.no_grad(), first.engines.for_regression() as networks:
            prediction = networks.generator(x, t, condition)[0]
        assert torch.equal(prediction, load_denoiser(first.config.model)(x, t, condition)[0])
        for trainer in (first, second):
            trainer.close()
    assert all(torch.equal(two[name], value) for name, value in one.items())
    for name, value in one.items():
        assert bool(value.any()) == ("lora_A" in name) == bool(fake[f"denoiser.{name}"].any())
        assert "lora_B" in name or not torch.equal(value, fake[f"denoiser.{name}"])
