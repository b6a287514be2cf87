"""What a rank learns from Slurm's environment, and the meeting of the ranks before the process group stands."""

import subprocess
import sys

import pytest

from dmd2_fast import rendezvous
from dmd2_fast.errors import UserError
from dmd2_fast.rendezvous import adopt_slurm, first_host

STEP = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "3", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "16", "SLURM_NTASKS_PER_NODE": "8", "SLURM_STEP_NODELIST": "gpu[007,011]",
    "SLURM_JOB_NODELIST": "gpu[001-012]",
}  # fmt: skip


def adopted(**changes):
    environment = {key: value for key, value in {**STEP, **changes}.items() if value is not None}
    before = dict(environment)
    adopt_slurm(environment)
    return {key: value for key, value in environment.items() if before.get(key) != value}


def test_a_task_of_srun():
    assert adopted() == {
        "RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "gpu007",
        "MASTER_PORT": str(15000 + (4711 * 8 + 3) % 15000),
    }  # fmt: skip
    assert adopted(SLURM_STEP_NODELIST=None)["MASTER_ADDR"] == "gpu001"
    named = adopted(MASTER_ADDR="10.0.0.1", MASTER_PORT="29500")
    assert "MASTER_ADDR" not in named and "MASTER_PORT" not in named and named["RANK"] == "9"
    assert all(1024 < int(adopted(SLURM_JOB_ID=str(job))["MASTER_PORT"]) < 32768 for job in (0, 1, 14999, 10**8 + 7))
    # two steps of a job, and two jobs that follow each other, do not share a port
    others = [adopted(SLURM_STEP_ID="4"), adopted(SLURM_JOB_ID="4712"), adopted()]
    assert len({other["MASTER_PORT"] for other in others}) == 3


def test_a_task_that_sees_its_own_gpu_alone():
    assert adopted(CUDA_VISIBLE_DEVICES="1")["LOCAL_RANK"] == "0"
    assert adopted(CUDA_VISIBLE_DEVICES="0,1,2,3")["LOCAL_RANK"] == "1"
    assert adopted(CUDA_VISIBLE_DEVICES="")["LOCAL_RANK"] == "1"


@pytest.mark.parametrize(
    "changes",
    [
        {"SLURM_PROCID": None, "SLURM_LOCALID": None, "SLURM_STEP_ID": None, "SLURM_STEP_NUM_TASKS": None},  # salloc
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_ID": None, "SLURM_STEP_NUM_TASKS": None},  # sbatch
        {"SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "16"},  # an interactive step
        {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash
        {"RANK": "3"},  # torchrun or deepspeed below srun
        dict.fromkeys(STEP),
    ],
)
def test_what_is_no_task_among_several(changes):
    assert adopted(**changes) == {}


def test_no_node_is_named():
    with pytest.raises(UserError, match="export MASTER_ADDR"):
        adopted(SLURM_STEP_NODELIST=None, SLURM_JOB_NODELIST=None)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"), ("a,b", "a"), ("gpu[003-004,9],login", "gpu003"), ("gpu[7,9-12]", "gpu7"),
        ("rack[0-1]n[00-15]", "rack0n00"), ("n[2-3].local,m1", "n2.local"), ("", ""),
    ],
)  # fmt: skip
def test_first_host(nodes, first):
    assert first_host(nodes) == first


# --- the meeting -----------------------------------------------------------------------------------------------------


@pytest.fixture
def port(monkeypatch):
    """This process is rank 0 of two, at a free port; what it keeps between calls is its own."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(rendezvous, "_stores", {})
    monkeypatch.setattr(rendezvous, "_met", False)
    return port


def other_rank(code, monkeypatch):
    """Rank 1, elsewhere."""
    monkeypatch.setenv("RANK", "1")
    process = subprocess.Popen(
        [sys.executable, "-c", f"from dmd2_fast import rendezvous\n{code}"], stderr=subprocess.PIPE, text=True
    )
    monkeypatch.setenv("RANK", "0")
    return process


def test_who_does_not_come_is_named(port, monkeypatch, capsys):
    monkeypatch.setattr(rendezvous, "COLLECTIVE_MINUTES", 0.02)
    monkeypatch.setattr(rendezvous, "NEWS_SECONDS", 0.3)
    with pytest.raises(UserError, match=rf"1 of 2 ranks have come to 127.0.0.1:{port} in .*missing: 1. .*node_rank"):
        rendezvous.meet("gloo")
    assert "waiting: 1 of 2 ranks" in capsys.readouterr().err


def test_rank_0_is_not_there(port, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(rendezvous, "COLLECTIVE_MINUTES", 0.02)
    monkeypatch.setattr(rendezvous, "NEWS_SECONDS", 0.3)
    with pytest.raises(UserError, match=f"rank 0 was not found at 127.0.0.1:{port}.*refused.*firewall"):
        rendezvous.meet("gloo")
    assert f"waiting for rank 0 at 127.0.0.1:{port}" in capsys.readouterr().err
    monkeypatch.setenv("MASTER_ADDR", "nowhere.invalid")
    with pytest.raises(UserError, match=r"nowhere\.invalid .* is not known"):
        rendezvous.meet("gloo")


def test_a_rank_that_cannot_start_tells_the_others(port, monkeypatch):
    other = other_rank("rendezvous.tell('no folder x')", monkeypatch)
    with pytest.raises(UserError, match=r"no folder x\n\(met by rank 1, on "):
        rendezvous.meet("gloo")
    rendezvous.tell("which it has heard")  # as failures.exit_code does: does not wait for rank 1, which has left
    assert other.wait(30) == 0


def test_rank_0_stays_until_the_others_have_heard(port, monkeypatch):
    code = """if True:
        try:
            rendezvous.meet("gloo")
        except Exception as error:
            rendezvous.tell("x")
            raise SystemExit(error)
    """
    other = other_rank(code, monkeypatch)
    rendezvous.tell("no folder y")
    assert "no folder y\n(met by rank 0" in other.communicate(timeout=30)[1] and other.returncode == 1


def test_a_store_of_the_others_to_build_on(port, monkeypatch):
    other = other_rank("rendezvous.meet('nccl').set('from', 'rank 1'); rendezvous.tell('too late')", monkeypatch)
    store = rendezvous.meet("nccl")
    assert store.get("from") == b"rank 1"
    assert other.wait(30) == 0 and not rendezvous._stores[0].check(["failed"])
