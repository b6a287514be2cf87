"""Two nodes, started in the ways of docs/multinode.md: what they train, and how they end when something is wrong."""

import json
import os
import shutil
import stat
import sys
import time

import nodes
import pytest
from nodes import ADDRESSES, NAMES, ROOT, deepspeed, finish, two_nodes
from plain_loop import plain_run, prepare, worst_loss, write_config

from dmd2_fast.runs import read_metrics

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(reason := nodes.why_not(), reason=str(reason)),
]
LOSS = 1e-4
TRAIN = str(ROOT / "train.py")
IMPATIENT = """import sys
import dmd2_fast.failures
dmd2_fast.failures.PATIENCE_SECONDS = 1.0
from dmd2_fast.trainer import main
sys.exit(main())
"""
PDSH = """#!{python}
# What pdsh does: the words of the command, joined, to a shell on each host, %n the host's number; -S: the largest code.
import subprocess, sys
assert sys.argv[1:3] == ["-S", "-f"] and sys.argv[4] == "-w", sys.argv
hosts, words = sys.argv[5].split(","), " ".join(sys.argv[6:])
login = ["env", "-i", "HOME={home}", "PATH=/usr/bin:/bin", "bash", "-c"]
started = [subprocess.Popen([*{enter}[host], *login, words.replace("%n", str(n))]) for n, host in enumerate(hosts)]
sys.exit(max(process.wait() for process in started))
"""
SSH = """#!{python}
import os, sys
host, *command = [word for word in sys.argv[1:] if word not in ("-o", "PasswordAuthentication=no")]
os.execvp("nsenter", [*{enter}[host], *command])
"""
SRUN = """#!{python}
# What srun does: a task on each node, told who it is by these variables.
import os, subprocess, sys
assert sys.argv[1:3] == ["-n", "2"] and sys.argv[3].startswith("--export=ALL"), sys.argv
exported = dict(word.split("=", 1) for word in sys.argv[3].split(",")[1:])
started = []
for n, host in enumerate({enter}):
    task = dict(SLURM_PROCID=n, SLURM_LOCALID=0, SLURM_NODEID=n, SLURM_NTASKS=2, SLURM_STEP_NUM_TASKS=2,
                SLURM_STEP_ID=0, SLURM_JOB_ID=4711, SLURM_STEP_NODELIST="node[0-1]")
    env = os.environ | exported | {{key: str(value) for key, value in task.items()}}
    started.append(subprocess.Popen([*{enter}[host], *sys.argv[4:]], env=env))
sys.exit(max(process.wait() for process in started))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The nodes' common disk: data, teacher, hostfile, and what a fresh login lacks."""
    folder = tmp_path_factory.mktemp("nodes")
    prepare(folder)
    (folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in NAMES))
    (folder / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\nGLOO_SOCKET_IFNAME=eth0\n")
    return folder


@pytest.fixture(scope="module")
def pair(folder):
    with two_nodes(folder) as pair:
        tools(folder, pair)
        yield pair


def tools(folder, pair):
    """Stand-ins for pdsh, ssh, srun in bin/, which reach the two nodes."""
    (folder / "bin").mkdir(exist_ok=True)
    enter = {node.name: node.enter() for node in pair}
    for name, text in (("pdsh", PDSH), ("ssh", SSH), ("srun", SRUN), ("sinfo", "#!/bin/sh\n")):
        path = folder / "bin" / name
        path.write_text(text.format(python=sys.executable, enter=enter, home=folder))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)


def config_for(folder, name, iterations=3):
    # eps: at 1e-8, Adam turns the rounding errors of gradients that are zero but for rounding into full steps.
    network = {"optimizer": {"params": {"eps": 1e-5}}}
    run = {"iterations": iterations, "num_samples": 20}
    return write_config(folder, name, 2, generator=network, fake_score=network, run=run, data={"loader": "plain"})[1]


def no_ssh(pair, *arguments, **variables):
    """The same command on each node but for its number."""
    options = ["--quiet", "--hostfile", "hostfile", "--no_ssh", "--master_addr", NAMES[0]]
    return [
        node.start(*deepspeed(*options, "--node_rank", str(node.number), TRAIN, *arguments), **variables)
        for node in pair
    ]


def srun(node, *command, **variables):
    """This node's task of two."""
    task = {"PROCID": str(node.number), "LOCALID": "0", "STEP_NUM_TASKS": "2", "STEP_ID": "0"}
    task["STEP_NODELIST"] = "node[0-1]"
    return node.start(*command, **{f"SLURM_{name}": value for name, value in task.items()}, **variables)


def elsewhere(folder, *command):
    """A command on neither node, as on a login node, with the stand-ins on its PATH."""
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    return nodes.start(list(command), folder, "login", PATH=path)


def messages(output):
    return [line for line in output.splitlines() if line.startswith("error")]


def refused(ended, *words):
    """Every node ended with 2 and said once what is wrong."""
    for code, output in ended:
        assert code == 2 and "Traceback" not in output, output
        assert len(messages(output)) == 1, output
        for word in words:
            assert word in output


@pytest.fixture(scope="module")
def expected(folder):
    return plain_run(config_for(folder, "plain"), 3).losses


def check_losses(folder, name, expected):
    """The run equals one plain process of the whole batch, so it equals two ranks of one node (test_equality.py)."""
    assert worst_loss(read_metrics(folder / name / "metrics.jsonl"), expected) < LOSS
    assert (folder / name / "summary.json").exists() or (folder / name / "report.html").exists()


def test_no_ssh(folder, pair, expected):
    config_for(folder, "no-ssh")
    ended = finish(no_ssh(pair, "--config", "no-ssh.json"), 120)
    assert [code for code, _ in ended] == [0, 0], ended
    assert "4 a forward x 1 accumulated x 2 rank(s)" in ended[0][1] and "global batch" not in ended[1][1]
    check_losses(folder, "no-ssh", expected)


def test_a_hostfile_and_pdsh(folder, pair, expected):
    """From a third machine: the nodes get .deepspeed_env and nothing else, node0's address is its `hostname -I`."""
    config_for(folder, "pdsh")
    command = deepspeed("--quiet", "--hostfile", "hostfile", TRAIN, "--config", "pdsh.json")
    ((code, output),) = finish([elsewhere(folder, *command)], 120)
    assert code == 0, output
    check_losses(folder, "pdsh", expected)


def test_slurm(folder, pair):
    """DeepSpeed's --launcher slurm calls srun: no RANK, no MASTER_ADDR. A batch that two ranks cannot share."""
    config_for(folder, "slurm")
    config = json.loads((folder / "slurm.json").read_text())
    (folder / "slurm.json").write_text(json.dumps(config | {"train_batch_size": 9}))
    command = deepspeed(
        "--quiet", "--hostfile", "hostfile", "--launcher", "slurm", TRAIN, "--config", "slurm.json"
    )  # fmt: skip
    ((code, output),) = finish([elsewhere(folder, *command)], 60)
    assert code == 2 and "Traceback" not in output
    assert len(messages(output)) == 2 and output.count("train_batch_size") >= 2, output


def test_what_one_node_lacks_ends_both(folder, pair):
    """The teacher's folder is empty on node1, as on a disk of its own; node0 alone would wait for it."""
    config_for(folder, "lacking")
    empty = folder / "empty"
    empty.mkdir()
    pair[1].run("mount", "--bind", str(empty), str(folder / "teacher"))
    try:
        refused(finish(no_ssh(pair, "--config", "lacking.json"), 60), "teacher", "denoiser.json")
    finally:
        pair[1].run("umount", str(folder / "teacher"))
    assert not (folder / "lacking").exists()


def test_a_wrong_key(folder, pair):
    config_for(folder, "wrong")
    command = [sys.executable, TRAIN, "--config", "wrong.json", "--set", "run.itertions=4"]
    refused(finish([srun(node, *command) for node in pair], 60), 'did you mean "iterations"')
    assert not (folder / "wrong").exists()


def test_a_host_name_that_stands_for_loopback(folder):
    """Debian's 127.0.1.1: named before any connection is tried, where gloo would try until its timeout."""
    code = "from dmd2_fast.rendezvous import *; adopt_slurm(); meet('gloo')"
    with two_nodes(folder, hosts=f"127.0.0.1 localhost\n127.0.1.1 {' '.join(NAMES)}\n") as pair:
        started = [srun(node, sys.executable, "-c", code, MASTER_ADDR=ADDRESSES[0]) for node in pair]
        for code, output in finish(started, 60):
            assert code == 1 and "the host name of node0, node1 stands for a loopback address" in output, output


def test_a_node_that_dies_ends_the_other(folder):
    """Started as srun does; node1 is switched off in the middle."""
    config = config_for(folder, "dying", iterations=100_000)
    with two_nodes(folder) as pair:
        started = [srun(node, sys.executable, "-c", IMPATIENT, "--config", "dying.json") for node in pair]
        metrics = folder / "dying" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while len(read_metrics(metrics)) < 2:
            assert time.monotonic() < deadline and started[0].process.poll() is None, started[0].output()
            time.sleep(0.1)
        pair[1].kill()
        ((code, output),) = finish(started[:1], 20)
    assert code == 3 and "Traceback" not in output, output
    assert len(messages(output)) == 1 and "the connection to another rank is lost" in output
    shutil.rmtree(config.run.folder)
