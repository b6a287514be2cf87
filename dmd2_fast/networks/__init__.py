"""Adapters that make networks look alike to a denoiser, and the folder a denoiser is kept in.

A folder holds `denoiser.json` (network, schedule, prediction type, preconditioning) and, in `unet/`, the network as
diffusers saves it (config.json and safetensors), so that plain diffusers loads the weights as well.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..denoiser import Denoiser
from ..errors import UserError
from ..schedules import make_schedule

SETTINGS_FILE = "denoiser.json"


def build_network(settings: dict[str, Any]) -> nn.Module:
    """A network with random weights from {"kind": "unet2d", "config": {UNet2DModel arguments}, "patch_size": p}."""
    from .unet2d import UNet2D

    if settings.get("kind") != "unet2d":
        raise UserError(f"network kind {settings.get('kind')!r} is unknown; expected 'unet2d'")
    try:
        return UNet2D.from_config(settings["config"], settings["patch_size"])
    except Exception as error:  # UNet2DModel checks little: whatever its layers raise
        raise UserError(f"network: UNet2DModel refuses this configuration: {error}") from error


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
    unet = denoiser.network.unet
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    return {
        "network": {"kind": "unet2d", "config": config, "patch_size": denoiser.network.patch_size},
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
    weights_file(folder).chmod(temporary.stat().st_mode)  # safetensors makes its files private
    temporary.replace(folder / SETTINGS_FILE)


def read_settings(folder: str | os.PathLike) -> dict[str, Any]:
    """The settings of a denoiser's folder, for `build_denoiser`; `UserError` when they are missing or unreadable."""
    folder = Path(folder)
    try:
        settings = json.loads((folder / SETTINGS_FILE).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"model.path: there is no denoiser in {str(folder)!r} (no {SETTINGS_FILE}); "
            "train one with `dmd2-fast teacher --config ...`, or name a folder that has one"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {folder / SETTINGS_FILE} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"model.path: {folder / SETTINGS_FILE} holds no object {{...}}")
    return settings


def weights_file(folder: str | os.PathLike) -> Path:
    """Where a denoiser's folder has its weights."""
    return Path(folder) / "unet" / "diffusion_pytorch_model.safetensors"


def weights_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a weights file, from its header; `UserError` when it is missing, truncated or damaged."""
    import safetensors

    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"model.path: {path} cannot be read: {error}") from error


def load_denoiser(folder: str | os.PathLike) -> Denoiser:
    """The denoiser of a folder; `UserError` when it is missing, incomplete or of other shapes.

    In eval mode, in which it is distilled too: dropout would draw numbers that no key names.
    """
    import safetensors
    import safetensors.torch

    denoiser = build_without_weights(read_settings(folder))
    weights = weights_file(folder)
    try:
        state = safetensors.torch.load_file(weights)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"model.path: {weights} cannot be read: {error}") from error
    load_weights(denoiser.network.unet, state, str(weights))
    return denoiser.eval()


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


def load_weights(module: nn.Module, state: dict[str, Any], source: str) -> None:
    """Put copies of these tensors, in f32, into a module, also one on meta; `UserError` lists what does not fit."""
    check_shapes(tensor_shapes(module), {name: tuple(value.shape) for name, value in state.items()}, source)
    module.load_state_dict({name: value.to(torch.float32, copy=True) for name, value in state.items()}, assign=True)
