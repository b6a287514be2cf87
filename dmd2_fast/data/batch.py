"""Batch: what a loader hands to the training step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    x0: (N, C, H, W) f32, clean images in [-1, 1], or latents; None where the data are prompts alone.
    condition: what the networks are conditioned on, each (N, ...): for labelled images {"class_labels": (N,) int64}.
    sample_ids: (N,) int64, the position of each sample in the GLOBAL batch of the iteration. Noise is keyed by it,
        so it must not depend on how the global batch was split over ranks and accumulation steps.
    shape: (C, H, W) of a sample where there is no x0 to have it.
    extra: further tensors of the samples, each (N, ...), such as the noise that belongs to x0.
    """

    x0: Tensor | None
    condition: Mapping[str, Tensor]
    sample_ids: Tensor
    shape: tuple[int, ...] | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.sample_ids.shape[0]

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(C, H, W) of one sample."""
        if self.x0 is not None:
            return tuple(self.x0.shape[1:])
        if self.shape is None:
            raise ValueError("a batch without x0 needs the shape (C, H, W) of its samples")
        return self.shape

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """The same batch on `device`; `dtype` applies to x0 and to floating conditions, never to labels and ids."""

        def move(value: Tensor) -> Tensor:
            target = dtype if value.is_floating_point() else None
            return value.to(device=device, dtype=target, non_blocking=True)

        x0 = None if self.x0 is None else move(self.x0)
        condition = {name: move(value) for name, value in self.condition.items()}
        extra = {name: move(value) for name, value in self.extra.items()}
        return Batch(x0, condition, self.sample_ids.to(device, non_blocking=True), self.shape, extra)

    def split(self, size: int) -> list[Batch]:
        """The samples in order, as batches of `size`; the last may be smaller."""
        return [self._rows(slice(first, first + size)) for first in range(0, len(self), size)]

    def _rows(self, rows: slice) -> Batch:
        x0 = None if self.x0 is None else self.x0[rows]
        condition = {name: value[rows] for name, value in self.condition.items()}
        extra = {name: value[rows] for name, value in self.extra.items()}
        return Batch(x0, condition, self.sample_ids[rows], self.shape, extra)
