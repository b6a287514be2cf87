"""Whole training steps of the digits (ds_digits.json, random weights), and each operator's share of them.

The losses are the library's own, the optimizer is torch's AdamW; no DeepSpeed, no data loading. The generator's update
includes its rollout. `pytest benchmarks/bench_step.py --benchmark-only`, with OMP_NUM_THREADS=1 on a machine that
others use too: at every layer of so small a network, two threads wait for the slower one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import pytest
import torch

import dmd2_fast
from benchmarks import harness
from dmd2_fast.config import load_config
from dmd2_fast.data.batch import Batch
from dmd2_fast.dispatch import Operator
from dmd2_fast.distillation import Algorithm, FakeScore, Networks, fake_score_loss, generator_loss
from dmd2_fast.heads import GANHeads
from dmd2_fast.networks import build_denoiser
from dmd2_fast.teacher import teacher_settings

CONFIG = Path(__file__).resolve().parent.parent / "ds_digits.json"
ROUNDS = 10
HONEST = (
    "The networks and the optimizer are the rest; the two whole updates differ by noise. Elementwise operators are\n"
    "about 1 % of an SDXL step too: group_norm_silu inside the UNets and fewer passes are what moves a step."
)


def digits(device: str) -> dict[str, Callable[[int], None]]:
    """{"generator" | "fake_score": one update, given the iteration}."""
    config = load_config(CONFIG)
    algorithm, settings = Algorithm.from_config(config), teacher_settings(config.teacher.training, lambda: 0.6)
    torch.manual_seed(0)
    generator, fake, teacher = (build_denoiser(settings).eval().to(device) for _ in range(3))
    heads = GANHeads(tuple(teacher.network.feature_shape(level) for level in algorithm.levels)).to(device)
    fake_score = FakeScore(fake, heads, algorithm.own_levels)
    teacher.requires_grad_(False)
    networks = Networks(
        generator, fake_score, teacher, teacher.schedule, teacher.prediction_type, teacher.unconditional
    )
    size, shape = config.global_batch_size, teacher.network.image_shape
    labels = torch.arange(size, device=device) % 10
    batch = Batch(torch.rand(size, *shape, device=device), {"class_labels": labels}, torch.arange(size, device=device))
    x = torch.rand(size, *shape, device=device)
    optimizers = {m: torch.optim.AdamW(m.parameters(), lr=1e-6) for m in (generator, fake_score)}

    def update(module: torch.nn.Module, loss: torch.Tensor) -> None:
        loss.backward()
        optimizers[module].step()
        optimizers[module].zero_grad()

    def generator_update(iteration: int) -> None:
        fake_score.requires_grad_(False)
        update(generator, generator_loss(networks, algorithm, batch, dmd2_fast.NoiseKey(0, iteration))[0])
        fake_score.requires_grad_(True)

    def fake_score_update(iteration: int) -> None:
        update(fake_score, fake_score_loss(networks, algorithm, batch, x, dmd2_fast.NoiseKey(0, iteration))[0])

    return {"generator": generator_update, "fake_score": fake_score_update}


@contextmanager
def timed_operators(now: harness.Function) -> Iterator[dict[str, float]]:
    """{operator: seconds in its implementation}, summed up from here on; the clock waits for a GPU around each."""
    seconds: dict[str, float] = defaultdict(float)
    run = Operator.run

    def timed(self: Operator, *arguments):
        start = now()
        try:
            return run(self, *arguments)
        finally:
            seconds[self.name] += now() - start

    Operator.run = timed
    try:
        yield seconds
    finally:
        Operator.run = run


def operator_times(update: Callable[[int], None], now: harness.Function) -> dict[str, tuple[float, dict[str, float]]]:
    """{"reference" | "ours": (seconds of an update, seconds in each operator)}, medians of rounds that take turns."""
    totals, parts = defaultdict(list), defaultdict(list)
    for iteration in range(ROUNDS):
        for contestant, backend in (("reference", "reference"), ("ours", "auto")):
            with dmd2_fast.use_backend(backend), timed_operators(now) as seconds:
                start = now()
                update(iteration)
                totals[contestant].append(now() - start)
            parts[contestant].append(dict(seconds))
    return {
        contestant: (median(values), {name: median(part[name] for part in parts[contestant]) for name in seconds})
        for contestant, values in totals.items()
    }


def share_table(title: str, runs: dict[str, tuple[float, dict[str, float]]]) -> str:
    """Each operator's share of the update on the reference and on ours, with its speed-up between the two."""
    (slow, slow_parts), (fast, fast_parts) = runs["reference"], runs["ours"]
    slow_parts = slow_parts | {"all operators": sum(slow_parts.values())}
    fast_parts = fast_parts | {"all operators": sum(fast_parts.values())}
    rows = [
        [name, f"{slow_parts[name] / slow:.2%}", f"{fast_parts[name] / fast:.2%}", f"{slow_parts[name] / seconds:.2f}"]
        for name, seconds in sorted(fast_parts.items(), key=lambda item: -slow_parts[item[0]])
    ]
    rows.append(["the update", harness.duration(slow), harness.duration(fast), f"{slow / fast:.2f}"])
    return f"{title}\n" + harness.markdown(["", "share, reference", "share, ours", "speed-up"], rows)


@pytest.mark.parametrize("network", ["generator", "fake_score"])
def test_update(benchmark, device, note, network):
    update = digits(device)[network]
    benchmark.pedantic(
        update, args=(1,), rounds=1 if benchmark.disabled else 5, warmup_rounds=0 if benchmark.disabled else 1
    )
    if benchmark.disabled:
        return
    runs = operator_times(update, harness.quiet_clock(device))
    benchmark.group = f"{network} update, digits"
    benchmark.extra_info.update(
        seconds={contestant: seconds for contestant, (seconds, _) in runs.items()},
        operator_seconds={contestant: parts for contestant, (_, parts) in runs.items()},
        **harness.environment(device),
    )
    note(share_table(f"{network} update of the digits: time inside the operators", runs) + "\n" + HONEST)
