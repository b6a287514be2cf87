"""Configurations of schedules, predictions, preconditioning and time sampling: what goes together and what does not."""

from pathlib import Path

import pytest

from dmd2_fast.config import load_config
from dmd2_fast.config_times import predicted
from dmd2_fast.errors import ConfigError

DIGITS = Path(__file__).parents[1] / "ds_digits.json"
DDPM = ("teacher.training.schedule=ddpm", "generator.steps=[999, 499]")
FLOW = ("teacher.training.schedule=rectified_flow", "generator.steps=[0.9, 0.5]")
FLOW_EPSILON = (*FLOW, "teacher.training.prediction_type=epsilon")
EPSILON = "teacher.training.prediction_type=epsilon"
EDM = "teacher.training.preconditioning=edm"

TIME_CLASHES = {
    (*DDPM, EDM): "EDM's preconditioning makes an x0",
    (*DDPM, EDM, "teacher.training.prediction_type=sample"): "EDM's preconditioning makes an x0",
    (EDM, EPSILON): "EDM's preconditioning makes an x0",
    (*DDPM, "teacher.training.sigma_data=0.5"): "sigma_data is read by",
    (EPSILON, "teacher.training.sigma_data=0.5"): "sigma_data is read by",
    (*FLOW_EPSILON, "generator.steps=[1.0, 0.5]"): "at the flow's time 1 alpha is 0, and epsilon",
    (
        *FLOW_EPSILON,
        "distribution_matching.t_range=[0.1, 1.0]",
    ): "at the flow's time 1 alpha is 0, and the DMD gradient",
    ('teacher.training.time_sampling={"shift": 2}',): "leave out what the kind does not read",
}


@pytest.mark.parametrize("overrides", TIME_CLASHES)
def test_settings_that_do_not_go_together_are_refused_with_the_reason(overrides):
    with pytest.raises(ConfigError) as error:
        load_config(DIGITS, overrides)
    assert TIME_CLASHES[overrides] in str(error.value)
    named = str(error.value).split(":")[1]
    assert overrides[-1].split("=")[0].rsplit(".time_sampling", 1)[0] in named


@pytest.mark.parametrize(
    "overrides",
    [
        (EDM,),
        ("teacher.training.preconditioning=none", "teacher.training.sigma_data=0.5"),
        *(
            (*schedule, f"teacher.training.prediction_type={prediction_type}")
            for schedule in ((), DDPM, FLOW)
            for prediction_type in ("epsilon", "sample", "v_prediction", "flow")
        ),
        (*FLOW, "generator.steps=[1.0, 0.5]", "distribution_matching.t_range=[0.0, 1.0]"),
        ('teacher.training.time_sampling={"kind": "log_normal", "mean": 0.5, "std": 1}',),
        ('teacher.training.time_sampling={"kind": "shifted", "shift": 2}',),
        ('teacher.training.time_sampling={"kind": "uniform"}',),
    ],
)
def test_settings_that_go_together_are_not_refused(overrides):
    load_config(DIGITS, overrides)


def test_a_teacher_predicts_what_is_usual_for_its_schedule():
    assert [
        predicted(load_config(DIGITS, overrides).teacher.training) for overrides in ((), DDPM, FLOW, FLOW_EPSILON)
    ] == ["sample", "epsilon", "flow", "epsilon"]
