"""ZeRO-1 and ZeRO-2 from outside: every rank has all weights, as views of one flat tensor, and updates its part of it.

The optimizer's f32 weights, its states and the average are of a rank's part alone. The parts are equally long and
follow each other by rank; what lies between the parameters and after them is padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .shards import BUCKET_ELEMENTS

PART = "partition"
"""The name of a rank's part, in averages and their checkpoints."""


class FlatWeights:
    """The weights of a ZeRO-1 or ZeRO-2 engine, all trained by one group of its optimizer."""

    def __init__(self, engine: Any):
        self.module, self.optimizer = engine.module, engine.optimizer
        (self.flat,) = self.optimizer.bit16_groups_flat

    def masters(self) -> dict[str, Tensor]:
        """This rank's f32 weights, where the optimizer keeps them: on the device or the CPU."""
        (master,) = self.optimizer.single_partition_of_fp32_groups
        return {PART: master.detach()}

    def copied(self) -> dict[str, Tensor]:
        """A copy of this rank's part."""
        return {PART: self.flat.view(dist.get_world_size(), -1)[dist.get_rank()].clone()}

    def write(self, parts: dict[str, Tensor]) -> None:
        """Put the parts of all ranks into the module. Collective."""
        for start, chunk in _gathered(parts[PART], self.flat.device, self.flat.dtype):
            self.flat.view(len(chunk), -1)[:, start : start + chunk.shape[1]] = chunk

    def whole(self, parts: dict[str, Tensor] | None = None, keep: bool = True) -> dict[str, Tensor]:
        """The weights (or what `parts` make), whole, f32, on the CPU; {} where `keep` is false. Collective."""
        flat = self.flat
        if parts is not None:
            flat = torch.empty(flat.shape if keep else 0)
            for start, chunk in _gathered(parts[PART], self.flat.device, torch.float32):
                if keep:
                    flat.view(len(chunk), -1)[:, start : start + chunk.shape[1]] = chunk
        if not keep:
            return {}
        # Never a view of weights that go on changing.
        return {
            name: flat[start : start + parameter.numel()].view(parameter.shape).to("cpu", torch.float32, copy=True)
            for name, parameter, start in self._places()
        }

    def _places(self) -> Iterator[tuple[str, nn.Parameter, int]]:
        """(name, parameter, where it starts in the flat tensor), in the module's order."""
        (parameters,), (starts,) = self.optimizer.round_robin_bit16_groups, self.optimizer.round_robin_bit16_offsets
        start_of = dict(zip(parameters, starts, strict=True))
        for name, parameter in self.module.named_parameters():
            yield name, parameter, start_of[parameter]


def _gathered(part: Tensor, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(start, what all ranks' parts hold from there on (ranks, n)), some elements at a time. Collective."""
    world_size = dist.get_world_size()
    length = max(1, BUCKET_ELEMENTS // world_size)
    for start in range(0, part.numel(), length):
        mine = part[start : start + length].to(device, dtype)
        ranks = torch.empty(world_size * mine.numel(), dtype=dtype, device=device)
        dist.all_gather_into_tensor(ranks, mine)
        yield start, ranks.view(world_size, -1)
