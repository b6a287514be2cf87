"""Pictures of samples: a PNG grid, and samples.safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from .runs import replacing

MIN_TILE = 32
"""Smaller images are enlarged to about this many pixels, with hard edges."""


def save_grid(path: str | os.PathLike, images: Tensor, columns: int) -> None:
    """Write images (N, C, H, W) in [-1, 1], C 1 or 3, as one PNG, row by row, one pixel apart; atomically."""
    import numpy as np
    from PIL import Image

    scale = max(1, MIN_TILE // images.shape[-1])
    tiles = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    tiles = tiles.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    num, channels, height, width = tiles.shape
    rows = -(-num // columns)
    canvas = torch.full((channels, rows * (height + 1) - 1, columns * (width + 1) - 1), 255, dtype=torch.uint8)
    for i, tile in enumerate(tiles):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        canvas[:, top : top + height, left : left + width] = tile
    array = np.ascontiguousarray(
        canvas.permute(1, 2, 0).numpy().squeeze(-1) if channels == 1 else canvas.permute(1, 2, 0)
    )
    with replacing(path) as temporary:
        Image.fromarray(array).save(temporary, format="PNG")


def save_samples(
    path: str | os.PathLike,
    images: Tensor,
    labels: Tensor | None = None,
    seed: int = 0,
    prompts: Sequence[str] | None = None,
) -> None:
    """Write `images` (N, C, H, W) f32 in [-1, 1] and `seed` (1,) int64; atomically.

    With `labels` (N,) int64 as a tensor, or with `prompts` as JSON in the file's metadata.
    """
    from safetensors.torch import save_file

    tensors = {"images": images.float().contiguous(), "seed": torch.tensor([seed])}
    metadata = {"value_range": "[-1, 1]", "seed": str(seed)}
    if labels is not None:
        tensors["labels"] = labels.contiguous()
    if prompts is not None:
        metadata["prompts"] = json.dumps(list(prompts))
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
