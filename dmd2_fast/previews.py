"""What the sample grids of a run show: classes in turn, with scores, or fixed prompts, decoded by the VAE.

Every rank samples the same conditions (a sharded generator's forward is collective); rank 0 makes the picture of them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .config import Config
from .data.dataset import Dataset
from .denoiser import Condition, Denoiser
from .evaluation import has_test_split, load_reference
from .export import cycling_labels, num_classes
from .grids import save_grid
from .pipeline import LatentCodec
from .ranks import Rank, from_main, on_main
from .sampling import decode_latents, encode_prompts

QUICK_SAMPLES = 500
GRID_ROWS = 8
GRID_COLUMNS = 4
"""Of grids of prompts, and how many training samples stand in for prompts that were not given."""


class ClassPreviews:
    """Classes in turn; where there is held-out data, the samples are compared with it."""

    def __init__(self, config: Config, denoiser: Denoiser, rank: Rank):
        self.classes, self.reference, num_scored = num_classes(denoiser), None, 0
        if config.run.sample_interval and has_test_split(config):
            num_scored, self.reference = QUICK_SAMPLES, on_main(rank, lambda: load_reference(config))
        self.labels = cycling_labels(max(num_scored, GRID_ROWS * self.classes), self.classes)
        self.condition: Condition = {"class_labels": self.labels}

    def keep(self, samples: Tensor, path: Path) -> dict[str, float]:
        """Write the grid; the scores, if there is anything to compare with. Rank 0."""
        save_grid(path, samples[: GRID_ROWS * self.classes], self.classes)
        if self.reference is None or not bool(torch.isfinite(samples).all()):
            return {}
        return self.reference.evaluate(samples, self.labels)


class PromptPreviews:
    """`run.sample_prompts`, or the conditions of the first training samples, as one picture each.

    The text encoders are there only while this is made, on rank 0; the VAE stays there, on the CPU between grids.
    """

    def __init__(self, config: Config, denoiser: Denoiser, rank: Rank, dataset: Dataset):
        self.device = rank.device
        self.codec: LatentCodec | None = None
        self.condition: Condition = from_main(rank, lambda: self._make(config, denoiser, dataset))

    def _make(self, config: Config, denoiser: Denoiser, dataset: Dataset) -> Condition:
        model, prompts = config.model, config.run.sample_prompts
        self.codec = codec = LatentCodec.load(model.path)
        if prompts:
            height, width = (codec.factor * side for side in denoiser.network.image_shape[1:])
            return encode_prompts(model.path, model.kind, prompts, (height, width), self.device)
        rows = torch.arange(min(GRID_COLUMNS, dataset.num_samples))
        raw = torch.stack([torch.from_numpy(dataset.decode(int(row)).copy()) for row in rows])
        return dict(dataset.batch(raw, rows, rows).condition)

    def keep(self, samples: Tensor, path: Path) -> dict[str, float]:
        """Decode and write the grid; no scores. Rank 0."""
        assert self.codec is not None
        self.codec.vae.to(self.device)
        images = decode_latents(self.codec, samples, self.device)
        self.codec.vae.to("cpu")
        save_grid(path, images, min(GRID_COLUMNS, len(images)))
        return {}


def make_previews(
    config: Config, denoiser: Denoiser, rank: Rank, dataset: Dataset
) -> ClassPreviews | PromptPreviews | None:
    """The previews of a run, on every rank; None where it makes no grids. Collective."""
    if not config.run.sample_interval:
        return None
    if config.model.kind == "unet2d":
        return ClassPreviews(config, denoiser, rank)
    return PromptPreviews(config, denoiser, rank, dataset)
