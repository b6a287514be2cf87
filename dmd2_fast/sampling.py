"""`dmd2-fast sample`: pictures from a run or an exported folder, for classes in turn or for prompts.

A generator of text is surrounded by its pipeline: the prompts go through the text encoders, its latents through the
VAE. One after another is loaded, used and let go, so that a GPU holds one of them at a time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .denoiser import Condition
from .errors import UserError
from .export import DTYPES, GENERATOR_FILE, FewStepGenerator, cycling_labels, load_generator, num_classes, read_metadata
from .pipeline import LatentCodec, TextEncoders, time_ids

PROMPT_BATCH_SIZE = 16


def encode_prompts(
    pipeline: str | os.PathLike, kind: str, prompts: Sequence[str], size: tuple[int, int], device: torch.device | str
) -> Condition:
    """The condition of `prompts`, f32 on the CPU, from a pipeline's text encoders, which are gone afterwards.

    size: (height, width) in pixels of what is sampled, uncropped, for SDXL's size condition.
    """
    encoders = TextEncoders.load(pipeline, kind, device)
    parts = [
        {name: value.float().cpu() for name, value in encoders.encode(prompts[i : i + PROMPT_BATCH_SIZE]).items()}
        for i in range(0, len(prompts), PROMPT_BATCH_SIZE)
    ]
    condition = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if kind == "sdxl":
        condition["time_ids"] = time_ids(size, (0, 0), size, len(prompts))
    return condition


def decode_latents(codec: LatentCodec, latents: Tensor, device: torch.device | str) -> Tensor:
    """Images (N, 3, H, W) f32 in [-1, 1], on the CPU, of latents (N, C, h, w): one after another, for memory's sake."""
    images = [codec.decode(row.to(device)).clamp(-1, 1).cpu() for row in latents.split(1)]
    return torch.cat(images)


def read_prompts(prompts: Sequence[str], file: str | os.PathLike | None) -> list[str]:
    """These prompts and then those of a text file, one a line; `UserError` when it is unreadable."""
    lines: list[str] = []
    if file is not None:
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"--prompts: {file} cannot be read as text: {error}") from error
        lines = [line.strip() for line in lines if line.strip()]
        if not lines:
            raise UserError(f"--prompts: {file} holds no prompts: expected one a line")
    return [*prompts, *lines]


def sample_run(
    folder: str | os.PathLike,
    num: int | None,
    seed: int,
    out: str | os.PathLike,
    *,
    prompts: Sequence[str] = (),
    prompts_file: str | None = None,
    pipeline: str | None = None,
    dtype: str | None = None,
) -> Path:
    """Sample `num` images from a run's or an exported generator into `out`: a PNG grid, or safetensors.

    Classes in turn (default: 64 images), or `prompts` and those of a file in turn (default: one image each), which a
    generator of text needs.
    pipeline: whose text encoders and VAE (default: the exported pipeline, or the teacher's). dtype: of the weights
    (default: bf16 for text on a GPU, else f32). Raises `UserError`.
    """
    from .grids import save_grid, save_samples

    folder, out, prompts = Path(folder), Path(out), read_prompts(prompts, prompts_file)
    if num is not None and num < 1:
        raise UserError(f"--num is {num}; expected at least 1")
    if out.suffix not in (".png", ".safetensors"):
        raise UserError(f"--out is {str(out)!r}; expected a name that ends in .png or .safetensors")
    source = folder / GENERATOR_FILE if (folder / GENERATOR_FILE).is_file() else folder
    metadata = read_metadata(source)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if metadata.get("network", {}).get("kind") == "unet2d":
        if prompts:
            raise UserError(f"{folder} has a generator of classes, which takes no prompt")
        generator = load_generator(source, device, DTYPES[dtype or "float32"])
        columns = num_classes(generator.denoiser)
        labels = cycling_labels(64 if num is None else num, columns)
        images, told = generator.sample(labels, seed=seed), {"labels": labels}
    else:
        if not prompts:
            raise UserError(f"{folder} has a generator of text: give it --prompt TEXT, or --prompts FILE")
        texts = [prompts[i % len(prompts)] for i in range(len(prompts) if num is None else num)]
        images = _sample_texts(source, metadata, texts, seed, pipeline, device, dtype)
        columns = len(prompts) if 1 < len(prompts) <= 8 else math.ceil(math.sqrt(len(texts)))
        told = {"prompts": texts}
    if out.suffix == ".safetensors":
        save_samples(out, images, seed=seed, **told)
    else:
        save_grid(out, images, min(columns, len(images)))
    return out


def _sample_texts(
    source: Path,
    metadata: dict[str, Any],
    texts: Sequence[str],
    seed: int,
    pipeline: str | None,
    device: torch.device,
    dtype: str | None,
) -> Tensor:
    model = metadata.get("model")
    if not isinstance(model, dict) or not {"kind", "path"} <= model.keys():
        raise UserError(f"{source}: its metadata do not name the pipeline it was distilled from")
    if pipeline is None:
        pipeline = str(source) if (source / "model_index.json").is_file() else model["path"]
    codec = LatentCodec.load(pipeline)
    network = metadata["network"]
    side = codec.factor * network.get("sample_size", network["config"]["sample_size"])
    unique = list(dict.fromkeys(texts))
    encoded = encode_prompts(pipeline, model["kind"], unique, (side, side), device)
    rows = torch.tensor([unique.index(text) for text in texts])
    condition = {name: value[rows] for name, value in encoded.items()}
    weights = DTYPES[dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    generator: FewStepGenerator | None = load_generator(source, device, weights)
    assert generator is not None
    latents = generator.sample(condition, seed=seed)
    generator = None  # the VAE has the memory to itself
    codec.vae.to(device)
    return decode_latents(codec, latents, device)
