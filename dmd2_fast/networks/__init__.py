"""Adapters that make networks look alike to a denoiser, and the folder a denoiser is kept in.

A folder holds `denoiser.json` (network, schedule, prediction type, preconditioning) and, in `unet/`, the network as
diffusers saves it (config.json and safetensors), so that plain diffusers loads the weights as well.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..config_schema import ModelConfig
from ..denoiser import Denoiser
from ..errors import UserError
from ..schedules import make_schedule
from .source import SETTINGS_FILE, WEIGHTS, open_source, public_settings

if TYPE_CHECKING:
    from .unet import UNet


def _adapter(kind: Any) -> type[UNet]:
    from .text_unet import TextUNet
    from .unet2d import UNet2D

    adapters: dict[Any, type[UNet]] = {adapter.kind: adapter for adapter in (UNet2D, TextUNet)}
    if kind not in adapters:
        raise UserError(f"network kind {kind!r} is unknown; expected one of {', '.join(adapters)}")
    return adapters[kind]


def build_network(settings: dict[str, Any]) -> UNet:
    """A network with random weights from {"kind", "config": {arguments of the UNet}, "patch_size", "sample_size"}.

    Kinds: "unet2d" (UNet2DModel), "unet2d_condition" (UNet2DConditionModel). `sample_size` null: the UNet's own.
    """
    adapter = _adapter(settings.get("kind"))
    try:
        return adapter.from_config(settings["config"], settings.get("patch_size", 1), settings.get("sample_size"))
    except Exception as error:  # diffusers' UNets check little: whatever their layers raise
        name = "UNet2DModel" if adapter.kind == "unet2d" else "UNet2DConditionModel"
        raise UserError(f"network: {name} refuses this configuration: {error}") from error


def build_denoiser(settings: dict[str, Any]) -> Denoiser:
    """A denoiser with random weights from what `denoiser_settings` gave."""
    try:
        schedule = dict(settings["schedule"])
        return Denoiser(
            build_network(settings["network"]),
            make_schedule(schedule.pop("kind"), **schedule),
            settings["prediction_type"],
            settings["preconditioning"],
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"denoiser settings: {error!s}; expected the contents of a {SETTINGS_FILE}") from error


def denoiser_settings(denoiser: Denoiser) -> dict[str, Any]:
    """Everything but the weights, as JSON types."""
    network = denoiser.network
    config = public_settings(network.unet.config)
    settings = {"kind": network.kind, "config": config, "patch_size": network.patch_size}
    if network.sample_size != network.unet.config.sample_size:
        settings["sample_size"] = network.sample_size
    return {
        "network": settings,
        "schedule": denoiser.schedule.to_dict(),
        "prediction_type": denoiser.prediction_type,
        "preconditioning": denoiser.preconditioning,
    }


def save_denoiser(denoiser: Denoiser, folder: str | os.PathLike) -> None:
    """Write the folder; `denoiser.json` comes last, so a folder that has it is whole."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    denoiser.network.unet.save_pretrained(folder / "unet")
    temporary = folder / (SETTINGS_FILE + ".tmp")
    temporary.write_text(json.dumps(denoiser_settings(denoiser), indent=2) + "\n")
    (folder / "unet" / f"{WEIGHTS}.safetensors").chmod(temporary.stat().st_mode)  # safetensors makes its files private
    temporary.replace(folder / SETTINGS_FILE)


def load_denoiser(model: ModelConfig | str | os.PathLike) -> Denoiser:
    """The denoiser of a config's model, or of a folder; `UserError` when it is missing, incomplete or of other shapes.

    In eval mode, in which it is distilled too: dropout would draw numbers that no key names.
    """
    model = model if isinstance(model, ModelConfig) else ModelConfig(path=str(model))
    source = open_source(model)
    denoiser = build_without_weights(source.settings)
    check_shapes(tensor_shapes(denoiser.network.unet), source.shapes(), str(source.folder / "unet"))
    load_weights(denoiser.network.unet, dict(source.tensors()), str(source.folder / "unet"))
    prepare_network(denoiser.network, model)
    return denoiser.eval()


def prepare_network(network: UNet, model: ModelConfig) -> None:
    """What a config asks of a network beyond its weights."""
    if model.activation_checkpointing:
        network.unet.enable_gradient_checkpointing()  # not reentrant, in diffusers
    if model.fused_operators:
        from .swap import swap_operators

        swap_operators(network.unet)
    network.channels_last = model.channels_last
    if model.compile:
        network.compile_blocks()


def describe_network(network: UNet) -> str:
    """What computes a network, for a line of the log: how many places each fused operator has, and the switches."""
    from .swap import swapped_operators

    parts = [f"{number} x {operator}" for operator, number in swapped_operators(network.unet).items()]
    parts += ["channels_last"] * network.channels_last + ["torch.compile"] * network.is_compiled
    return ", ".join(parts) or "diffusers' own operators"


def build_without_weights(settings: dict[str, Any]) -> Denoiser:
    """`build_denoiser` on the meta device: a file's settings take no memory before its tensors are seen to fit them."""
    with torch.device("meta"):
        return build_denoiser(settings)


def tensor_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def check_shapes(own: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], source: str) -> None:
    """`UserError` listing what does not fit between a network's tensors and those of a file."""
    wrong = [f"{name} is missing" for name in own if name not in found]
    wrong += [f"{name} is not part of this network" for name in found if name not in own]
    wrong += [
        f"{name} is {found[name]}, expected {own[name]}" for name in own if name in found and found[name] != own[name]
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{source} does not fit the network: {'; '.join(wrong[:3])}{more}")


def load_weights(module: nn.Module, state: dict[str, Any], source: str, dtype: torch.dtype = torch.float32) -> None:
    """Put copies of these tensors into a module, also one on meta; `UserError` lists what does not fit."""
    check_shapes(tensor_shapes(module), {name: tuple(value.shape) for name, value in state.items()}, source)
    module.load_state_dict({name: value.to(dtype, copy=True) for name, value in state.items()}, assign=True)
