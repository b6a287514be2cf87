"""The generator as one file: `generator.safetensors`, weights with everything that sampling needs in its metadata.

generator = load_generator("runs/digits/generator.safetensors")
images = generator.sample(labels, seed=0)          # (N, C, H, W) f32 in [-1, 1]
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config_schema import LoRAConfig, ModelConfig
from .denoiser import Denoiser
from .errors import UserError
from .networks import build_without_weights, denoiser_settings, load_denoiser, load_weights
from .random import NoiseKey
from .rollout import sample
from .runs import replacing

METADATA_KEY = "dmd2_fast"
PREFIX = "network.unet."
SAMPLING_STEP = 2**32 - 1
"""NoiseKey.step of sampling: no training iteration draws the same noise."""
BATCH_SIZE = 500


@dataclass
class FewStepGenerator:
    """A distilled generator: a denoiser and the step list it was trained for."""

    denoiser: Denoiser
    steps: tuple[float, ...]

    def sample(self, class_labels: Tensor, *, seed: int = 0, batch_size: int = BATCH_SIZE) -> Tensor:
        """Images (N, C, H, W) f32, clamped to [-1, 1], for labels (N,) int64; sample i depends on (seed, i) alone."""
        device = next(self.denoiser.parameters()).device
        steps = self.denoiser.schedule.steps(self.steps, device)
        shape = self.denoiser.network.image_shape
        if len(class_labels) == 0:
            return torch.empty(0, *shape)
        ids = torch.arange(len(class_labels), device=device)
        key = NoiseKey(seed, step=SAMPLING_STEP)
        parts = [
            sample(self.denoiser, steps, {"class_labels": labels.to(device)}, part, shape, key)
            for labels, part in zip(class_labels.split(batch_size), ids.split(batch_size), strict=True)
        ]
        return torch.cat(parts).clamp(-1, 1).cpu()


def cycling_labels(num: int, num_classes: int) -> Tensor:
    """Labels 0, 1, ..., num_classes - 1, 0, ... (num,) int64: as many of each class as can be."""
    return torch.arange(num) % num_classes


def num_classes(denoiser: Denoiser) -> int:
    """Classes that a class-conditional UNet2DModel knows; the last embedding stands for none."""
    return denoiser.network.null_label


def save_generator(
    path: str | os.PathLike,
    state: dict[str, Tensor],
    denoiser: Denoiser,
    steps,
    *,
    model: ModelConfig | None = None,
    **extra: Any,
) -> None:
    """Write weights named as the denoiser's parameters, atomically. `extra` goes into the metadata.

    With adapters in `model`, `state` is the generator's: diffusers loads the file as the LoRA it is.
    """
    from safetensors.torch import save_file

    metadata = {**denoiser_settings(denoiser), "steps": list(steps), "weights": "unet", **extra}
    header = {}
    if model is not None and model.lora is not None:
        from .networks.lora import adapter_metadata, adapter_state_dict

        state, header = adapter_state_dict(state), adapter_metadata(model.lora)
        metadata |= {"weights": "lora", "model": asdict(model)}
    weights = {name.removeprefix(PREFIX): value.detach().float().contiguous() for name, value in state.items()}
    with replacing(path) as temporary:
        save_file(weights, temporary, metadata={METADATA_KEY: json.dumps(metadata), **header})


def load_generator(path: str | os.PathLike, device: torch.device | str = "cpu") -> FewStepGenerator:
    """The generator of a file by `save_generator`; `UserError` when it is missing, damaged or of other shapes."""
    import safetensors

    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = json.loads(file.metadata()[METADATA_KEY])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        steps = tuple(metadata["steps"])
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} is no generator of this library: its metadata lacks {METADATA_KEY!r} ({error})"
        ) from error
    denoiser = build_without_weights(metadata)
    try:
        if not denoiser.schedule.steps(steps).numel():
            raise ValueError("steps: none")
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: its steps {metadata['steps']!r} do not fit its schedule: {error}") from error
    if metadata.get("weights") == "lora":
        denoiser = _merged(metadata, weights, str(path))
    else:
        load_weights(denoiser.network.unet, weights, str(path))
    return FewStepGenerator(denoiser.to(device).eval().requires_grad_(False), steps)


def _merged(metadata: dict[str, Any], weights: dict[str, Tensor], source: str) -> Denoiser:
    """The base that a file's adapter was trained on, with the adapter merged into its weights."""
    from .networks.lora import merge_adapter

    try:
        model = dict(metadata["model"])
        lora = dict(model["lora"])
        lora["targets"] = tuple(lora["targets"])
        settings = ModelConfig(**{**model, "lora": LoRAConfig(**lora)})
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{source}: its metadata lack the model that its adapter belongs to ({error})") from error
    assert settings.lora is not None
    denoiser = load_denoiser(settings)
    merge_adapter(denoiser.network.unet, weights, settings.lora, source)
    return denoiser


def sample_run(run_folder: str | os.PathLike, num: int, seed: int, out: str | os.PathLike) -> Path:
    """Sample `num` images, classes in turn, from a run's generator into `out`: a PNG grid, or safetensors."""
    from .grids import save_grid, save_samples

    if num < 1:
        raise UserError(f"--num is {num}; expected at least 1")
    generator = load_generator(Path(run_folder) / "generator.safetensors")
    labels = cycling_labels(num, num_classes(generator.denoiser))
    images, out = generator.sample(labels, seed=seed), Path(out)
    if out.suffix == ".safetensors":
        save_samples(out, images, labels, seed)
    elif out.suffix == ".png":
        save_grid(out, images, num_classes(generator.denoiser))
    else:
        raise UserError(f"--out is {str(out)!r}; expected a name that ends in .png or .safetensors")
    return out
