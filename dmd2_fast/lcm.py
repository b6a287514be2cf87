"""A generator's steps as a configuration of diffusers' LCMScheduler, which samples as rollout.py does.

LCMScheduler counts its steps down from the last timestep it knows: with N timesteps, O original steps and K wanted
ones it takes entries floor(i O / K) of O k - 1, (O - 1) k - 1, ..., k - 1, where k = floor(N / O). N and O are settings
of its configuration, so steps of that form can be written into it; other ones have to be passed to each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import UserError
from .schedules import NUM_TIMESTEPS, DDPMSchedule

TIMESTEP_SCALING = 1e6
"""LCMScheduler returns c_out x0 + c_skip x_t, c_skip = 1 / (1 + (2 scaling t)^2): x0 itself, to f32, for any t > 0."""


def lcm_timesteps(num_timesteps: int, original_steps: int, num_steps: int) -> tuple[int, ...]:
    """The timesteps that LCMScheduler takes by itself."""
    spacing, share = num_timesteps // original_steps, original_steps / num_steps  # floats, as numpy.linspace has it
    return tuple((original_steps - int(i * share)) * spacing - 1 for i in range(num_steps))


def find_setting(steps: Sequence[int]) -> tuple[int, int] | None:
    """(num_train_timesteps, original_inference_steps) with which LCMScheduler takes these steps; None: there is none.

    All 1,000 timesteps where that works, else the ones up to the first step: it must start at its last one then.
    """
    for num_timesteps in (NUM_TIMESTEPS, int(steps[0]) + 1):
        for original_steps in range(len(steps), num_timesteps + 1):
            if lcm_timesteps(num_timesteps, original_steps, len(steps)) == tuple(steps):
                return num_timesteps, original_steps
    return None


def scheduler_config(
    schedule: DDPMSchedule, prediction_type: str, steps: Sequence[float]
) -> tuple[dict[str, Any], bool]:
    """(LCMScheduler's keyword arguments, whether `num_inference_steps=len(steps)` alone gives the steps).

    Raises UserError for a step 0, at which LCMScheduler returns its input.
    """
    whole = [int(step) for step in steps]
    if whole[-1] == 0:
        raise UserError(
            "generator.steps end at timestep 0, where diffusers' LCMScheduler returns its input: export none"
        )
    setting = find_setting(whole)
    num_timesteps, original_steps = setting or (NUM_TIMESTEPS, NUM_TIMESTEPS)
    config: dict[str, Any] = {
        "num_train_timesteps": num_timesteps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": "scaled_linear",
        "original_inference_steps": original_steps,
        "prediction_type": prediction_type,
        "timestep_scaling": TIMESTEP_SCALING,
        "steps_offset": 1,  # not read; diffusers' pipelines warn of another
    }
    if num_timesteps != NUM_TIMESTEPS:  # the first of the thousand betas
        import torch

        roots = torch.linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, NUM_TIMESTEPS, dtype=torch.float64)
        config["trained_betas"] = (roots**2)[:num_timesteps].tolist()
    return config, setting is not None
