"""Combinations of schedule, prediction and time sampling that make no sense: a part of the table in config.py."""

from __future__ import annotations

from collections.abc import Callable

from dmd2_fast.config_schema import Config, TeacherTrainingConfig
from dmd2_fast.config_variants import UNREAD_SAMPLING, Combination, has_unread

USUAL_PREDICTIONS = {"karras": "sample", "ddpm": "epsilon", "rectified_flow": "flow"}


def predicted(training: TeacherTrainingConfig) -> str:
    """The prediction type of a teacher to train: the configured one, or the schedule's usual."""
    return training.prediction_type or USUAL_PREDICTIONS[training.schedule]


def reads_sigma_data(training: TeacherTrainingConfig) -> bool:
    """Whether a teacher to train predicts x0 of Karras' schedule, as EDM does: its loss weight has sigma_data."""
    return training.schedule == "karras" and predicted(training) == "sample"


def _training(clashes: Callable[[TeacherTrainingConfig], bool]) -> Callable[[Config], bool]:
    return lambda c: c.teacher.training is not None and clashes(c.teacher.training)


_divides_by_alpha = _training(lambda t: t.schedule == "rectified_flow" and predicted(t) == "epsilon")
"""Whether x0 = (x_t - sigma p) / alpha, on a schedule whose alpha ends at 0."""

TIMES: tuple[Combination, ...] = (
    Combination(
        ("teacher.training.schedule", "teacher.training.prediction_type", "teacher.training.preconditioning"),
        _training(lambda t: t.preconditioning == "edm" and not reads_sigma_data(t)),
        "EDM's preconditioning makes an x0 (sample) of Karras' sigmas and nothing else: leave preconditioning out, or "
        "take that schedule and prediction_type",
    ),
    Combination(
        ("teacher.training.sigma_data", "teacher.training.schedule", "teacher.training.prediction_type"),
        _training(lambda t: t.sigma_data is not None and not reads_sigma_data(t)),
        "sigma_data is read by EDM's preconditioning and loss weight, for prediction_type sample of the karras "
        "schedule: leave it out",
    ),
    Combination(
        ("generator.steps", "teacher.training.schedule", "teacher.training.prediction_type"),
        lambda c: _divides_by_alpha(c) and 1.0 in c.generator.steps,
        "at the flow's time 1 alpha is 0, and epsilon, which is x_t itself there, says nothing of x0: start at .98, "
        "say, or let the network predict flow",
    ),
    Combination(
        ("distribution_matching.t_range", "teacher.training.schedule", "teacher.training.prediction_type"),
        lambda c: _divides_by_alpha(c) and c.distribution_matching.t_range[1] == 1,
        "at the flow's time 1 alpha is 0, and the DMD gradient, a difference in x0, divides epsilon by it: end the "
        "range at .98, say, or let the network predict flow",
    ),
    Combination(
        ("teacher.training.time_sampling",),
        _training(lambda t: t.time_sampling is not None and has_unread(t.time_sampling)),
        UNREAD_SAMPLING,
    ),
)
"""Refused beside what config.py and config_variants.py list. Allowed on purpose: Karras' x0 without preconditioning."""
