"""ZeRO's stages 1 and 2 on two ranks: as plain PyTorch, resumed to the same bits, exact R1 through the network."""

import pytest
import torch
from exact_r1 import plain_gradients
from lora_oracle import plain_lora_run, prepare_with_attention
from plain_loop import moved, plain_run, prepare, relative, split_noise, worst_loss, write_config
from ranks import run_ranks
from safetensors.torch import load_file
from stages import ADAPTERS, CASES, EXACT_R1, RESUMED, SPOILED, adapters_section, zero

from dmd2_fast.export import load_generator

pytestmark = pytest.mark.timeout(400)
GRADIENT, WEIGHTS, STEPS, LOSS = 1e-6, 1e-5, 1e-3, 1e-4
SHARE = 0.55
SHORT = {**CASES["2-offload"].section, "run": {"gather": "network", "iterations": 6, "log_interval": 4}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder, configurations, what rank 0 printed)."""
    folder = tmp_path_factory.mktemp("stages")
    prepare(folder)
    configs = {name: write_config(folder, name, 2, c.deepspeed, **c.section)[1] for name, c in CASES.items()}
    configs |= {name: write_config(folder, name, 2, keys, **SHORT)[1] for name, keys in SPOILED.items()}
    for name, keys in RESUMED.items():
        for kind in ("through", "stopped"):
            configs[f"{kind}-{name}"] = write_config(folder, f"{kind}-{name}", 2, keys, **SHORT)[1]
    for name in ("optimizer", "weights", "ranks"):
        write_config(folder, name, 2, RESUMED["2"], **SHORT)
    for stage, steps in EXACT_R1:
        write_config(folder, f"r1-{stage}-{steps}", 2, {**zero(stage), "gradient_accumulation_steps": steps})
    (folder / "lora").mkdir()
    prepare_with_attention(folder / "lora")
    path, configs["adapters"] = write_config(folder / "lora", "adapters", 2, ADAPTERS.deepspeed, **adapters_section())
    (folder / "adapters.json").write_text(path.read_text())
    ended = run_ranks(folder, "stages", str(folder), timeout=300)
    assert set(ended.codes) == {0}, "\n".join(text[-3000:] for text in ended.output)
    return folder, configs, ended.output[0]


def load(runs, name, rank=0):
    return torch.load(runs[0] / f"{name}-rank{rank}.pt", weights_only=False)


def check_equal(got, expected, limit=GRADIENT):
    gradients = {name: relative(got["gradients"][name], value) for name, value in expected.gradients.items()}
    assert max(gradients.values()) < limit, gradients
    assert worst_loss(got["losses"], expected.losses) < LOSS
    for name, value in expected.weights.items():
        assert relative(got["weights"][name], value) < WEIGHTS
    for name, start in expected.start.items():
        assert relative(got["start"][name], start) == 0
        assert relative(moved(got["weights"][name], start), moved(expected.weights[name], start)) < STEPS


@pytest.mark.parametrize("name", list(CASES))
def test_equals_plain_pytorch(runs, name):
    got = load(runs, name)
    assert got["finished"] and got["updates"] >= 2
    config, limit = runs[1][name], GRADIENT
    expected = plain_run(config, CASES[name].iterations)
    if not config.model.fused_operators:  # without them GRADIENT is below what the split itself changes
        limit = max(GRADIENT, split_noise(config, expected))
    check_equal(got, expected, limit)
    for network, value in load(runs, name, rank=1)["weights"].items():
        assert relative(value, got["weights"][network]) == 0


@pytest.mark.parametrize("name", list(CASES))
def test_samples_are_those_of_the_exported_average(runs, name):
    got, folder = load(runs, name), runs[0] / name
    expected = load_generator(folder / "generator.safetensors").sample(torch.arange(10), seed=5)
    torch.testing.assert_close(got["samples"], expected, rtol=1e-4, atol=1e-5)
    for network, value in got["weights"].items():  # training has its own weights again
        assert relative(got["weights after"][network], value) == 0
    exported = load_file(folder / "fake_score.safetensors")
    prefix = "denoiser.network.unet."
    fake = {k.removeprefix(prefix): v for k, v in got["weights"]["fake_score"].items() if k.startswith(prefix)}
    assert relative(exported, fake) == 0


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", list(CASES))
def test_masters_moments_and_average_are_divided(runs, name, rank):
    found = load(runs, name, rank)["elements"]
    assert len(found) == 7
    assert all(mine <= SHARE * total for mine, total in found.values()), found


@pytest.mark.parametrize("name", list(SPOILED))
def test_nan_on_one_rank_skips_the_step_on_all(runs, name):
    got, other = load(runs, name), load(runs, name, rank=1)
    expected = plain_run(runs[1][name], 6, skip={("fake_score", 3), ("generator", 4)})
    assert got["skipped"] == other["skipped"] == {"generator": 1, "fake_score": 1}
    assert got["updates"] == len(expected.updates["generator"]) == 2  # 0, 2
    for network, value in expected.weights.items():
        assert relative(got["weights"][network], value) < WEIGHTS
        assert relative(other["weights"][network], got["weights"][network]) == 0


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", list(RESUMED))
def test_resumed_equals_uninterrupted(runs, name, rank):
    """Bit for bit: weights, masters, moments, averages and lines."""
    found = load(runs, f"resumed-{name}", rank)
    through, stopped = found["through"], found["stopped"]
    assert through["reached"] == [0] and stopped["reached"] == [0, 3, 5]
    assert through["state"].keys() == stopped["state"].keys()
    assert [key for key, value in through["state"].items() if not torch.equal(value, stopped["state"][key])] == []
    lines = [
        [
            {key: value for key, value in line.items() if not key.startswith(("time", "seconds/"))}
            for line in kind["lines"]
        ]
        for kind in (through, stopped)
    ]
    assert lines[0] == lines[1] and [line["iteration"] for line in lines[0]] == [4, 6]


def test_average_of_parameters_in_another_order(runs):
    """round_robin_gradients, for which DeepSpeed deals the parameters out to the ranks."""
    exported = load_file(runs[0] / "through-2" / "generator.safetensors")
    average = plain_run(runs[1]["through-2"], 6).weights["ema"]
    assert relative(exported, {k.removeprefix("network.unet."): v for k, v in average.items()}) < WEIGHTS


def test_damaged_checkpoints_and_other_ranks_are_refused_on_all(runs):
    for rank in (0, 1):
        assert load(runs, "refused", rank) == {"optimizer": 2, "weights": 2, "ranks": 2}
    printed = runs[2]
    assert "zero_pp_rank_1_mp_rank_00_optim_states.pt is damaged" in printed
    assert "mp_rank_00_model_states.pt is damaged" in printed
    assert "was written by 1 rank(s) and this run has 2" in printed and "Traceback" not in printed


def test_adapters_equal_plain_low_rank_layers(runs):
    got = load(runs, "adapters")
    check_equal(got, plain_lora_run(runs[1]["adapters"], ADAPTERS.iterations, got["start"]))


@pytest.mark.parametrize(("stage", "steps"), EXACT_R1)
def test_exact_r1_through_the_network(runs, stage, steps):
    """The gradients of plain PyTorch's double backward, in a first update and in one after it."""
    expected = plain_gradients()
    assert relative(plain_gradients(penalty=False), expected) > 0.1
    for rank in (0, 1):
        for got in load(runs, f"r1-{stage}-{steps}", rank):
            assert relative(got, expected) < GRADIENT
