"""The generator as one file: `generator.safetensors`, weights with everything that sampling needs in its metadata.

generator = load_generator("runs/digits/generator.safetensors")
images = generator.sample(labels, seed=0)          # (N, C, H, W) f32 in [-1, 1]

The same from a folder by `dmd2-fast export`, which keeps that metadata in generator.json. A generator of text takes
conditions instead of labels and gives latents: sampling.py has what lies around it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config_schema import LoRAConfig, ModelConfig
from .denoiser import Condition, Denoiser
from .errors import UserError
from .networks import build_without_weights, denoiser_settings, load_denoiser, load_weights
from .networks.source import Source, read_object
from .random import NoiseKey
from .rollout import sample
from .runs import METADATA_FILE, replacing

GENERATOR_FILE = "generator.safetensors"
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
"""In an exported folder: a generator's adapter, under diffusers' name for it."""
METADATA_KEY = "dmd2_fast"
PREFIX = "network.unet."
SAMPLING_STEP = 2**32 - 1
"""NoiseKey.step of sampling: no training iteration draws the same noise."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""of weights, by the names of the command line"""
BATCH_SIZE = 500
TEXT_BATCH_SIZE = 4
"""Of generators of text, whose latents and activations are large."""


@dataclass
class FewStepGenerator:
    """A distilled generator: a denoiser and the step list it was trained for."""

    denoiser: Denoiser
    steps: tuple[float, ...]
    metadata: dict[str, Any] = field(default_factory=dict)
    """What the file says beside the weights: "model" (kind and path of the teacher), "iteration", "seed" and others."""

    @property
    def takes_text(self) -> bool:
        """Whether it takes text embeddings and gives latents, rather than labels and images."""
        return takes_text(self.denoiser)

    def sample(self, condition: Tensor | Condition, *, seed: int = 0, batch_size: int | None = None) -> Tensor:
        """Samples (N, C, H, W) f32, on the CPU, for labels (N,) int64 or a condition of N rows.

        Images are clamped to [-1, 1]; latents are as they come. Sample i depends on (seed, i) and its condition alone.
        """
        if isinstance(condition, Tensor):
            condition = {"class_labels": condition}
        if batch_size is None:
            batch_size = TEXT_BATCH_SIZE if self.takes_text else BATCH_SIZE
        device = next(self.denoiser.parameters()).device
        steps = self.denoiser.schedule.steps(self.steps, device)
        shape = self.denoiser.network.image_shape
        num = len(next(iter(condition.values())))
        if num == 0:
            return torch.empty(0, *shape)
        ids = torch.arange(num, device=device)
        key, parts = NoiseKey(seed, step=SAMPLING_STEP), []
        for rows in ids.split(batch_size):
            first, last = int(rows[0]), int(rows[-1]) + 1
            part = {name: value[first:last].to(device) for name, value in condition.items()}
            parts.append(sample(self.denoiser, steps, part, rows, shape, key).cpu())
        samples = torch.cat(parts)
        return samples if self.takes_text else samples.clamp(-1, 1)


def takes_text(denoiser: Denoiser) -> bool:
    """Whether a denoiser is conditioned on text embeddings, and its samples are latents."""
    return "prompt_embeds" in denoiser.network.condition_shapes


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
    steps: Sequence[float],
    *,
    model: ModelConfig | None = None,
    **extra: Any,
) -> None:
    """Write weights named as the denoiser's parameters, atomically. `model` and `extra` go into the metadata.

    With adapters in `model`, `state` is the generator's: diffusers loads the file as the LoRA it is.
    """
    from safetensors.torch import save_file

    metadata = {**denoiser_settings(denoiser), "steps": list(steps), "weights": "unet", **extra}
    header = {}
    if model is not None:
        metadata["model"] = asdict(model)
    if model is not None and model.lora is not None:
        from .networks.lora import adapter_metadata, adapter_state_dict

        state, header = adapter_state_dict(state), adapter_metadata(model.lora)
        metadata["weights"] = "lora"
    weights = {name.removeprefix(PREFIX): value.detach().float().contiguous() for name, value in state.items()}
    with replacing(path) as temporary:
        save_file(weights, temporary, metadata={METADATA_KEY: json.dumps(metadata), **header})


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a generator's file, or of an exported folder; `UserError` when there are none."""
    import safetensors

    if path.is_dir():
        if not (path / METADATA_FILE).is_file():
            raise UserError(f"{path} holds no generator: expected the folder of a finished run, or of an export")
        return read_object(path / METADATA_FILE)
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = json.loads(file.metadata()[METADATA_KEY])
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} is no generator of this library: its metadata lacks {METADATA_KEY!r} ({error})"
        ) from error
    if not isinstance(metadata, dict):
        raise UserError(f"{path} is no generator of this library: its metadata are no object")
    return metadata


def save_fake_score(path: str | os.PathLike, state: dict[str, Tensor]) -> None:
    """Write the UNet's weights of a `FakeScore`'s state, without the GAN head, atomically."""
    from safetensors.torch import save_file

    start = "denoiser." + PREFIX
    weights = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
    with replacing(path) as temporary:
        save_file({name: value.float().contiguous() for name, value in weights.items()}, temporary)


def load_generator(
    path: str | os.PathLike, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> FewStepGenerator:
    """The generator of a file by `save_generator` or of an exported folder, its weights in `dtype`.

    Raises `UserError` when it is missing, damaged or of other shapes.
    """
    path = Path(path)
    metadata = read_metadata(path)
    try:
        steps = tuple(metadata["steps"])
    except (TypeError, KeyError) as error:
        raise UserError(f"{path} is no generator of this library: its metadata have no steps ({error})") from error
    denoiser = build_without_weights(metadata)
    try:
        if not denoiser.schedule.steps(steps).numel():
            raise ValueError("steps: none")
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: its steps {metadata['steps']!r} do not fit its schedule: {error}") from error
    if metadata.get("weights") == "lora":
        denoiser = _merged(path, metadata)
    else:
        tensors = dict(Source(metadata, path, weights=None if path.is_dir() else path).tensors())
        load_weights(denoiser.network.unet, tensors, str(path), dtype)
    return FewStepGenerator(denoiser.to(device, dtype).eval().requires_grad_(False), steps, metadata)


def _merged(path: Path, metadata: dict[str, Any]) -> Denoiser:
    """The base that a generator's adapter was trained on, with the adapter merged into its weights, f32."""
    from .networks.lora import merge_adapter

    file = path / ADAPTER_FILE if path.is_dir() else path
    try:
        model = dict(metadata["model"])
        lora = dict(model["lora"])
        lora["targets"] = tuple(lora["targets"])
        settings = ModelConfig(**{**model, "lora": LoRAConfig(**lora)})
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: its metadata lack the model that its adapter belongs to ({error})") from error
    assert settings.lora is not None
    denoiser = load_denoiser(settings)
    merge_adapter(denoiser.network.unet, dict(Source(metadata, path, weights=file).tensors()), settings.lora, str(file))
    return denoiser
