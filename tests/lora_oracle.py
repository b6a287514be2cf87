"""Low-rank adapters in plain PyTorch: every targeted layer of a copy of the network adds (alpha / rank) B A x."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from data_oracle import make_folder, random_pixels
from plain_loop import NUM_IMAGES, Trace, plain_run
from tiny import NETWORK
from torch import nn

from dmd2_fast.config import Config
from dmd2_fast.denoiser import Denoiser
from dmd2_fast.networks import load_denoiser, save_denoiser
from dmd2_fast.networks.lora import ADAPTERS, SharedBase
from dmd2_fast.networks.unet2d import UNet2D
from dmd2_fast.schedules import make_schedule

LORA = {"rank": 2, "alpha": 4, "targets": ["to_q", "to_k", "to_v", "to_out.0", "conv1", "time_emb_proj"]}


class PlainLoRA(nn.Module):
    """A copy of the teacher of its own, whose parameters are the adapter's: `weights` by their names in a run."""

    def __init__(self, denoiser: Denoiser, weights: dict[str, torch.Tensor], scale: float):
        super().__init__()
        self.__dict__["denoiser"] = denoiser.requires_grad_(False)
        self.schedule, self.prediction_type = denoiser.schedule, denoiser.prediction_type
        for name, value in weights.items():
            self.register_parameter(name, nn.Parameter(value.clone()))
        for name in weights:
            path, _, part = name.removesuffix("-weight").rpartition("-")
            if part == "lora_A":
                layer = denoiser.network.unet.get_submodule(path.replace("-", "."))
                layer.register_forward_hook(self._add(path, scale))

    def _add(self, path: str, scale: float):
        def hook(layer, inputs, output):
            a, b = (self.get_parameter(f"{path}-{part}-weight") for part in ("lora_A", "lora_B"))
            if isinstance(layer, nn.Linear):
                return output + scale * ((inputs[0] @ a.T) @ b.T)
            return output + scale * F.conv2d(F.conv2d(inputs[0], a, stride=layer.stride, padding=layer.padding), b)

        return hook

    def forward(self, *arguments, **options):
        return self.denoiser(*arguments, **options)


def prepare_with_attention(folder: Path) -> None:
    """`plain_loop.prepare` with a teacher that has attention, and so layers that adapters are for."""
    make_folder(folder / "data", random_pixels(NUM_IMAGES), samples_per_shard=20)
    torch.manual_seed(3)
    network = UNet2D.from_config({**NETWORK, "add_attention": True, "attention_head_dim": 8}, patch_size=2)
    save_denoiser(Denoiser(network, make_schedule("karras"), "sample", "edm").eval(), folder / "teacher")


def start_apart(monkeypatch=None) -> None:
    """From here on adapters start with B drawn, not zero: generator, fake score and teacher differ from the start."""
    inject = SharedBase.inject

    def inject_and_draw(self, copy=None):
        inject(self, copy)
        generator = torch.Generator().manual_seed(11)
        for adapter in ADAPTERS:
            for name, parameter in self.parameters(adapter).items():
                if "lora_B" in name:
                    parameter.data.normal_(0, 0.1, generator=generator)

    if monkeypatch is None:
        SharedBase.inject = inject_and_draw
    else:
        monkeypatch.setattr(SharedBase, "inject", inject_and_draw)


def plain_lora_run(config: Config, iterations: int, start: dict[str, dict[str, torch.Tensor]], parts: int = 1) -> Trace:
    """`plain_run` with adapters that start as a run's did."""
    assert config.model.lora is not None
    trained = []
    for network, prefix in (("generator", ""), ("fake_score", "denoiser.")):
        weights = {name.removeprefix(prefix): v for name, v in start[network].items() if "lora_" in name}
        scale = config.model.lora.alpha / config.model.lora.rank
        trained.append(PlainLoRA(load_denoiser(config.model), weights, scale))
    return plain_run(config, iterations, trained=trained, parts=parts)
