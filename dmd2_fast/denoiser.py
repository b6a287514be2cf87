"""A network with its schedule: what the algorithm calls for a generator, a teacher or a fake score.

`prediction_type` is one of the operators' (epsilon, sample, v_prediction, flow). With `preconditioning="edm"` the
network F is wrapped as in Karras et al. 2022, eq. 7, and the prediction is x0 ("sample"):
`D(x; sigma) = c_skip x + c_out F(c_in x; ln(sigma) / 4)`.
Without it the network gets x_t and t as they are. Karras' x_t then has the size of sigma, which a UNet's norms undo: on
the digits, dividing it by sqrt(1 + sigma^2) made errors of x0 at most 2 % smaller up to sigma 1 (epsilon, v, flow),
and above mixed ones. A network of k-diffusion's kind, which divides so and counts in timesteps, is a "ddpm" one here.
The network may run in bf16; predictions leave in f32, because the difference of two of them is what trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .ops._common import PREDICTION_TYPES
from .schedules import LAST_WITH_SIGNAL, KarrasSchedule, Schedule

Condition = Mapping[str, Tensor]
"""What a network is conditioned on: tensors of N rows by name, e.g. {"class_labels": (N,) int64}."""


@dataclass(frozen=True)
class SkipLayers:
    """Rows first, ..., last - 1 of a batch pass the layers at these paths of the network by (networks/skip.py)."""

    layers: tuple[str, ...]
    first: int
    last: int


class Denoiser(nn.Module):
    """`forward(x_t (N, *), t (N,), condition, ...)` -> (prediction (rows, *) f32 or None, features).

    Args of forward: `decode_rows`, only the first rows get a prediction (None: all, 0: the decoder does not run);
    `decode_grad=False`, no graph through the decoder; `levels`, names of the features wanted; `skip`, rows that pass
    some layers by.
    """

    def __init__(self, network: nn.Module, schedule: Schedule, prediction_type: str, preconditioning: str = "none"):
        super().__init__()
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type {prediction_type!r} is unknown; expected one of {PREDICTION_TYPES}")
        if preconditioning not in ("none", "edm"):
            raise ValueError(f"preconditioning {preconditioning!r} is unknown; expected 'none' or 'edm'")
        if preconditioning == "edm" and not (isinstance(schedule, KarrasSchedule) and prediction_type == "sample"):
            raise ValueError("EDM preconditioning needs the karras schedule and prediction_type 'sample'")
        self.network = network
        self.schedule = schedule
        self.prediction_type = prediction_type
        self.preconditioning = preconditioning

    def unconditional(self, condition: Condition) -> Condition:
        """The same batch without its condition, for classifier-free guidance."""
        return self.network.unconditional(condition)

    def steps(self, values: tuple[float, ...], device: torch.device | str = "cpu") -> Tensor:
        """A generator's step list as times (K,); `ValueError` for one outside the schedule, or without an x0."""
        steps = self.schedule.steps(values, device)
        if self.prediction_type == "epsilon" and bool((self.schedule.coefficients(steps)[0] == 0).any()):
            raise ValueError(
                f"steps: alpha is 0 at {max(values)}, where epsilon says nothing of x0; expected steps up to "
                f"{LAST_WITH_SIGNAL}, say"
            )
        return steps

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Prediction (N, *) f32."""
        return self(x_t, t, condition)[0]

    def encode(self, x_t: Tensor, t: Tensor, condition: Condition, levels=("mid",)) -> tuple[Tensor, ...]:
        """Features alone; the decoder does not run."""
        return self(x_t, t, condition, decode_rows=0, levels=levels)[1]

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        decode_rows: int | None = None,
        decode_grad: bool = True,
        levels: tuple[str, ...] = (),
        skip: SkipLayers | None = None,
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        options: dict[str, Any] = {"decode_rows": decode_rows, "decode_grad": decode_grad, "levels": levels}
        if skip is not None:
            options["skip"] = skip
        if self.preconditioning == "none":
            output, features = self.network(x_t, t, condition, **options)
            return (None if output is None else output.float()), features
        sigma_data = self.schedule.sigma_data
        assert sigma_data is not None  # EDM preconditioning comes with the Karras schedule
        sigma = t.float().reshape(-1, *[1] * (x_t.ndim - 1))
        norm = (sigma**2 + sigma_data**2).sqrt()
        output, features = self.network(x_t.float() / norm, t.float().log() / 4, condition, **options)
        if output is None:
            return None, features
        rows = len(output)
        sigma, norm = sigma[:rows], norm[:rows]
        c_skip, c_out = (sigma_data / norm) ** 2, sigma * sigma_data / norm
        kept = x_t[:rows] if decode_grad else x_t[:rows].detach()
        return c_skip * kept.float() + c_out * output.float(), features


def concat_conditions(*conditions: Condition) -> Condition:
    """Join the conditions of batches that go through a network together."""
    return {name: torch.cat([condition[name] for condition in conditions]) for name in conditions[0]}
