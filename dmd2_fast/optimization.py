"""Optimizers and learning rates. Rates are functions of the iteration, so resuming needs no scheduler state."""

from __future__ import annotations

import math
from typing import Any

import torch

from .config import LRSchedulerConfig, OptimizerConfig


def make_optimizer(parameters: Any, config: OptimizerConfig) -> torch.optim.Optimizer:
    """torch's fused AdamW: one kernel for all parameters, on CPU and GPU."""
    return torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=tuple(config.betas),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def warmup_cosine(iteration: int, iterations: int, warmup: int, final_ratio: float) -> float:
    """Share of the peak learning rate: linear from 1/warmup to 1, then half a cosine down to `final_ratio`."""
    if iteration < warmup:
        return (iteration + 1) / warmup
    progress = (iteration - warmup) / max(1, iterations - warmup)
    return final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def learning_rate(peak: float, schedule: LRSchedulerConfig, iteration: int, iterations: int) -> float:
    """The rate at an iteration. Schedules count iterations, also for the generator, which steps at every R-th."""
    final_ratio = schedule.final_ratio if schedule.type == "cosine" else 1.0
    return peak * warmup_cosine(iteration, iterations, schedule.warmup_iterations, final_ratio)


def set_learning_rate(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
