"""The regression on a teacher's noise-image pairs (n, y): a distance of G(n), at the generator's first step, from y.

During `regression.warmup_iterations` the generator learns from it alone, as the paper does before one-step SDXL;
afterwards it can stand beside the DMD gradient with a weight, as in DMD (Yin et al. 2024, "One-step Diffusion with
Distribution Matching Distillation", section 3.2). Pairs come in an order of their own, keyed like the data's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import Config
from .data.batch import Batch
from .data.latents import LatentDataset
from .data.order import KeyedOrder
from .distillation import Measure
from .pipeline import LatentCodec
from .preflight import check_lpips
from .random import Stream
from .ranks import Rank


class PairReader:
    """This rank's pairs of an iteration, `micro_batch_size` for each accumulation step."""

    def __init__(self, config: Config, rank: Rank):
        assert config.regression.path is not None  # which the configuration's check has seen to
        self.dataset = LatentDataset(config.regression.path, "train", progress=rank.is_main)
        self.micro_batch_size, self.device = config.micro_batch_size, rank.device
        self.order = KeyedOrder(
            self.dataset.num_samples, seed=config.run.seed, rank=rank.rank, world_size=rank.world_size,
            micro_batch_size=config.micro_batch_size, stream=Stream.PAIR_ORDER,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
        )  # fmt: skip

    def __call__(self, iteration: int) -> list[Batch]:
        """x0: the teacher's samples; extra["noise"]: their noise, of unit variance. DataError when unreadable."""
        sample_ids, indices = self.order(iteration)
        raw = torch.stack([torch.from_numpy(self.dataset.decode(index).copy()) for index in indices.tolist()])
        return self.dataset.batch(raw.to(self.device), indices, sample_ids).split(self.micro_batch_size)

    def close(self) -> None:
        self.dataset.close()


def make_measure(config: Config, device: torch.device | str) -> Measure:
    """`regression.loss`: mean squared error of samples or latents, or LPIPS of images, which latents are decoded to.

    Raises `UserError` where LPIPS is not installed, or where there is no VAE to decode with.
    """
    if config.regression.loss == "mse":
        return F.mse_loss
    check_lpips(config)
    import lpips

    distance = lpips.LPIPS(net="vgg", verbose=False).to(device).eval().requires_grad_(False)
    codec = None if config.model.kind == "unet2d" else LatentCodec.load(config.model.path, device)

    def measure(samples: Tensor, targets: Tensor) -> Tensor:
        images = []
        for values in (samples, targets):
            decoded = values if codec is None else codec.decode_with_gradient(values)
            images.append(decoded.expand(-1, 3, -1, -1) if decoded.shape[1] == 1 else decoded)
        return distance(*images).mean()

    return measure
