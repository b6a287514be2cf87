"""Start N ranks of worker.py on this machine and wait for them, never longer than a limit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
TERMINATE_AFTER, KILL_AFTER = 5.0, 35.0
"""Seconds after a rank has ended badly: the launcher, too, ends the others, first with SIGTERM."""


@dataclass
class Finished:
    """How each rank ended: exit codes (negative: a signal), and all it printed."""

    codes: list[int]
    output: list[str]
    seconds: float


def environment(**extra: str) -> dict[str, str]:
    values = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    values["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS / "distributed")])
    return {
        **values,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "PYTHONWARNINGS": "ignore::FutureWarning",
        **extra,
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(
    folder: Path, *arguments: str, world_size: int = 2, timeout: float = 150, port: int | None = None
) -> Finished:
    """`worker.py ARGUMENTS` on every rank. When one ends badly, the others are ended as the launcher would.

    AssertionError with the output when the ranks are not done in `timeout` seconds: a hang fails.
    """
    port, start, processes, logs = port or free_port(), time.monotonic(), [], []
    for rank in range(world_size):
        log = folder / f"output-{arguments[0]}-{port}-rank{rank}.txt"
        logs.append(log)
        env = environment(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        command = [sys.executable, str(TESTS / "distributed" / "worker.py"), *arguments]
        with log.open("wb") as file:
            processes.append(subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT, cwd=folder))
    hung = not wait_for(processes, start + timeout)
    codes = [process.returncode for process in processes]
    output = [log.read_text(errors="replace") for log in logs]
    if hung:
        tails = "\n".join(f"--- rank {rank}\n{text[-3000:]}" for rank, text in enumerate(output))
        raise AssertionError(f"worker.py {' '.join(arguments)}: not done after {timeout:.0f} s\n{tails}")
    return Finished(codes, output, time.monotonic() - start)


def wait_for(processes: list[subprocess.Popen], deadline: float) -> bool:
    """Wait for all; False when some had to be killed."""
    failed_at, terminated = None, False
    while alive := [process for process in processes if process.poll() is None]:
        now = time.monotonic()
        if failed_at is None and any(process.returncode not in (None, 0) for process in processes):
            failed_at = now
        if failed_at is not None and now > failed_at + TERMINATE_AFTER and not terminated:
            terminated = True
            for process in alive:
                process.terminate()
        if now > deadline or (failed_at is not None and now > failed_at + KILL_AFTER):
            for process in alive:
                process.kill()
                process.wait()
            return False
        time.sleep(0.05)
    return True
