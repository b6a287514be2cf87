"""Schedules against the formulas of the papers, worked out here in float64."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from dmd2_fast.config import TimeSamplingConfig
from dmd2_fast.random import NoiseKey, Stream, philox_uniform
from dmd2_fast.schedules import (
    SCHEDULES,
    DDPMSchedule,
    KarrasSchedule,
    RectifiedFlowSchedule,
    TimeSampling,
    make_schedule,
)

ABAR = np.cumprod(1 - np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2)
TIMESTEP_RATIOS = np.log(np.sqrt((1 - ABAR) / ABAR))
"""ln(sigma / alpha) of the DDPM timesteps."""
LEVELS = (0.002 ** (1 / 7) + np.arange(1000) / 999 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7


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


@pytest.mark.parametrize("kind", SCHEDULES)
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


# ---------------------------------------------------------------------------------------------------- time sampling


def log_ratio(kind, t):
    """ln(sigma / alpha) at times t, float64, from the schedules' definitions."""
    if kind == "ddpm":
        return TIMESTEP_RATIOS[t]
    t = t.double().numpy()
    return np.log(t) if kind == "karras" else np.log(t / (1 - t))


def ends(kind, t_range):
    """ln(sigma / alpha) at the ends of a range: first and last entry of the table, or the flow's times themselves."""
    first, last = round(t_range[0] * 1000), round(t_range[1] * 1000) - 1
    if kind == "ddpm":
        return TIMESTEP_RATIOS[first], TIMESTEP_RATIOS[last]
    if kind == "karras":
        return math.log(LEVELS[first]), math.log(LEVELS[last])
    return tuple(-math.inf if t == 0 else math.inf if t == 1 else math.log(t / (1 - t)) for t in t_range)


def uniforms(num=100_000):
    return philox_uniform(torch.arange(num), (1,), NoiseKey(3, step=1).fork(Stream.DENOISING_TIME))[:, 0]


SAMPLINGS = [TimeSampling(), TimeSampling("log_normal"), TimeSampling("log_normal", 0.5, 2.0), TimeSampling("shifted")]
RANGES = [(0.0, 1.0), (0.02, 0.98), (0.3, 0.55)]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_log_ratios_and_the_times_that_have_them(kind):
    schedule = make_schedule(kind)
    t = schedule.time((torch.arange(1000) + 0.5) / 1000)
    ratios = schedule.log_ratio(t)
    assert ratios.dtype == torch.float64
    np.testing.assert_allclose(ratios.numpy(), log_ratio(kind, t), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(schedule.time_at(ratios), t, rtol=1e-6, atol=0)


def test_ddpm_takes_the_nearest_timestep_in_log_ratio():
    wanted = torch.linspace(-6, 5, 3001, dtype=torch.float64)
    nearest = np.abs(wanted.numpy()[:, None] - TIMESTEP_RATIOS).argmin(1)
    assert DDPMSchedule().time_at(wanted).tolist() == nearest.tolist()
    assert (nearest[0], nearest[-1]) == (0, 999), "ratios beyond the timesteps are among them"


def test_time_sampling_has_the_configurations_fields_and_defaults():
    assert vars(TimeSampling()) == vars(TimeSamplingConfig())


@pytest.mark.parametrize("t_range", RANGES)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_uniform_sampling_is_the_schedules_own(kind, t_range):
    u = uniforms(1000)
    assert torch.equal(TimeSampling().draw(make_schedule(kind), u, t_range), make_schedule(kind).time(u, t_range))


@pytest.mark.parametrize("t_range", RANGES)
@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (1.0, 0.5)])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_log_normal_sampling_is_the_truncated_normal(kind, mean, std, t_range):
    """Kolmogorov-Smirnov on 1e5 keyed draws; DDPM's timesteps at the midpoints between them, where its law jumps."""
    t = TimeSampling("log_normal", mean, std).draw(make_schedule(kind), uniforms(), t_range)
    low, high = ends(kind, t_range)
    law = stats.truncnorm((low - mean) / std, (high - mean) / std, mean, std)
    if kind != "ddpm":
        assert stats.kstest(log_ratio(kind, t), law.cdf).pvalue > 0.01
        return
    first, last = round(t_range[0] * 1000), round(t_range[1] * 1000) - 1
    assert first <= int(t.min()) and int(t.max()) <= last
    counts = t.bincount(minlength=1000).numpy()[first : last + 1]
    midpoints = (TIMESTEP_RATIOS[first:last] + TIMESTEP_RATIOS[first + 1 : last + 1]) / 2
    distance = np.abs(counts.cumsum()[:-1] / len(t) - law.cdf(midpoints)).max()
    assert stats.kstwo.sf(distance, len(t)) > 0.01


@pytest.mark.parametrize(("low", "high"), [(-60, -50), (-7, -6.5), (-1, 2), (6.5, 7), (9, 40), (30, math.inf)])
def test_the_normals_tails_keep_their_digits(low, high):
    """Karras' sigmas, whose logarithms lie `low` to `high` deviations from the mean, against scipy in logarithms."""
    mean, std, u = 0.5, 0.05, torch.tensor([0.001, 0.25, 0.5, 0.999])
    schedule = KarrasSchedule(sigma_min=math.exp(mean + std * low), sigma_max=math.exp(min(mean + std * high, 10)))
    if low == -60:
        with pytest.raises(ValueError, match=r"N\(0.5, 0.05\^2\) has no probability .* \[0.0, 1.0\]"):
            TimeSampling("log_normal", mean, std).draw(schedule, u)
        return
    bounds = ((math.log(value) - mean) / std for value in (schedule.sigma_min, schedule.sigma_max))
    normal = (TimeSampling("log_normal", mean, std).draw(schedule, u).double().log() - mean) / std
    np.testing.assert_allclose(normal.numpy(), stats.truncnorm(*bounds).ppf(u.double().numpy()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [3.0, 0.5])
@pytest.mark.parametrize("t_range", [(0.0, 1.0), (0.2, 0.7)])
def test_shifted_flow_times_are_stable_diffusion_3s(t_range, shift):
    """t' = s t / (1 + (s - 1) t) of uniform t (Esser et al. 2024, eq. 23)."""
    u = uniforms(1000).double()
    t = t_range[0] + u * (t_range[1] - t_range[0])
    drawn = TimeSampling("shifted", shift=shift).draw(RectifiedFlowSchedule(), u, t_range)
    torch.testing.assert_close(drawn.double(), shift * t / (1 + (shift - 1) * t), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shift", [3.0, 0.5])
def test_shifted_sampling_multiplies_sigma_over_alpha(shift):
    u = uniforms(1000)
    levels = make_schedule("karras").time(u, (0.1, 0.9)).double()
    drawn = TimeSampling("shifted", shift=shift).draw(make_schedule("karras"), u, (0.1, 0.9))
    torch.testing.assert_close(drawn.double(), (levels * shift).clamp(0.002, 80), rtol=1e-6, atol=0)
    timesteps = make_schedule("ddpm").time(u, (0.1, 0.9))
    wanted = TIMESTEP_RATIOS[timesteps] + math.log(shift)
    nearest = np.abs(wanted[:, None] - TIMESTEP_RATIOS).argmin(1)
    assert TimeSampling("shifted", shift=shift).draw(make_schedule("ddpm"), u, (0.1, 0.9)).tolist() == nearest.tolist()


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_drawn_times_rise_with_u_are_finite_at_its_ends_and_do_not_know_the_batch(kind, sampling):
    schedule = make_schedule(kind)
    u = torch.cat([torch.tensor([2.0**-33]), uniforms(2000).sort().values, torch.tensor([1.0])])
    for t_range in RANGES:
        t = sampling.draw(schedule, u, t_range)
        assert t.dtype == (torch.int64 if kind == "ddpm" else torch.float32) and t.shape == u.shape
        assert bool((t.diff() >= 0).all()) and bool(torch.isfinite(t.float()).all())
        alpha, sigma = schedule.coefficients(t)
        assert bool((sigma > 0).all())
        may_end_in_noise = kind == "rectified_flow" and t_range[1] == 1 and sampling.kind != "log_normal"
        assert may_end_in_noise or bool((alpha > 0).all())
        assert torch.equal(t, torch.cat([sampling.draw(schedule, part, t_range) for part in u.split(300)]))
        if sampling.kind == "log_normal" and t_range != (0.0, 1.0):
            np.testing.assert_allclose(log_ratio(kind, t[[0, -1]]), ends(kind, t_range), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_what_depends_on_the_settings_alone_is_worked_out_on_the_host(kind, sampling):
    """Times on the meta device, which has no values: anything read from them there would wait for a GPU."""
    u = torch.empty(8, device="meta")
    assert sampling.draw(make_schedule(kind), u, (0.02, 0.98)).device.type == "meta"


def test_an_epsilon_teachers_flow_starts_where_there_is_an_x0():
    flow = RectifiedFlowSchedule()
    expected = torch.tensor([0.98, 0.735, 0.49, 0.245])
    torch.testing.assert_close(flow.sampling_times(4, "epsilon"), expected)
    for prediction_type in ("flow", "v_prediction", "sample"):
        assert flow.sampling_times(4, prediction_type).tolist() == [1.0, 0.75, 0.5, 0.25]
