"""Chains of every schedule and prediction type with a network that knows x0, against formulas in float64."""

import math

import pytest
import torch
from tiny import SHAPE

from dmd2_fast.ops._common import PREDICTION_TYPES
from dmd2_fast.random import NoiseKey, philox_normal
from dmd2_fast.rollout import chain, initial_noise
from dmd2_fast.schedules import make_schedule

KEY, IDS = NoiseKey(11, step=4), torch.tensor([0, 3, 9])
X0 = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
ABAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
STEPS = {
    "ddpm": [(999, 749, 499, 249), (399,), (999,), (0,)],
    "karras": [(80.0, 5.0, 0.6, 0.02), (5.0,), (2.5,)],
    "rectified_flow": [(1.0, 0.75, 0.5, 0.25), (0.98, 0.6, 0.3, 0.1), (1.0,), (0.7,)],
}
CASES = [
    (kind, steps, prediction_type)
    for kind, lists in STEPS.items()
    for steps in lists
    for prediction_type in PREDICTION_TYPES
    if (steps[0], prediction_type) != (1.0, "epsilon")  # no x0 there, which is refused
]


def coefficients(kind: str, t: float) -> tuple[float, float]:
    if kind == "ddpm":
        return math.sqrt(ABAR[t]), math.sqrt(1 - ABAR[t])
    return (1.0, t) if kind == "karras" else (1 - t, t)


def noise(stream: int) -> torch.Tensor:
    return philox_normal(IDS, SHAPE, KEY.fork(stream), torch.float32).double()


@pytest.mark.parametrize(("kind", "steps", "prediction_type"), CASES)
def test_a_network_that_knows_x0_gives_it_at_every_step_from_freshly_noised_inputs(kind, steps, prediction_type):
    schedule, seen = make_schedule(kind), []

    def oracle(x_t, t, condition):
        seen.append((x_t.double(), t))
        alpha, sigma = coefficients(kind, steps[len(seen) - 1])
        eps = (x_t.double() - alpha * X0) / sigma
        targets = {"epsilon": eps, "sample": X0, "v_prediction": alpha * eps - sigma * X0, "flow": eps - X0}
        return targets[prediction_type].float()

    times = schedule.steps(steps)
    x = initial_noise(schedule, times, IDS, SHAPE, KEY)
    visited = list(chain(oracle, schedule, prediction_type, times, x, {}, IDS, KEY))

    start = noise(12) * (steps[0] if kind == "karras" else 1.0)
    inputs = [start]
    for i, t in enumerate(steps[1:]):
        alpha, sigma = coefficients(kind, t)
        inputs.append(alpha * X0 + sigma * noise(16 + i))
    assert len(visited) == len(steps) + 1 and len(seen) == len(steps)
    for (x_t, t), value, expected, x_i in zip(seen, steps, inputs, visited[:-1], strict=True):
        assert torch.equal(x_t, x_i.double())
        assert t.tolist() == pytest.approx([value] * 3) and (t.dtype == torch.int64) == (kind == "ddpm")
        torch.testing.assert_close(x_t, expected, rtol=1e-5, atol=rounding(kind, steps))
    torch.testing.assert_close(visited[-1].double(), X0, rtol=0, atol=rounding(kind, steps))


def rounding(kind: str, steps: tuple[float, ...]) -> float:
    """What x0 = (x_t - sigma p) / alpha makes of the last bits of f32 numbers: some 1e-6 times sigma / alpha."""
    ratios = [sigma / alpha for alpha, sigma in (coefficients(kind, t) for t in steps) if alpha > 0]
    return 1e-6 * max([2, *ratios])
