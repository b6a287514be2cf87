"""Schedules against the formulas of the papers, worked out here in float64."""

import math

import numpy as np
import pytest
import torch

from dmd2_fast.schedules import DDPMSchedule, KarrasSchedule, RectifiedFlowSchedule, make_schedule


def test_a_range_narrower_than_the_table_stays_in_it():
    """One entry, never the one before it (index -1 would be the noisiest)."""
    u = torch.tensor([1e-9, 0.5, 1.0])
    for t_range, expected in (((0.0, 0.0004), 0), ((0.1, 0.1004), 100), ((0.9999, 1.0), 999)):
        assert make_schedule("ddpm").time(u, t_range).tolist() == [expected] * 3
    assert make_schedule("karras").time(u, (0.0, 0.0004)).tolist() == pytest.approx([0.002] * 3)


def test_settings_that_are_no_positive_numbers_are_refused():
    for value in ("x", 0, -1.0, True, None, float("nan"), 1e9):
        with pytest.raises(ValueError, match="sigma_data"):
            make_schedule("karras", sigma_data=value)


def test_ddpm_is_stable_diffusions_scaled_linear_schedule():
    betas = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
    abar = np.cumprod(1 - betas)
    t = torch.tensor([0, 1, 249, 499, 749, 999])
    alpha, sigma = DDPMSchedule().coefficients(t)
    np.testing.assert_allclose(alpha.numpy(), np.sqrt(abar[t]), rtol=1e-6)
    np.testing.assert_allclose(sigma.numpy(), np.sqrt(1 - abar[t]), rtol=1e-6)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(6))


def test_ddpm_agrees_with_diffusers():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    t = torch.arange(1000)
    alpha, _ = DDPMSchedule().coefficients(t)
    torch.testing.assert_close(alpha**2, scheduler.alphas_cumprod, rtol=1e-5, atol=0)


def test_karras_levels_and_coefficients():
    schedule = KarrasSchedule()
    u = torch.arange(1, 1001) / 1000 - 0.0005
    levels = schedule.time(u)
    expected = [(0.002 ** (1 / 7) + i / 999 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7 for i in range(1000)]
    np.testing.assert_allclose(levels.numpy(), expected, rtol=1e-5)
    alpha, sigma = schedule.coefficients(levels)
    assert torch.equal(alpha, torch.ones(1000)) and torch.equal(sigma, levels)


def test_karras_loss_weight_is_edms_lambda_over_c_out():
    sigma, data = torch.tensor([0.01, 0.5, 3.0]), 0.75
    weight = KarrasSchedule(sigma_data=data).loss_weight(sigma, "sample")
    torch.testing.assert_close(weight, (sigma**2 + data**2) / (sigma * data) ** 2)


@pytest.mark.parametrize("kind", ["ddpm", "karras", "rectified_flow"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "flow", "sample"])
def test_all_other_losses_have_weight_one(kind, prediction_type):
    weight = make_schedule(kind).loss_weight(torch.tensor([0.1, 0.7]), prediction_type)
    assert (weight.tolist() == [1.0, 1.0]) == ((kind, prediction_type) != ("karras", "sample"))


@pytest.mark.parametrize("kind", ["ddpm", "karras", "rectified_flow"])
def test_times_are_uniform_over_the_given_range(kind):
    """Entries 20..979 of 1000 for (.02, .98), every one as likely; both ends are reached and none beyond."""
    schedule = make_schedule(kind)
    u = (torch.arange(96000) + 0.5) / 96000
    t = schedule.time(u, (0.02, 0.98))
    if kind == "rectified_flow":
        torch.testing.assert_close(t, 0.02 + u * 0.96)
        return
    table = schedule.time((torch.arange(1000) + 0.5) / 1000)
    values, counts = t.unique(return_counts=True)
    assert torch.equal(values, table[20:980].unique())
    assert int(counts.min()) >= 99 and int(counts.max()) <= 101


@pytest.mark.parametrize("kind", ["ddpm", "karras"])
def test_extreme_uniforms_stay_in_the_table(kind):
    schedule = make_schedule(kind)
    t = schedule.time(torch.tensor([2.0**-33, 1.0]))
    table = schedule.time((torch.arange(1000) + 0.5) / 1000)
    assert t[0] == table[0] and t[1] == table[-1]


def test_flow_is_a_straight_line():
    alpha, sigma = RectifiedFlowSchedule().coefficients(torch.tensor([0.25, 1.0]))
    assert alpha.tolist() == [0.75, 0.0] and sigma.tolist() == [0.25, 1.0]


@pytest.mark.parametrize(
    ("kind", "steps"),
    [("ddpm", (1000,)), ("ddpm", (999, 0.5)), ("karras", (81.0,)), ("karras", (0.0,)), ("rectified_flow", (1.5,))],
)
def test_steps_outside_the_schedule_are_refused(kind, steps):
    with pytest.raises(ValueError, match=str(steps[-1])):
        make_schedule(kind).steps(steps)


def test_initial_noise_levels():
    assert KarrasSchedule().init_sigma(torch.tensor([5.0])).item() == 5.0
    assert DDPMSchedule().init_sigma(torch.tensor([999])).item() == 1.0
    assert RectifiedFlowSchedule().init_sigma(torch.tensor([1.0])).item() == 1.0


def test_unknown_schedule_or_field():
    with pytest.raises(ValueError, match="cosine"):
        make_schedule("cosine")
    with pytest.raises(ValueError, match="sigma_dat"):
        make_schedule("karras", sigma_dat=1)
