"""The order in which training samples are read: a pure function of (seed, epoch, position).

Position p = iteration * B + (rank * A + a) * M + i counts samples since the first iteration, with M the micro-batch,
A the accumulation steps, B = M * A * world size the global batch. Sample id = p mod B, epoch = p // n for n samples,
and the sample read is permutation_epoch[p mod n]. Ranks and micro-batches only choose which part of the same global
batch they read, and a resumed run needs nothing but the iteration.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmd2_fast.random import NoiseKey, Stream, philox_uniform


def epoch_permutation(num_samples: int, seed: int, epoch: int, stream: int = Stream.DATA_ORDER) -> Tensor:
    """(num_samples,) int64: the order of one epoch, the stable argsort of one keyed uniform a sample."""
    key = NoiseKey(seed, step=epoch, stream=stream)
    uniforms = philox_uniform(torch.arange(num_samples, dtype=torch.int64), (1,), key)
    # Stable: f32 uniforms do collide (a few pairs in 10,000 samples), and ties must not depend on the sort used.
    return torch.argsort(uniforms.reshape(num_samples), stable=True)


class KeyedOrder:
    """Which samples one rank reads in which iteration."""

    def __init__(
        self,
        num_samples: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        micro_batch_size: int,
        gradient_accumulation_steps: int = 1,
        stream: int = Stream.DATA_ORDER,
    ) -> None:
        for name, value in (
            ("num_samples", num_samples),
            ("world_size", world_size),
            ("micro_batch_size", micro_batch_size),
            ("gradient_accumulation_steps", gradient_accumulation_steps),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}: expected at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}: expected 0 <= rank < world_size = {world_size}")
        self.num_samples = num_samples
        self.seed, self.stream = seed, stream
        self.rank_batch_size = micro_batch_size * gradient_accumulation_steps
        self.global_batch_size = self.rank_batch_size * world_size
        self._first = rank * self.rank_batch_size
        self._permutations: dict[int, Tensor] = {}

    def __call__(self, iteration: int) -> tuple[Tensor, Tensor]:
        """(sample_ids, indices) of this rank in `iteration`, both (A * M,) int64, micro-batch after micro-batch."""
        sample_ids = torch.arange(self._first, self._first + self.rank_batch_size, dtype=torch.int64)
        positions = sample_ids + iteration * self.global_batch_size
        epochs = positions // self.num_samples
        within = positions % self.num_samples
        indices = torch.empty_like(positions)
        first_epoch, last_epoch = int(epochs[0]), int(epochs[-1])
        for epoch in range(first_epoch, last_epoch + 1):
            chosen = epochs == epoch
            indices[chosen] = self._permutation(epoch)[within[chosen]]
        for epoch in [epoch for epoch in self._permutations if epoch < last_epoch]:
            del self._permutations[epoch]
        return sample_ids, indices

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._permutations:
            self._permutations[epoch] = epoch_permutation(self.num_samples, self.seed, epoch, self.stream)
        return self._permutations[epoch]
