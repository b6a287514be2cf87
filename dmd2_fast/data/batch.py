"""Batch: what a loader hands to the training step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    x0: (N, C, H, W) f32, clean images in [-1, 1], or latents.
    condition: what the networks are conditioned on, each (N, ...): for labelled images {"class_labels": (N,) int64}.
    sample_ids: (N,) int64, the position of each sample in the GLOBAL batch of the iteration. Noise is keyed by it,
        so it must not depend on how the global batch was split over ranks and accumulation steps.
    """

    x0: Tensor
    condition: Mapping[str, Tensor]
    sample_ids: Tensor

    def __len__(self) -> int:
        return self.x0.shape[0]

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """The same batch on `device`; `dtype` applies to x0 and to floating conditions, never to labels and ids."""

        def move(value: Tensor) -> Tensor:
            target = dtype if value.is_floating_point() else None
            return value.to(device=device, dtype=target, non_blocking=True)

        condition = {name: move(value) for name, value in self.condition.items()}
        return Batch(x0=move(self.x0), condition=condition, sample_ids=self.sample_ids.to(device, non_blocking=True))
