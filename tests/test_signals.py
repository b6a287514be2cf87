"""Stopping: signals to the trainer, to its launcher, at every stage; one process a folder."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny import ROOT, on_one_core

from dmd2_fast import stopping
from dmd2_fast.errors import RunFolderError
from dmd2_fast.locks import acquire
from dmd2_fast.runs import LOCK_FILE, RunFolder, read_metrics
from dmd2_fast.stopping import Process, StopRequested, StopSignals, launchers

PATIENCE = 240.0
SETTINGS = ("--config", "c.json", "--set", "run.iterations=100000")


def until(condition, *processes):
    """Wait for something to come true while these processes live."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        for process in processes:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.05)


@pytest.fixture
def start():
    """Starts a command in a session of its own; what is left of it at the end is killed."""
    started = []

    def start(*command, **options):
        process = subprocess.Popen(
            on_one_core(list(map(str, command))), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def end_of(process):
    """(exit code, stdout, stderr) of a process that is about to end."""
    out, err = process.communicate(timeout=PATIENCE)
    assert "Traceback" not in err, err
    return process.returncode, out, err


def iterations(folder):
    return [record["iteration"] for record in read_metrics(folder / "run" / "metrics.jsonl")]


def nothing_half_written(folder):
    return not [path for path in folder.rglob("*") if path.name.endswith(".tmp") or path.name == LOCK_FILE]


def in_the_group(leader):
    """Living processes of a process group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (process := Process.find(int(entry.name))):
            try:
                if os.getpgid(process.pid) == leader:
                    found.append(process)
            except ProcessLookupError:
                continue
    return found


# --- the trainer -----------------------------------------------------------------------------------------------------


def test_sigterm_saves_and_the_folder_belongs_to_one_process(world, start):
    first = start(sys.executable, ROOT / "train.py", *SETTINGS)
    until(lambda: len(iterations(world)) >= 2, first)
    began = time.monotonic()
    with pytest.raises(RunFolderError, match=rf"run is in use by process {first.pid} on .*wait for it"):
        acquire(world / "run" / LOCK_FILE, "run", wait=0.5)
    assert 0.5 <= time.monotonic() - began < 10
    first.send_signal(signal.SIGTERM)
    code, out, err = end_of(first)
    saved = RunFolder(world / "run").latest_checkpoint()[0]
    assert code == 143 and f"stopped at iteration {saved}" in out and err.count("\n") < 10, err
    assert saved == max(iterations(world)) and nothing_half_written(world)
    acquire(world / "run" / LOCK_FILE, "run", wait=0).release()

    # Ctrl-C, which the terminal sends to the whole group; this start resumes.
    second = start(sys.executable, ROOT / "train.py", *SETTINGS)
    until(lambda: max(iterations(world)) > saved, second)
    os.killpg(second.pid, signal.SIGINT)
    code, out, err = end_of(second)
    assert code == 143 and f"resuming at iteration {saved}" in out
    assert RunFolder(world / "run").latest_checkpoint()[0] == max(iterations(world)) > saved
    assert nothing_half_written(world)


def test_sigterm_to_the_deepspeed_command_stops_both_ranks(world, start):
    """Its process dies at once and nobody tells the ranks; they notice, save and leave."""
    deepspeed = Path(sys.executable).with_name("deepspeed")
    process = start(
        deepspeed, "--num_accelerators", "2", "--master_port", "29618", ROOT / "train.py", *SETTINGS
    )  # fmt: skip
    until(lambda: len(iterations(world)) >= 1, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == -signal.SIGTERM
    until(lambda: not in_the_group(process.pid))
    out, err = process.communicate()
    assert "the deepspeed launcher has ended" in err and "Traceback" not in err, err
    saved, folder = RunFolder(world / "run").latest_checkpoint()
    assert f"stopped at iteration {saved}" in out and saved == max(iterations(world))
    assert len(list(folder.glob("rank*.safetensors"))) == 2 and nothing_half_written(world)


def test_sigterm_during_start_up_and_during_the_evaluation(world, start):
    command = (sys.executable, ROOT / "train.py", "--config", "c.json", "--set", "run.iterations=1")
    first = start(*command)
    until((world / "run" / "config.json").exists, first)
    first.send_signal(signal.SIGTERM)
    code, _, _ = end_of(first)
    assert code == 143 and nothing_half_written(world)

    second = start(*command, "--set", "run.num_samples=50000")
    until((world / "run" / "generator.safetensors").exists, second)
    until(lambda: not any((world / "run" / "checkpoints").glob("*.tmp")), second)
    time.sleep(0.5)
    second.send_signal(signal.SIGTERM)
    code, _, err = end_of(second)
    assert code == 143 and "goes on" in err
    assert nothing_half_written(world) and not (world / "run" / "summary.json").exists()

    third = start(*command, "--set", "run.num_samples=20")
    code, out, _ = end_of(third)
    assert code == 0 and "trained already" in out and (world / "run" / "summary.json").exists()


# --- the teacher -----------------------------------------------------------------------------------------------------


def test_a_teacher_that_is_stopped_leaves_no_folder(world, start):
    lock = world / ".new.lock"
    command = (sys.executable, "-m", "dmd2_fast.cli", "teacher", "--config", "c.json", "--set", "model.path=new")
    for number in (signal.SIGKILL, signal.SIGTERM):  # the second start is not kept out by the first one's lock file
        began = lock.stat().st_mtime_ns if lock.exists() else 0
        process = start(*command, "--set", "teacher.training.iterations=1000000")
        until(lambda began=began: lock.exists() and lock.stat().st_mtime_ns > began, process)
        time.sleep(0.5)
        process.send_signal(number)
        process.wait(60)
        assert process.returncode == (143 if number == signal.SIGTERM else -number)
        assert not (world / "new").exists() and not (world / "new.tmp").exists()
    assert not lock.exists()


# --- the parts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def stop():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    stop = StopSignals()
    stop.listen()
    yield stop
    stop.restore()
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_request_waits_for_a_listener_and_ends_a_block_at_once(stop):
    told = []
    signal.raise_signal(signal.SIGTERM)
    assert stop.requested
    stop.tell(lambda: told.append(1))
    signal.raise_signal(signal.SIGHUP)
    assert told == [1, 1]
    with pytest.raises(StopRequested), stop.at_once():
        pytest.fail("the request came before")
    with stop.at_once(False):
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_ends_a_block_and_a_second_one_lets_it_clean_up(stop):
    cleaned = []
    with pytest.raises(StopRequested), stop.at_once():
        try:
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("it went on")
        finally:
            signal.raise_signal(signal.SIGTERM)
            cleaned.append(1)
    assert cleaned == [1]


def test_the_second_ctrl_c_is_final_and_nohup_is_heeded():
    code = (
        "import signal; from dmd2_fast.stopping import StopSignals; s = StopSignals(); s.listen(); "
        "signal.raise_signal(signal.SIGHUP); print(s.requested, flush=True); signal.raise_signal(signal.SIGINT); "
        "print(s.requested, flush=True); signal.raise_signal(signal.SIGINT); print('alive')"
    )
    done = subprocess.run(["nohup", sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout.split() == ["False", "True"] and done.returncode == -signal.SIGINT


def test_a_process_is_told_from_a_later_one_and_from_a_zombie():
    me = Process.find(os.getpid())
    assert me.is_alive() and me.parent == os.getppid() and Path(me.command()[0]).name.startswith("python")
    assert not Process(me.pid, me.parent, "1").is_alive()
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not reaped
    assert Process.find(child.pid) is None
    child.wait()
    assert Process.find(child.pid) is None


def test_only_deepspeeds_own_launchers_are_watched(monkeypatch, tmp_path):
    """A rank below launch.py below `deepspeed`, then each of the two replaced by something else."""
    assert launchers() == []
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert launchers() == []  # pytest, as torchrun, is no launch.py

    monkeypatch.setattr(stopping, "LAUNCH_MODULE", "pytest-stand-in")
    assert launchers() == []

    family = {1: Process(1, 0, "0"), 20: Process(20, 1, "5"), 30: Process(30, 20, "6")}
    commands = {}
    monkeypatch.setattr(stopping.os, "getppid", lambda: 30)
    monkeypatch.setattr(Process, "find", classmethod(lambda cls, pid: family.get(pid)))
    monkeypatch.setattr(Process, "command", lambda self: commands.get(self.pid, []))
    monkeypatch.setattr(stopping, "LAUNCH_MODULE", "deepspeed.launcher.launch")
    launch = ["python", "-u", "-m", "deepspeed.launcher.launch"]
    commands[20], commands[30] = ["python", "/bin/deepspeed", "train.py"], launch
    assert [process.pid for process in launchers()] == [30, 20]
    for parent in (["bash", "-c", "deepspeed train.py"], ["sshd"], []):  # its death says nothing
        commands[20] = parent
        assert [process.pid for process in launchers()] == [30]
    commands[20] = ["python", "/bin/deepspeed", "--no_ssh", "train.py"]
    assert [process.pid for process in launchers()] == [30, 20]
    commands[30] = ["python", "-m", "torch.distributed.run"]
    assert launchers() == []


def test_the_watch_sends_sigterm_when_a_launcher_ends(stop, monkeypatch):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(stopping, "launchers", lambda: [Process.find(child.pid)])
    monkeypatch.setattr(stopping, "WATCH_SECONDS", 0.05)
    stopping.watch_launchers()
    time.sleep(0.3)
    assert not stop.requested
    child.kill()
    child.wait()
    until(lambda: stop.requested)
    for thread in threading.enumerate():
        if thread.name == "launcher-watch":
            thread.join(5)


def test_a_lock_file_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("content")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic links"):
        acquire(tmp_path / ".lock", "a", wait=0)
    assert (tmp_path / "precious").read_text() == "content"


def test_a_lock_is_waited_for_and_then_taken(tmp_path, capsys):
    held = acquire(tmp_path / "a" / ".lock", "a")
    threading.Timer(0.7, held.release).start()
    second = acquire(tmp_path / "a" / ".lock", "a", wait=30)
    assert capsys.readouterr().err.count("waiting up to 30 s") == 1
    assert (tmp_path / "a" / ".lock").exists()  # its own, not the one that the first holder has removed
    with pytest.raises(RunFolderError):
        acquire(tmp_path / "a" / ".lock", "a", wait=0)
    del second
    assert not (tmp_path / "a" / ".lock").exists()
