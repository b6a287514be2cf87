"""Two adapters on one frozen base over two ranks: trained as plain low-rank layers are, and one base in memory."""

import pytest
import torch
from cases import APPROXIMATE, ZERO, accumulate, case
from lora_oracle import LORA, plain_lora_run, prepare_with_attention
from plain_loop import moved, relative, worst_loss, write_config
from ranks import run_ranks

from dmd2_fast.export import load_generator

pytestmark = pytest.mark.timeout(400)
GRADIENT, WEIGHTS, STEPS, LOSS = 1e-6, 1e-5, 1e-3, 1e-4
SHARE = 0.55
SHARDED = {"zero_optimization": {**ZERO, "reduce_bucket_size": 5000}}
CASES = {
    "module": case(
        gather="module", passes="shared", index="batch", guidance=2.0, deepspeed={**SHARDED, **accumulate(2, 2)},
        iterations=4,
    ),
    "network": case(gather="network", passes="independent", r1=APPROXIMATE, deepspeed=SHARDED, iterations=4),
}  # fmt: skip


def section(name):
    model = {"lora": LORA, "activation_checkpointing": name == "module"}
    return {**CASES[name].section, "model": model}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    prepare_with_attention(folder)
    configs = {name: write_config(folder, name, 2, case.deepspeed, **section(name))[1] for name, case in CASES.items()}
    write_config(folder, "stopped", 2, CASES["network"].deepspeed, **section("network"))
    ended = run_ranks(folder, "adapters", str(folder), '{"runs": ["module", "network"], "stops": [1]}', timeout=300)
    assert set(ended.codes) == {0}, "\n".join(text[-3000:] for text in ended.output)
    return folder, configs


def load(runs, name, rank=0):
    return torch.load(runs[0] / f"{name}-rank{rank}.pt", weights_only=False)


@pytest.mark.parametrize("name", list(CASES))
def test_equals_plain_low_rank_layers(runs, name):
    got = load(runs, name)
    expected = plain_lora_run(runs[1][name], CASES[name].iterations, got["start"])
    gradients = {
        network: relative(got["gradients"][network], expected.gradients[network]) for network in expected.start
    }
    print(name, gradients, worst_loss(got["losses"], expected.losses))
    assert max(gradients.values()) < GRADIENT, gradients
    assert worst_loss(got["losses"], expected.losses) < LOSS
    for network, values in expected.weights.items():
        assert relative(got["weights"][network], values) < WEIGHTS
    for network, start in expected.start.items():
        assert relative(got["start"][network], start) == 0
        way = relative(moved(got["weights"][network], start), moved(expected.weights[network], start))
        assert way < STEPS


@pytest.mark.parametrize("name", list(CASES))
def test_each_update_moves_its_own_network_alone(runs, name):
    updates = load(runs, name)["updates of"]
    assert [network for network, _ in updates] == ["generator", "fake_score", "fake_score"] * 2
    assert all(moved == [network] for network, moved in updates)


@pytest.mark.parametrize("name", list(CASES))
def test_teacher_has_no_adapter(runs, name):
    """After training, its bits are those of the plain network; with an adapter they are not."""
    assert load(runs, name)["alone"] == {"generator": False, "fake_score": False, "teacher": True}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", list(CASES))
def test_one_base_in_memory(runs, name, rank):
    """Half of one base on each rank, and beside it no more than what training the adapters and the head takes."""
    got = load(runs, name, rank)
    (base, base_total), (trained, trained_total) = got["at rest"]["base"], got["at rest"]["adapters and head"]
    assert base <= SHARE * base_total and trained <= SHARE * trained_total
    # A shard of the weights, of the master weights, of the gradients and of the average, and DeepSpeed's buckets.
    assert 4 * base < got["bytes"] <= 4 * (SHARE * base_total + 3 * trained_total)
    assert got["whole"] == []


@pytest.mark.parametrize("rank", [0, 1])
def test_resumed_run_has_the_same_bits(runs, rank):
    through, stopped = load(runs, "network", rank)["state"], load(runs, "stopped", rank)["state"]
    assert through.keys() == stopped.keys()
    assert any("lora" in key for key in through)
    assert all(torch.equal(stopped[key], value) for key, value in through.items())


def test_checkpoint_and_export_hold_no_base(runs):
    folder, _ = runs
    base = 4 * load(runs, "network")["at rest"]["base"][1]
    (checkpoint,) = (folder / "network").glob("checkpoints/iteration-*/generator")
    assert sum(path.stat().st_size for path in checkpoint.rglob("*.pt")) < base
    assert (folder / "network" / "generator.safetensors").stat().st_size < base / 2


@pytest.mark.parametrize("name", list(CASES))
def test_samples_are_those_of_the_merged_export(runs, name):
    generator = load_generator(runs[0] / name / "generator.safetensors")
    expected = generator.sample(torch.arange(10), seed=5)
    torch.testing.assert_close(load(runs, name)["samples"], expected, rtol=1e-4, atol=1e-5)
