"""A run that was stopped, killed or spoiled goes on as if nothing had happened, or says why it cannot. Two ranks."""

import json
import socket

import pytest
import torch
from cases import APPROXIMATE, LEAF, accumulate, case
from plain_loop import moved, plain_run, prepare, relative, worst_loss, write_config
from ranks import run_ranks
from safetensors.torch import load_file

pytestmark = pytest.mark.timeout(600)
ITERATIONS = 10
STOPS = (5, 8)
"""5: an epoch ends in the middle of the next batch, the sums of a log interval are open, and the generator is due one
iteration later; 8: a line has just been logged, and the generator is due one iteration later."""


def section(**changes):
    made = case(
        gather="network", passes="independent", r1=APPROXIMATE, guidance=2.0, iterations=ITERATIONS, ttur_ratio=3,
        scheduler="constant",
    ).section  # fmt: skip
    made["run"] |= {"log_interval": 4, "checkpoint_interval": 3, **changes}
    return made


def load(folder, name, rank):
    return torch.load(folder / f"{name}-rank{rank}.pt")


def ended_well(ended):
    assert set(ended.codes) == {0}, "\n".join(text[-3000:] for text in ended.output)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    prepare(folder)
    for name in ("through", "stopped", "damaged", "killed"):
        write_config(folder, name, 2, LEAF, **section())
    write_config(folder, "one-rank", 1, **section(iterations=3))
    ended_well(run_ranks(folder, "one_rank", str(folder), world_size=1))
    ended = run_ranks(folder, "resume", str(folder), json.dumps({"stops": STOPS}), timeout=300)
    ended_well(ended)
    (folder / "printed.txt").write_text(ended.output[0])
    return folder


def without_times(lines):
    return [{key: value for key, value in line.items() if not key.startswith(("time", "seconds/"))} for line in lines]


@pytest.mark.parametrize("rank", [0, 1])
def test_resumed_equals_uninterrupted(folder, rank):
    """Bit for bit on each rank: shards of the weights, master weights, optimizer states, averages, metrics lines."""
    through, stopped = load(folder, "through", rank), load(folder, "stopped", rank)
    assert through["finished"] == [(0, True, ITERATIONS)]
    assert stopped["finished"] == [(0, False, 5), (5, False, 8), (8, True, ITERATIONS)]
    assert through["state"].keys() == stopped["state"].keys()
    kinds = {" ".join(name.split()[:2]) for name in through["state"]}
    assert {"generator optimizer", "fake_score optimizer", "generator master", "fake_score master"} <= kinds
    for name, value in through["state"].items():
        assert torch.equal(value, stopped["state"][name]), name
    assert [line["iteration"] for line in through["losses"]] == [4, 8, 10]
    assert without_times(through["losses"]) == without_times(stopped["losses"])


def test_another_number_of_ranks_is_refused(folder):
    for rank in (0, 1):
        assert load(folder, "refused", rank)["one-rank"] == 2
    printed = (folder / "printed.txt").read_text()
    assert "was written by 1 rank(s) and this run has 2" in printed and "--fresh" in printed


def test_a_file_that_one_rank_finds_damaged(folder):
    """Rank 1's optimizer state is cut off: both refuse, and say what to remove."""
    for rank in (0, 1):
        assert load(folder, "refused", rank)["damaged"] == 2
    printed = (folder / "printed.txt").read_text()
    assert "rank_1_mp_rank_00_optim_states.pt is damaged" in printed and "Remove " in printed
    assert "Traceback" not in printed


def test_killed_in_a_checkpoint_then_stopped_by_a_signal(folder):
    """SIGKILL while iteration 6 is written: what counts is iteration 3. SIGTERM to one rank: both save and stop."""
    run = folder / "killed"

    def start(**action):
        return run_ranks(folder, "train", str(folder), json.dumps({"config": "killed.json", "rank": 1, **action}))

    killed = start(checkpoint=6, signal="SIGKILL")
    assert killed.codes[1] == -9 and killed.codes[0] != 0
    names = sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())
    assert "iteration-000003" in names and "iteration-000006" not in names

    stopped = start(iteration=8, signal="SIGTERM")
    assert stopped.codes == [143, 143], stopped.output
    assert "resuming at iteration 3" in stopped.output[0]
    assert (run / "checkpoints" / "iteration-000009").is_dir()  # the iteration that was running is finished first
    assert not list((run / "checkpoints").glob("*.tmp"))

    ended = start()
    ended_well(ended)
    assert "resuming at iteration 9" in ended.output[0]
    weights, expected = (load_file(folder / name / "generator.safetensors") for name in ("killed", "through"))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert (run / "report.html").exists()


def test_a_port_that_is_taken(folder):
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen()
        port = busy.getsockname()[1]
        ended = run_ranks(folder, "train", str(folder), json.dumps({"config": "through.json"}), port=port)
    assert ended.codes == [2, -15]  # the launcher ends the rank that waits for the first
    assert f"error: port {port}, at which the ranks are to meet, is in use" in ended.output[0]
    assert "Traceback" not in ended.output[0] and "--master_port" in ended.output[0]


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nan")
    prepare(folder)
    configs = {}
    for gather, split in (("module", accumulate(2, 2)), ("network", LEAF)):
        made = section(gather=gather, log_interval=1, iterations=10)
        configs[gather] = write_config(folder, f"nan-{gather}", 2, split, **made)[1]
    write_config(folder, "diverging", 2, LEAF, **section(iterations=25, checkpoint_interval=1000))
    write_config(folder, "unreadable", 2, LEAF, **section())
    ended = run_ranks(folder, "nan", str(folder), timeout=300)
    ended_well(ended)
    return folder, configs, ended


@pytest.mark.parametrize("gather", ["module", "network"])
def test_nan_on_one_rank_skips_the_step_on_all(spoiled, gather):
    """Everything else is as in a plain run that leaves out these three updates."""
    folder, configs, _ = spoiled
    expected = plain_run(configs[gather], 10, skip={("fake_score", 4), ("generator", 6), ("fake_score", 8)})
    first, second = (load(folder, f"nan-{gather}", rank) for rank in (0, 1))
    assert first["skipped"] == second["skipped"] == {"generator": 1, "fake_score": 2}
    assert first["updates"] == len(expected.updates["generator"]) == 3  # 0, 3, 9
    for network, values in expected.weights.items():
        assert relative(first["weights"][network], values) < 1e-5
        assert relative(second["weights"][network], first["weights"][network]) == 0
    for network, start in expected.start.items():
        assert relative(moved(first["weights"][network], start), moved(expected.weights[network], start)) < 1e-3
    # Iteration 8 had a batch of nan: its losses are not finite, which the lines show as null.
    assert first["losses"][8]["fake_score/loss"] is None
    expected.losses[8] = {k: v for k, v in expected.losses[8].items() if not k.startswith(("fake_score/", "logits/"))}
    assert worst_loss(first["losses"], expected.losses) < 1e-4
    assert [line["skipped/fake_score"] for line in first["losses"]] == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    assert [line["skipped/generator"] for line in first["losses"]] == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1]


def test_twenty_in_a_row_stop_the_run(spoiled):
    """Skipped are 2 ... 21, so the state of 22 iterations is saved; it goes on from there once the cause is mended."""
    folder, _, ended = spoiled
    for rank in (0, 1):
        found = load(folder, "diverging", rank)
        assert found["code"] == 1 and found["saved"] == [22]
        assert found["resumed"]["finished"] and found["resumed"]["skipped"] == {"generator": 0, "fake_score": 20}
    diagnosis = (folder / "diverging" / "diagnosis.txt").read_text()
    assert "20 updates in a row of the fake_score" in diagnosis and "stopped at iteration 22" in diagnosis
    assert diagnosis.splitlines()[0] in ended.output[0]
    assert all(
        torch.isfinite(value).all() for value in load_file(folder / "diverging" / "generator.safetensors").values()
    )


def test_data_that_one_rank_cannot_read(spoiled):
    """Both stop with what is done so far, and rank 0 says what rank 1 met."""
    folder, _, ended = spoiled
    assert [torch.load(folder / f"unreadable-rank{rank}.pt") for rank in (0, 1)] == [2, 2]
    assert [path.name for path in (folder / "unreadable" / "checkpoints").glob("iteration-*")] == ["iteration-000002"]
    assert ended.output[0].count("error: train-000000.tar: cannot be read") == 1
