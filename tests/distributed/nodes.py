"""Two nodes on one machine: namespaces of network, host name, processes and mounts, joined by one virtual cable.

Each pair of namespaces lives as long as its first process, which dies with the test's: the kernel then ends every
process in it and removes its network, whatever happened.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ranks import TESTS, environment

ROOT = TESTS.parent
NAMES, ADDRESSES = ("node0", "node1"), ("10.77.0.1", "10.77.0.2")
FLAGS = ("--net", "--uts", "--pid", "--mount")


def why_not() -> str | None:
    """Why no nodes can be made here, or None."""
    if missing := [tool for tool in ("ip", "unshare", "nsenter") if shutil.which(tool) is None]:
        return f"needs {', '.join(missing)} (packages iproute2, util-linux)"
    cable = ["ip", "link", "add", "name", "a", "type", "veth", "peer", "name", "b"]
    probe = ["unshare", *FLAGS, "--fork", "--mount-proc", *cable]
    done = subprocess.run(probe, capture_output=True, text=True)
    words = (done.stderr.strip().splitlines() or [""])[-1]
    return f"network namespaces cannot be made here: {words}" if done.returncode else None


class Started(NamedTuple):
    """A process and the file that takes what it prints."""

    process: subprocess.Popen
    log: Path

    def output(self) -> str:
        return self.log.read_text(errors="replace")


def start(command: list[str], folder: Path, name: str, **variables: str) -> Started:
    """A process in `folder` with the tests' environment; `name` is part of its output's."""
    env = environment(HOME=str(folder), TORCH_CPP_LOG_LEVEL="ERROR", **variables)
    log = Path(tempfile.mkstemp(prefix=f"output-{name}-", suffix=".txt", dir=folder)[1])
    with log.open("wb") as file:
        return Started(subprocess.Popen(command, env=env, cwd=folder, stdout=file, stderr=subprocess.STDOUT), log)


class Node:
    """One of the two; `start` runs a command on it as a shell there would."""

    def __init__(self, number: int, folder: Path, hosts: str):
        self.number, self.name, self.folder = number, NAMES[number], folder
        self.hosts = folder / f"hosts-{self.name}"
        self.hosts.write_text(hosts)
        script = (
            f"hostname {self.name} && mount --bind {self.hosts} /etc/hosts && ip link set lo up && echo up && exec cat"
        )
        # cat ends with the pipe from this process, if the signal of its parent's death should not come
        self.first = subprocess.Popen(
            ["unshare", *FLAGS, "--fork", "--kill-child", "--mount-proc", "sh", "-c", script],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.first.stdout.readline() == "up\n"
        self.pid = int(Path(f"/proc/{self.first.pid}/task/{self.first.pid}/children").read_text())

    def enter(self, *command: str) -> list[str]:
        """The command line that runs a command in here."""
        return ["nsenter", "--target", str(self.pid), *FLAGS, f"--wd={self.folder}", *command]

    def run(self, *command: str) -> None:
        subprocess.run(self.enter(*command), check=True)

    def start(self, *command: str, **variables: str) -> Started:
        """A process on this node, in `folder`."""
        return start(self.enter(*command), self.folder, self.name, **variables)

    def kill(self) -> None:
        """As a machine that is switched off: nothing in here runs any more."""
        self.first.kill()
        self.first.communicate()


@contextmanager
def two_nodes(folder: Path, hosts: str | None = None) -> Iterator[tuple[Node, Node]]:
    """node0 and node1, 10.77.0.1 and .2, whose common disk is this machine's; `hosts` is their /etc/hosts."""
    hosts = hosts or "127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for a, n in zip(ADDRESSES, NAMES, strict=True))
    nodes: list[Node] = []
    try:
        for number in (0, 1):
            nodes.append(Node(number, folder, hosts))
        ends = [["eth0", "netns", str(node.pid)] for node in nodes]
        subprocess.run(["ip", "link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1]], check=True)
        for node, address in zip(nodes, ADDRESSES, strict=True):
            node.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
            node.run("ip", "link", "set", "eth0", "up")
        yield nodes[0], nodes[1]
    finally:
        for node in nodes:
            node.kill()


def finish(started: list[Started], timeout: float) -> list[tuple[int, str]]:
    """(exit code, output) of each; a hang fails with what they printed. `two_nodes` ends what is left."""
    deadline = time.monotonic() + timeout
    for one in started:
        try:
            one.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            tails = "\n---\n".join(other.output()[-3000:] for other in started)
            raise AssertionError(f"not done after {timeout:.0f} s\n{tails}") from None
    return [(one.process.returncode, one.output()) for one in started]


def deepspeed(*arguments: str) -> list[str]:
    return [sys.executable, str(Path(sys.executable).with_name("deepspeed")), *arguments]
