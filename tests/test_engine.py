"""How engines are set up: gradients of bf16 networks are summed in f32, and NVMe folders are their own."""

from __future__ import annotations

import json

import pytest
import torch
from exact_r1 import engine_gradients, plain_gradients
from one_rank import group_of_one
from plain_loop import relative
from tiny import tiny_config, tiny_denoiser
from torch import nn

from dmd2_fast.config import load_config
from dmd2_fast.engine import engine_settings, make_engine
from dmd2_fast.shards import WholeNetwork


def settings(folder, **keys):
    path = folder / "c.json"
    path.write_text(json.dumps({**tiny_config(folder), **keys}))
    return load_config(path)


def test_a_whole_copy_is_compiled_as_the_network_is(monkeypatch):
    denoiser, options = tiny_denoiser(), []
    compiled = nn.Module.compile

    def record(self, *args, **kwargs):
        options.append(kwargs)
        compiled(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "compile", record)
    assert not WholeNetwork(denoiser).module.network.is_compiled
    denoiser.network.compile_blocks()
    own, options[:] = list(options), []
    assert WholeNetwork(denoiser).module.network.is_compiled
    assert options == own and all(option["dynamic"] is False for option in options)


@pytest.mark.parametrize("stage", [2, 3])
def test_micro_batches_of_a_bf16_network_are_summed_in_f32(tmp_path, stage):
    """Gradients of 256 and of 1, both exact in bf16, of which bf16 would keep no more than 256."""
    from deepspeed.utils import safe_get_full_grad

    accumulated = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "bf16": {"enabled": True}}
    with group_of_one():
        config = settings(tmp_path, **accumulated, zero_optimization={"stage": stage})
        layer = nn.Linear(4, 1, bias=False)
        engine = make_engine(config, layer, config.generator)
        for size in (256.0, 1.0):
            engine.backward(engine(torch.full((1, 4), size, dtype=torch.bfloat16)).sum())
            if size == 1.0:
                gradient = safe_get_full_grad(layer.weight)
            engine.step()
    assert torch.equal(gradient, torch.full((1, 4), 257 / 2))
    assert torch.tensor(256.0).bfloat16() + torch.tensor(1.0).bfloat16() == 256


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("steps", [1, 2])
def test_exact_r1_through_the_network(tmp_path, stage, steps):
    """The gradients of plain PyTorch's double backward, in a first update and in one after it."""
    with group_of_one() as rank:
        zero = {"stage": stage, "reduce_bucket_size": 100_000}
        config = settings(tmp_path, gradient_accumulation_steps=steps, zero_optimization=zero)
        found = engine_gradients(config, rank.rank, rank.world_size)
    expected = plain_gradients()
    assert relative(plain_gradients(penalty=False), expected) > 0.1
    assert [relative(got, expected) < 1e-6 for got in found] == [True, True]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_network_needs_no_engine(tmp_path, stage, dtype):
    config = settings(tmp_path, zero_optimization={"stage": stage})
    layer = nn.BatchNorm1d(3).to(dtype).requires_grad_(False)
    assert make_engine(config, layer, None).module is layer and layer.weight.dtype == dtype


@pytest.mark.parametrize("enabled", [True, False])
def test_f32_sums_are_the_default_in_bf16(tmp_path, enabled):
    config = settings(tmp_path, bf16={"enabled": enabled})
    found = engine_settings(config, config.generator)
    expected = ({"grad_accum_dtype": "fp32"}, "fp32") if enabled else (None, None)
    assert (found.get("data_types"), found.get("communication_data_type")) == expected
    config = settings(tmp_path, bf16={"enabled": True}, communication_data_type="bf16")
    assert engine_settings(config, config.fake_score)["communication_data_type"] == "bf16"


def test_each_engine_swaps_into_a_folder_of_its_own(tmp_path):
    """DeepSpeed empties the folder when an engine starts."""
    nvme, cpu = {"device": "nvme", "nvme_path": str(tmp_path / "swap")}, {"device": "cpu"}
    config = settings(tmp_path, zero_optimization={"stage": 3, "offload_param": nvme, "offload_optimizer": cpu})
    found = [
        engine_settings(config, network)["zero_optimization"] for network in (config.generator, config.fake_score, None)
    ]
    paths = [keys["offload_param"]["nvme_path"] for keys in found]
    assert paths == [str(tmp_path / "swap" / name) for name in ("generator", "fake_score", "teacher")]
    assert [keys.get("offload_optimizer") for keys in found] == [cpu, cpu, None]
    assert config.deepspeed["zero_optimization"]["offload_param"] == nvme
