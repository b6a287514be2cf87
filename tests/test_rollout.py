"""Few-step sampling and backward simulation against chains written out by hand."""

import pytest
import torch
from tiny import SHAPE, random_batch, tiny_denoiser

from dmd2_fast.random import NoiseKey, philox_normal, philox_uniform
from dmd2_fast.rollout import (
    Guidance,
    denoiser_of,
    generator_input,
    guided,
    initial_noise,
    rollout_index,
    sample,
    sample_ode,
)
from dmd2_fast.schedules import DDPMSchedule, KarrasSchedule, RectifiedFlowSchedule

KEY = NoiseKey(7, step=3)
KARRAS, DDPM = (5.0, 2.0, 0.8, 0.3), (999.0, 749.0, 499.0, 249.0)
CASES = {
    "karras": ("karras", "sample", KARRAS),
    "ddpm": ("ddpm", "epsilon", DDPM),
    "flow": ("rectified_flow", "flow", (1.0, 0.75, 0.5, 0.25)),
}


def noise(ids, stream):
    return philox_normal(ids, SHAPE, KEY.fork(stream), torch.float32)


def chain_by_hand(denoiser, kind, steps, batch):
    """Inputs of every step and the sample, from the paper's two alternating updates, streams from DESIGN's table."""
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    x = noise(batch.sample_ids, 12) * (steps[0] if kind == "karras" else 1.0)
    inputs = []
    for i, t in enumerate(steps):
        inputs.append(x)
        time = torch.full((len(x),), int(t) if kind == "ddpm" else t)
        with torch.no_grad():
            p = denoiser.predict(x, time, batch.condition)
        if kind == "karras":
            x0 = p
        elif kind == "ddpm":
            x0 = (x - (1 - abar[int(t)]).sqrt().float() * p) / abar[int(t)].sqrt().float()
        else:
            x0 = x - t * p
        if i + 1 == len(steps):
            return inputs, x0
        n = noise(batch.sample_ids, 16 + i)
        following = steps[i + 1]
        if kind == "karras":
            x = x0 + following * n
        elif kind == "ddpm":
            x = abar[int(following)].sqrt().float() * x0 + (1 - abar[int(following)]).sqrt().float() * n
        else:
            x = (1 - following) * x0 + following * n
    raise AssertionError


@pytest.mark.parametrize("case", CASES)
def test_sampler_is_the_alternation_of_the_paper(case):
    kind, prediction_type, steps = CASES[case]
    denoiser, batch = tiny_denoiser(0, kind, prediction_type), random_batch()
    _, expected = chain_by_hand(denoiser, kind, steps, batch)
    times = denoiser.schedule.steps(steps)
    got = sample(denoiser, times, batch.condition, batch.sample_ids, SHAPE, KEY)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["batch", "sample"])
@pytest.mark.parametrize("case", CASES)
def test_backward_simulations_inputs_are_the_samplers(case, mode):
    """The trained input x_k and its time are what the sampler feeds its k-th step, for every step there is."""
    kind, prediction_type, steps = CASES[case]
    denoiser, batch = tiny_denoiser(0, kind, prediction_type), random_batch(32)
    times, seen = denoiser.schedule.steps(steps), set()
    for iteration in range(8):
        key = KEY.at(iteration)
        inputs = []
        original = denoiser.forward
        denoiser.forward = lambda x, t, c, **kw: (inputs.append(x.clone()), original(x, t, c, **kw))[1]  # noqa: B023
        sample(denoiser, times, batch.condition, batch.sample_ids, SHAPE, key)
        denoiser.forward = original
        x, t = generator_input(denoiser, times, batch.condition, batch.sample_ids, SHAPE, key, mode=mode)
        index = rollout_index(4, mode, batch.sample_ids, key)
        assert torch.equal(t, times[index])
        for i in range(32):
            assert torch.equal(x[i], inputs[index[i]][i])
        if mode == "batch":
            assert len(set(index.tolist())) == 1
        else:
            assert len(set(index.tolist())) == 4, "every step is in every batch"
        seen |= set(index.tolist())
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize(("mode", "expected"), [("batch", None), ("sample", 3)])
def test_number_of_forwards(mode, expected):
    denoiser, batch = tiny_denoiser(), random_batch()
    for iteration in range(4):
        calls = []
        handle = denoiser.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        key = KEY.at(iteration)
        times = denoiser.schedule.steps(KARRAS)
        generator_input(denoiser, times, batch.condition, batch.sample_ids, SHAPE, key, mode=mode)
        handle.remove()
        assert len(calls) == (int(rollout_index(4, mode, batch.sample_ids, key)[0]) if expected is None else expected)


def test_index_per_batch_does_not_depend_on_the_rank():
    """Ranks hold different sample ids, and an index of their own would hang a sharded generator."""
    for iteration in range(20):
        key = KEY.at(iteration)
        a = rollout_index(4, "batch", torch.arange(0, 8), key)
        b = rollout_index(4, "batch", torch.arange(8, 16), key)
        assert torch.equal(a, b)
    u = philox_uniform(torch.arange(1000), (1,), KEY.fork(11))[:, 0]
    counts = rollout_index(4, "sample", torch.arange(1000), KEY).bincount(minlength=4)
    assert counts.tolist() == torch.histc(u, 4, 0, 1).long().tolist()


def test_one_step_input_is_pure_noise_at_the_conditioning_time():
    batch = random_batch(4)
    denoiser = tiny_denoiser(0, "ddpm", "epsilon")
    x, t = generator_input(denoiser, torch.tensor([399]), batch.condition, batch.sample_ids, SHAPE, KEY)
    assert torch.equal(x, noise(batch.sample_ids, 12)) and t.tolist() == [399] * 4
    karras = initial_noise(KarrasSchedule(), torch.tensor([2.5]), batch.sample_ids, SHAPE, KEY)
    torch.testing.assert_close(karras, 2.5 * noise(batch.sample_ids, 12))


def test_samples_do_not_depend_on_the_split():
    denoiser, batch = tiny_denoiser(), random_batch(6)
    times = denoiser.schedule.steps(KARRAS)
    whole = sample(denoiser, times, batch.condition, batch.sample_ids, SHAPE, KEY)
    part = sample(
        denoiser, times, {"class_labels": batch.condition["class_labels"][4:]}, batch.sample_ids[4:], SHAPE, KEY
    )
    torch.testing.assert_close(part, whole[4:])


def test_guidance_is_one_batched_forward():
    denoiser, batch = tiny_denoiser(), random_batch()
    t, calls = torch.full((4,), 0.7), []
    handle = denoiser.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        got = guided(denoiser, Guidance(3.0))(batch.x0, t, batch.condition)
        handle.remove()
        cond = denoiser.predict(batch.x0, t, batch.condition)
        uncond = denoiser.predict(batch.x0, t, {"class_labels": torch.full((4,), 10)})
    assert len(calls) == 1
    torch.testing.assert_close(got, uncond + 3.0 * (cond - uncond))


def test_sampling_times():
    karras = KarrasSchedule().sampling_times(18)
    expected = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    torch.testing.assert_close(karras, torch.tensor(expected), rtol=1e-5, atol=1e-7)
    assert KarrasSchedule().sampling_times(1).tolist() == [80.0]
    assert RectifiedFlowSchedule().sampling_times(4).tolist() == [1.0, 0.75, 0.5, 0.25]
    ddpm = DDPMSchedule().sampling_times(18)
    assert (ddpm[0], ddpm[-1]) == (999, 0) and ddpm.diff().lt(0).all()
    alpha, sigma = DDPMSchedule().coefficients(ddpm)
    ratio = (sigma / alpha).double() ** (1 / 7)
    assert ratio.diff().std() < 0.15 * -ratio.diff().mean(), (
        "evenly spaced in (sigma / alpha)^(1/7), as timesteps allow"
    )


class Continuous(DDPMSchedule):
    """Variance preserving at any time in [0, 1], to see convergence that whole timesteps would hide."""

    def coefficients(self, t):
        angle = t.double() * torch.pi / 2 * 0.999
        return angle.cos(), angle.sin()

    def sampling_times(self, num_steps):
        return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)[:-1]


@pytest.mark.parametrize("heun", [False, True])
@pytest.mark.parametrize("schedule", [KarrasSchedule(), RectifiedFlowSchedule(), Continuous()])
def test_ode_solvers_converge_to_the_exact_flow_of_a_gaussian(schedule, heun):
    """Data N(0, s^2): E[x0 | x_t] = x_t alpha s^2 / v, v = alpha^2 s^2 + sigma^2, and the flow keeps x_t / sqrt(v)."""
    s, calls, errors = 0.5, [], []

    def denoise(x_t, t, condition):
        calls.append(1)
        alpha, sigma = (value.double().reshape(-1, 1, 1, 1) for value in schedule.coefficients(t))
        return x_t * alpha * s**2 / (alpha**2 * s**2 + sigma**2)

    for num_steps in (18, 72):
        calls.clear()
        times = schedule.sampling_times(num_steps).double()
        alpha, sigma = (float(value.double()) for value in schedule.coefficients(times[0]))
        x = torch.randn(100, 1, 2, 2, dtype=torch.float64) * sigma
        exact = x * s / (alpha**2 * s**2 + sigma**2) ** 0.5
        got = sample_ode(denoise, schedule, times, x, {}, heun=heun)
        errors.append(((got - exact).norm() / exact.norm()).item())
        assert len(calls) == (2 * num_steps - 1 if heun else num_steps)
    order = 2 if heun else 1
    assert errors[1] < errors[0] / 4**order * 2, f"{errors}: convergence of order {order}"


@pytest.mark.parametrize("case", CASES)
def test_denoiser_of_a_teacher_is_x0(case):
    kind, prediction_type, steps = CASES[case]
    denoiser, batch = tiny_denoiser(0, kind, prediction_type), random_batch()
    t = denoiser.schedule.steps(steps)[1].expand(4)
    with torch.no_grad():
        p, got = denoiser.predict(batch.x0, t, batch.condition), denoiser_of(denoiser)(batch.x0, t, batch.condition)
    alpha, sigma = (value.reshape(-1, 1, 1, 1) for value in denoiser.schedule.coefficients(t))
    expected = {"karras": p, "ddpm": (batch.x0 - sigma * p) / alpha, "flow": batch.x0 - sigma * p}[case]
    torch.testing.assert_close(got, expected)


def test_ddpm_schedule_of_the_paper_runs_999_749_499_249():
    alpha, sigma = DDPMSchedule().coefficients(DDPMSchedule().steps(DDPM))
    assert alpha.diff().gt(0).all() and sigma.diff().lt(0).all()
