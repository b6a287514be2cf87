"""Optimizers and learning rates. Rates are functions of the iteration, so resuming needs no scheduler state."""

from __future__ import annotations

import math
from typing import Any

import torch

from .config import LRSchedulerConfig, OptimizerConfig


def make_optimizer(parameters: Any, config: OptimizerConfig, on_cpu: bool | None = None) -> torch.optim.Optimizer:
    """AdamW, decoupled weight decay, in one kernel for all parameters: apex's, DeepSpeed's or torch's fused one.

    On the CPU (`on_cpu`; None: where the parameters are) torch's, which needs no compiler. On CUDA apex's where it is
    installed, else DeepSpeed's where it was built when DeepSpeed was installed (it would be compiled here otherwise),
    else torch's. All compute the same.
    """
    parameters = list(parameters)
    if on_cpu is None or not on_cpu:
        on_cpu = not all(map(_is_cuda, parameters))
    options = {
        "lr": config.lr,
        "betas": tuple(config.betas),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    fused = None if on_cpu else _apex_adam() or _deepspeed_adam()
    if fused is not None:
        return fused(parameters, adam_w_mode=True, **options)
    return torch.optim.AdamW(parameters, fused=True, **options)


def _is_cuda(parameter: torch.nn.Parameter) -> bool:
    return parameter.device.type == "cuda"


def _apex_adam() -> Any:
    """apex's FusedAdam, or None where apex or its compiled part is missing."""
    try:
        import amp_C  # noqa: F401
        from apex.optimizers import FusedAdam
    except ImportError:
        return None
    return FusedAdam


def _deepspeed_adam() -> Any:
    """DeepSpeed's FusedAdam, or None where it would have to be compiled now."""
    try:
        from deepspeed.git_version_info import installed_ops
        from deepspeed.ops.adam import FusedAdam
    except ImportError:
        return None
    return FusedAdam if installed_ops.get("fused_adam") else None


def optimizer_name(optimizer: Any) -> str:
    """Where an optimizer comes from, as the start-up line says it: "AdamW by torch"."""
    return f"AdamW by {type(optimizer).__module__.partition('.')[0]}"


@torch.no_grad()
def clipped_step(optimizer: torch.optim.Optimizer, gradient_clipping: float) -> torch.Tensor:
    """One step of torch's fused AdamW on gradients of norm at most `gradient_clipping` (0: as they are), which are
    then dropped; the norm () before. A norm that is not finite leaves weights and moments as they are.

    The optimizer's own kernel divides the gradients, as it does for a gradient scaler: they are not gone through twice,
    and nothing is read on the host.
    """
    if not isinstance(optimizer, torch.optim.AdamW) or not optimizer.defaults["fused"]:
        raise TypeError(f"clipped_step: expected torch's AdamW with fused=True, got {type(optimizer).__module__}'s")
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
    optimizer.grad_scale = (norm / gradient_clipping).clamp(min=1) if gradient_clipping else None
    optimizer.found_inf = (~norm.isfinite()).float()
    optimizer.step()
    optimizer.zero_grad()
    return norm


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
