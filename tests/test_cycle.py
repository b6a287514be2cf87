"""The rivals of benchmarks/cycle.py compute what ours computes: losses and gradients from the same draws.

Where the estimator is the same: DMD2 against `passes: independent` with the fake score's features, FastGen against
`passes: shared` with the teacher's. So a ratio of their costs compares like with like.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny import random_batch, tiny_networks

from benchmarks import cycle, cycle_baselines
from dmd2_fast.distillation import Algorithm, fake_score_loss, generator_loss
from dmd2_fast.engine import frozen
from dmd2_fast.optimization import clipped_step, make_optimizer
from dmd2_fast.random import NoiseKey, Stream, philox_normal, philox_uniform
from dmd2_fast.rollout import rollout_index

STEPS = (999, 749, 499, 249)
TIME_STREAMS = {
    "dmd": Stream.DMD_TIME,
    "denoising": Stream.DENOISING_TIME,
    "gan fake": Stream.GAN_FAKE_TIME,
    "gan real": Stream.GAN_REAL_TIME,
}


class KeyedDraws:
    """The times and noise that ours draws from a key."""

    def __init__(self, batch, key: NoiseKey, num_steps: int):
        self.ids, self.key = batch.sample_ids, key
        self.index = int(rollout_index(num_steps, "batch", torch.zeros(1, dtype=torch.int64), key))

    def times(self, part, num, low=0, high=1000):
        u = philox_uniform(self.ids, (1,), self.key.fork(TIME_STREAMS[part]))[:, 0]
        return (low + (u * (high - low)).long()).clamp(max=high - 1)

    def noise(self, part, like):
        stream = Stream.GENERATOR_INPUT if part == "input" else None
        if part.startswith("step"):
            stream = Stream.ROLLOUT_STEP + int(part.split()[1])
        stream = TIME_STREAMS[part] + 1 if stream is None else stream
        return philox_normal(self.ids, like.shape[1:], self.key.fork(stream), torch.float32)


def both(rival: str, guidance: float, step: int):
    """(ours, its algorithm, the rival's networks of the same weights, batch, key, draws)"""
    dmd2 = rival == "dmd2"
    algorithm = Algorithm(
        steps=STEPS if dmd2 else (399,), guidance_scale=guidance, generator_weight=0.3, discriminator_weight=0.2,
        features="fake_score" if dmd2 else "teacher", passes="independent" if dmd2 else "shared",
    )  # fmt: skip
    networks, batch, key = tiny_networks(algorithm, "ddpm", "epsilon"), random_batch(), NoiseKey(3, step)
    plain = cycle_baselines.Plain(
        networks.generator.network, networks.fake_score.denoiser.network, networks.teacher.network,
        networks.fake_score.heads, networks.schedule.coefficients(torch.arange(1000))[0] ** 2,
        algorithm.steps, guidance, 0.3, 0.2,
    )  # fmt: skip
    return networks, algorithm, plain, batch, key, KeyedDraws(batch, key, len(algorithm.steps))


def gradients(loss, module):
    parameters = dict(module.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: value for name, value in zip(parameters, found, strict=True) if value is not None}


def assert_same(ours, theirs, module):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, check_dtype=False)
    got, expected = gradients(ours, module), gradients(theirs, module)
    assert got.keys() == expected.keys() and len(got) > 10
    difference = torch.cat([(got[name] - value).flatten() for name, value in expected.items()]).norm()
    assert difference <= 1e-4 * torch.cat([value.flatten() for value in expected.values()]).norm()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("rival", ["dmd2", "fastgen"])
def test_generator_loss(rival, guidance):
    networks, algorithm, plain, batch, key, draws = both(rival, guidance, 1)
    with frozen(networks.fake_score):
        ours, x, _ = generator_loss(networks, algorithm, batch, key)
        if rival == "dmd2":
            theirs, samples = cycle_baselines.dmd2_generator_loss(plain, batch, draws)
            torch.testing.assert_close(samples, x, rtol=1e-4, atol=1e-4)
        else:
            theirs = cycle_baselines.fastgen_student_loss(plain, batch, draws)
        assert_same(ours, theirs, networks.generator)


@pytest.mark.parametrize("rival", ["dmd2", "fastgen"])
def test_fake_score_loss(rival):
    networks, algorithm, plain, batch, key, draws = both(rival, 1.0, 2)
    with torch.no_grad():
        generate = cycle_baselines.dmd2_generate if rival == "dmd2" else cycle_baselines.fastgen_generate
        x = generate(plain, batch, draws)
    ours, _ = fake_score_loss(networks, algorithm, batch, x, key)
    if rival == "dmd2":
        theirs = cycle_baselines.dmd2_fake_score_loss(plain, batch, x, draws)
    else:
        theirs = cycle_baselines.fastgen_fake_score_loss(plain, batch, draws)
    assert_same(ours, theirs, networks.fake_score)


def test_rollouts_of_all_lengths_are_run():
    assert {both("dmd2", 1.0, step)[-1].index for step in range(12)} == {0, 1, 2, 3}


@pytest.fixture(scope="module")
def counted():
    """{rival: (ours, the rival's)} on the digits' network, batch 2: counts do not depend on what it says."""
    batch = cycle.make_batch(cycle.make_networks("digits")[0][0], 2)
    return {
        rival: tuple(
            cycle.count(contestant, batch, cycle.indices(steps))
            for contestant in (cycle.Ours("digits", rival), cycle.make_rival("digits", rival))
        )
        for rival, steps in cycle.STEPS.items()
    }


@pytest.mark.parametrize("rival", cycle.STEPS)
def test_a_cycle_costs_less(counted, rival):
    ours, theirs = counted[rival]
    assert ours["operators"] <= 0.65 * theirs["operators"]
    # .876 of DMD2's with SDXL's shape; the digits' encoder is a smaller part of their network
    assert ours["FLOPs"] <= {"dmd2": 0.885, "fastgen": 1.0}[rival] * theirs["FLOPs"]
    assert ours["peak"] < theirs["peak"] and ours["gathered"] < theirs["gathered"]


def test_flops_are_the_passes(counted):
    """DMD2's cycle less ours: an encoder forward for the generator, and five forwards and backwards of the encoder."""
    ours, theirs = counted["dmd2"]
    (network, *_), heads = cycle.make_networks("digits")
    batch, t = cycle.make_batch(network, 2), torch.tensor([3, 700])

    def flops(backward: bool) -> int:
        with cycle.FlopCounterMode(display=False) as counter:
            features = network(batch.x0, t, batch.condition, decode_rows=0, levels=("mid",))[1]
            if backward:
                heads(features).sum().backward()
        return counter.get_total_flops()

    # A joint backward has nothing to add for the rows that both parts read but the head, which DMD2's passes too.
    with cycle.FlopCounterMode(display=False) as head:
        heads(tuple(torch.zeros(2, *network.feature_shape(), requires_grad=True) for _ in range(1))).sum().backward()
    expected = flops(False) + 5 * (flops(True) - head.get_total_flops())
    assert theirs["FLOPs"] - ours["FLOPs"] == pytest.approx(expected, rel=1e-3)


def test_a_cycle_of_each_moves_its_networks():
    batch = cycle.make_batch(cycle.make_networks("digits")[0][0], 2)
    for rival, steps in cycle.STEPS.items():
        for contestant in (cycle.Ours("digits", rival), cycle.make_rival("digits", rival)):
            nets = contestant.networks if isinstance(contestant, cycle.Ours) else contestant.nets
            fake = nets.fake_score if isinstance(contestant, cycle.Ours) else nets.fake
            before = [[p.clone() for p in module.parameters()] for module in (nets.generator, fake, nets.teacher)]
            contestant.cycle(batch, cycle.indices(steps))
            now = [list(module.parameters()) for module in (nets.generator, fake, nets.teacher)]
            moved = [
                any(not torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in zip(before, now, strict=True)
            ]
            assert moved == [True, True, False]


def test_bytes_held_at_once():
    with cycle.Counter() as counter:
        kept = torch.zeros(1000)
        for _ in range(5):
            torch.ones(500)
        kept.add_(1)
    assert (counter.peak, counter.operators) == (6000, 7)


def test_clipped_step_refuses_optimizers_that_would_not_clip():
    weight = torch.zeros(3, requires_grad=True)
    for optimizer in (torch.optim.AdamW([weight]), torch.optim.SGD([weight])):
        with pytest.raises(TypeError, match="fused=True"):
            clipped_step(optimizer, 1.0)


def test_clipped_step_is_clipping_then_adamw():
    """Also where a gradient is not finite: nothing moves, the next step goes on."""
    settings = SimpleNamespace(lr=0.1, betas=(0.5, 0.9), eps=1e-8, weight_decay=0.1)
    start = [torch.randn(7, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    ours = [value.clone().requires_grad_() for value in start]
    plain = [value.clone().requires_grad_() for value in start]
    optimizer = make_optimizer(ours, settings)
    oracle = torch.optim.AdamW(plain, lr=0.1, betas=(0.5, 0.9), weight_decay=0.1, foreach=False)
    for step, scale in enumerate((10.0, 0.01, float("nan"), 5.0)):
        for i, (a, b) in enumerate(zip(ours, plain, strict=True)):
            gradient = scale * torch.randn(7, generator=torch.Generator().manual_seed(10 * step + i))
            a.grad, b.grad = gradient.clone(), gradient.clone()
        norm = clipped_step(optimizer, 2.0)
        expected = torch.cat([p.grad for p in plain]).norm()
        torch.testing.assert_close(norm, expected, equal_nan=True)
        if expected.isfinite():
            torch.nn.utils.clip_grad_norm_(plain, 2.0)
            oracle.step()
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b)
            assert a.grad is None
