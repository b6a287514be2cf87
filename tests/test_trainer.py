"""The loop in one process: who is updated when, with which rate and gradient, and what a run leaves behind."""

import itertools
import json
import math

import pytest
import torch
from golden import make as golden
from one_rank import group_of_one, make_trainer, steps
from plain_loop import prepare, worst_loss
from torch.testing import assert_close

import dmd2_fast.trainer as trainer_module
from dmd2_fast import use_backend
from dmd2_fast.data import dali_installed
from dmd2_fast.engine import WholeNetwork, frozen, full_state_dict, poison_if_not_finite
from dmd2_fast.errors import UserError
from dmd2_fast.export import SAMPLING_STEP, load_generator
from dmd2_fast.meters import Metrics
from dmd2_fast.random import NoiseKey
from dmd2_fast.ranks import Rank, on_main
from dmd2_fast.rollout import sample
from dmd2_fast.runs import read_metrics


@pytest.fixture(scope="module")
def rank():
    with group_of_one() as rank:
        yield rank


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    prepare(folder)
    return folder


def test_golden_losses_are_those_of_the_plain_loop():
    with use_backend("reference"):
        assert worst_loss(golden.derive(), json.loads(golden.PATH.read_text())) < 1e-4


def test_golden_run(backend, folder, rank):
    """20 iterations give the losses of the file on every backend; DALI reads where it is installed."""
    expected = json.loads(golden.PATH.read_text())
    trainer = make_trainer(folder, f"golden-{backend}", rank, **golden.SECTION)
    assert trainer.loader.name == ("dali" if dali_installed() else "plain")
    # Triton's interpreter is slow: six iterations have both kinds of update twice.
    num_iterations, step = 6 if backend == "triton" else 20, trainer.step

    def stop_in_time(batches):
        trainer.stop_requested = trainer.iteration + 1 == num_iterations < 20
        step(batches)

    trainer.step = stop_in_time
    assert trainer.train() == (num_iterations == 20)
    trainer.close()
    lines = read_metrics(trainer.run.metrics)
    assert worst_loss(lines, expected[:num_iterations]) < 1e-4
    assert [line["iteration"] for line in lines] == list(range(1, num_iterations + 1))
    for name in (
        "generator/dmd",
        "generator/gan",
        "fake_score/denoising",
        "fake_score/gan",
        "logits/real",
        "logits/fake",
    ):
        assert name in expected[0]


@pytest.fixture(scope="module")
def counted(folder, rank):
    """Seven iterations at ttur_ratio 3, and what was seen of each update."""
    trainer = make_trainer(
        folder, "counted", rank, generator={"ema": 0.9}, fake_score={"ttur_ratio": 3}, run={"iterations": 7}
    )
    seen = {"generator": [], "fake_score": []}
    for name in seen:
        engine = getattr(trainer.engines, name)

        def step(name=name, engine=engine, original=engine.step):
            seen[name].append((trainer.iteration, engine.optimizer.param_groups[0]["lr"]))
            return original()

        engine.step = step
    weights, averages = [], []

    def record():  # one rank's "whole" tensors are its own: copies, or they would change with it
        for found, state in (
            (weights, full_state_dict(trainer.engines.generator)),
            (averages, trainer.ema.full_state_dict()),
        ):
            found.append({name: value.clone() for name, value in state.items()})

    record()
    steps(trainer, 7, record)
    trainer.close()
    return trainer, seen, weights, averages


def test_update_counters(counted):
    trainer, seen, weights, _ = counted
    assert [iteration for iteration, _ in seen["generator"]] == [0, 3, 6]
    assert [iteration for iteration, _ in seen["fake_score"]] == list(range(7))
    assert trainer.generator_updates == 3
    changed = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in itertools.pairwise(weights)]
    assert changed == [True, False, False, True, False, False, True]


def test_learning_rates_count_iterations(counted):
    """Two iterations of warm-up, half a cosine over the other five, down to a tenth; the generator sees every third."""
    _, seen, _, _ = counted
    cosine = [1e-4 + 9e-4 * (1 + math.cos(math.pi * k / 5)) / 2 for k in range(5)]
    expected = [0.5e-3, 1e-3, *cosine]
    assert [lr for _, lr in seen["fake_score"]] == pytest.approx(expected)
    assert [lr for _, lr in seen["generator"]] == pytest.approx([expected[0], expected[3], expected[6]])


def test_average_follows_generator_updates_alone(counted):
    _, _, weights, averages = counted
    expected = weights[0]
    for i in range(7):
        if i in (0, 3, 6):
            expected = {name: 0.9 * value + 0.1 * weights[i + 1][name] for name, value in expected.items()}
        for name, value in expected.items():
            assert_close(averages[i + 1][name], value, rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(averages[-1][name], weights[-1][name]) for name in expected)


@pytest.mark.parametrize("limit", [0.01, 0.0])
def test_gradient_clipping(folder, rank, limit):
    """What reaches AdamW is what clip_grad_norm_ leaves of the gradient; 0 leaves all of it."""
    from deepspeed.utils import safe_get_full_grad

    trainer = make_trainer(
        folder, f"clip-{limit}", rank, fake_score={"gradient_clipping": limit}, run={"iterations": 3}
    )
    engine, gradients, reached = trainer.engines.fake_score, [], []

    def step(original=engine.step):
        gradients.extend(safe_get_full_grad(parameter).clone() for parameter in engine.module.parameters())
        return original()

    adam = engine.optimizer.optimizer

    def adam_step(original=adam.step):
        reached.extend(p.grad.clone() for group in adam.param_groups for p in group["params"])
        return original()

    engine.step, adam.step = step, adam_step
    steps(trainer, 1)
    trainer.close()
    parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit or math.inf))
    assert norm > 0.02  # or the limit would not be reached
    assert float(engine.get_global_grad_norm()) == pytest.approx(norm, rel=1e-5)
    expected = torch.cat([parameter.grad.flatten() for parameter in parameters])
    assert_close(torch.cat([part.flatten() for part in reached])[: len(expected)], expected, rtol=1e-5, atol=1e-9)


ZERO_DEFAULTS = {"zero_optimization": {"stage": 3}}


@pytest.mark.parametrize(("gather", "deepspeed"), [("network", None), ("module", None), ("module", ZERO_DEFAULTS)])
def test_samples_and_export_use_the_average(folder, rank, gather, deepspeed):
    """Grids come from the averaged weights, which generator.safetensors holds, and training goes on from its own."""
    name = f"export-{gather}-{'defaults' if deepspeed else 'own'}"
    trainer = make_trainer(
        folder, name, rank, deepspeed, generator={"ema": 0.5}, run={"iterations": 3, "gather": gather}
    )
    steps(trainer, 2)
    before = {key: value.clone() for key, value in full_state_dict(trainer.engines.generator).items()}
    labels = torch.arange(10)
    with trainer.averaged(), trainer.engines.bare(trainer.engines.generator) as denoiser, torch.no_grad():
        step_list = denoiser.schedule.steps(trainer.algorithm.steps)
        key, ids = NoiseKey(7, step=SAMPLING_STEP), torch.arange(10)
        images = sample(denoiser, step_list, {"class_labels": labels}, ids, (1, 8, 8), key).clamp(-1, 1)
    trainer.export()
    generator = load_generator(trainer.run.path / "generator.safetensors")
    assert generator.steps == trainer.algorithm.steps
    assert_close(generator.sample(labels, seed=7), images, rtol=1e-5, atol=1e-5)
    average = trainer.ema.full_state_dict()
    state = generator.denoiser.state_dict()
    assert state.keys() == average.keys()
    assert all(torch.equal(state[key], value) for key, value in average.items())
    assert any(not torch.equal(average[key], value) for key, value in before.items())
    after = full_state_dict(trainer.engines.generator)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    with trainer.engines.bare(trainer.engines.generator) as denoiser, torch.no_grad():
        own = sample(denoiser, step_list, {"class_labels": labels}, ids, (1, 8, 8), key).clamp(-1, 1)
    assert float((own - images).abs().max()) > 1e-3  # the average is swapped out again, also where weights stay whole
    trainer.close()


def test_whole_network_is_the_module(folder, rank):
    """Forward and input gradient of a network that is put together for a pass, against the teacher as it was loaded."""
    trainer = make_trainer(folder, "whole", rank, run={"gather": "network", "iterations": 3})
    engine = trainer.engines.teacher
    whole = trainer.engines.whole[engine.module]
    assert isinstance(whole, WholeNetwork)
    from dmd2_fast.networks import load_denoiser

    expected = load_denoiser(trainer.config.model.path)
    x, t, condition = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 5.0]), {"class_labels": torch.tensor([0, 4, 10])}
    results = []
    for network in (expected, None):
        leaf = x.clone().requires_grad_()
        with trainer.engines.bare(engine) as module:
            network = network or module
            prediction, features = network(leaf, t, condition, levels=("mid",))
            (gradient,) = torch.autograd.grad(prediction.sin().sum() + features[0].cos().sum(), leaf)
        results.append((prediction.detach(), features[0].detach(), gradient))
    for got, want in zip(results[1], results[0], strict=True):
        assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert all(parameter.device.type == "meta" for parameter in whole.module.parameters())
    assert not any(parameter.requires_grad for parameter in whole.module.parameters())
    trainer.close()


def test_frozen_restores_what_was_trainable():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    module[1].bias.requires_grad_(False)
    before = [parameter.requires_grad for parameter in module.parameters()]
    with pytest.raises(KeyError), frozen(module):
        assert not any(parameter.requires_grad for parameter in module.parameters())
        raise KeyError
    assert [parameter.requires_grad for parameter in module.parameters()] == before == [True, True, True, False]


@pytest.mark.parametrize("value", [2.0, math.nan, math.inf, -math.inf])
def test_poison(value):
    """A finite loss and its gradient are untouched; any other gives gradients of nan, which no rank can overlook."""
    x = torch.tensor([1.0, 3.0], requires_grad=True)
    loss = poison_if_not_finite(x.sum() * 0.5 + (value - 2.0))
    loss.backward()
    if math.isfinite(value):
        assert loss.item() == value and x.grad.tolist() == [0.5, 0.5]
    else:
        assert math.isnan(loss.item()) and torch.isnan(x.grad).all()


def test_metrics_are_means_since_the_last_reading():
    metrics = Metrics()
    for value in (1.0, 2.0, 6.0):
        metrics.add({"a": torch.tensor(value)})
    metrics.add({"b": torch.tensor([5.0])})
    half = Metrics()
    half.restore(metrics.sums, metrics.counts)
    assert metrics.read() == {"a": 3.0, "b": 5.0}
    assert metrics.read() == {}
    half.add({"a": torch.tensor(3.0), "c": torch.tensor(1.0)})
    assert half.read() == {"a": 3.0, "b": 5.0, "c": 1.0}


def test_on_main():
    rank = Rank(0, 1, torch.device("cpu"))
    assert on_main(rank, lambda: 3) == 3
    with pytest.raises(UserError, match="no such thing"):
        on_main(rank, lambda: (_ for _ in ()).throw(UserError("no such thing")))
    assert on_main(Rank(1, 1, torch.device("cpu")), lambda: 1 / 0) is None


def test_a_finished_run_trains_nothing(folder, rank, monkeypatch):
    trainer = make_trainer(folder, "finished", rank, run={"iterations": 2})
    trainer.train()
    trainer.close()
    again = make_trainer(folder, "finished", rank, run={"iterations": 2})
    monkeypatch.setattr(trainer_module.Trainer, "step", lambda *_: pytest.fail("trained again"))
    assert again.iteration == 2 and again.train()
    again.close()
    assert [line["iteration"] for line in read_metrics(again.run.metrics)] == [1, 2]
