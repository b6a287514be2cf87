"""Parts of a batch, noised, on their way into a network together."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .data.batch import Batch
from .denoiser import Condition, concat_conditions
from .ops.noise import add_noise
from .random import NoiseKey, philox_uniform
from .schedules import Schedule, TimeSampling

Draws = tuple[tuple[float, float], TimeSampling]
"""Range of noise levels, as fractions of the schedule, and how times are drawn from it."""


@dataclass
class Noised:
    """Rows of one kind. Shapes: x_t (N, *), all others (N,)."""

    x_t: Tensor
    t: Tensor
    alpha: Tensor
    sigma: Tensor
    condition: Condition
    u: Tensor
    """the uniform numbers that drew the times"""

    def __len__(self) -> int:
        return len(self.x_t)

    def detached(self, condition: Condition | None = None) -> Noised:
        """The same rows without a graph, with this condition where one is given."""
        return replace(self, x_t=self.x_t.detach(), condition=condition or self.condition)

    def twice(self, x_t: Tensor) -> Noised:
        """Rows x_t (2N, *), both halves at these times and conditions."""
        doubled = {name: torch.cat([value, value]) for name, value in self.condition.items()}
        t, alpha, sigma, u = (torch.cat([value, value]) for value in (self.t, self.alpha, self.sigma, self.u))
        return Noised(x_t, t, alpha, sigma, doubled, u)


def noised(schedule: Schedule, x: Tensor, batch: Batch, key: NoiseKey, time_stream: int, draws: Draws) -> Noised:
    """x at a random time each; times from `time_stream`, the noise from the stream after it."""
    t_range, sampling = draws
    u = philox_uniform(batch.sample_ids, (1,), key.fork(time_stream))[:, 0]
    t = sampling.draw(schedule, u, t_range)
    alpha, sigma = schedule.coefficients(t)
    x_t = add_noise(x, alpha, sigma, key=key.fork(time_stream + 1), sample_ids=batch.sample_ids)
    return Noised(x_t, t, alpha, sigma, batch.condition, u)


def joined(parts: list[Noised]) -> tuple[Tensor | None, Tensor | None, Condition]:
    """(x_t, t, condition) of all rows, one part after another; of none, nothing."""
    if not parts:
        return None, None, {}
    if len(parts) == 1:
        return parts[0].x_t, parts[0].t, parts[0].condition
    return (
        torch.cat([part.x_t for part in parts]),
        torch.cat([part.t for part in parts]),
        concat_conditions(*[part.condition for part in parts]),
    )
