"""Stopping on request: SIGTERM, SIGINT (Ctrl-C), SIGHUP (a closed terminal), and a launcher that has gone.

Until the process group stands, a signal has its default action: nothing has been written yet, and a rank that waits for
the others inside C++ could not answer in any other way. From then on `StopSignals` takes them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXIT_STOPPED = 128 + signal.SIGTERM
WATCH_SECONDS = 0.5
LAUNCH_MODULE = "deepspeed.launcher.launch"
RUNNERS = ("deepspeed", "deepspeed.pt", "ds", "runner.py", "deepspeed.launcher.runner")


class StopRequested(BaseException):
    """A request to stop, met where there is nothing to save. Not an Exception, as KeyboardInterrupt is none."""


class StopSignals:
    """Notes that a stop was asked for; inside `at_once` it raises `StopRequested` there and then."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._at_once = False
        self._listener: Callable[[], None] | None = None
        self._before: dict[int, Any] = {}
        self._terminal = [fd for fd in (1, 2) if os.isatty(fd)]

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.number is not None

    def listen(self) -> None:
        """Take the signals from here on. Main thread only."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # nohup ignores SIGHUP, and a shell's background jobs SIGINT: both mean "go on".
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Give the signals back."""
        while self._before:
            signal.signal(*self._before.popitem())

    def default(self) -> None:
        """From here on a signal ends the process, without a word."""
        for number in self._before:
            signal.signal(number, signal.SIG_DFL)

    def tell(self, listener: Callable[[], None]) -> None:
        """Call `listener` when a stop is asked for, at once when it has been."""
        self._listener = listener
        if self.requested:
            listener()

    @contextlib.contextmanager
    def at_once(self, active: bool = True) -> Iterator[None]:
        """A request inside, or one not yet met, ends the block with `StopRequested`."""
        self._at_once = active
        try:
            if active and self.requested:
                raise StopRequested
            yield
        finally:
            self._at_once = False

    def _handle(self, number: int, _frame: Any) -> None:
        self.number = number
        if number == signal.SIGINT:  # a second Ctrl-C ends the run at once; the launcher passes the first on as SIGTERM
            signal.signal(number, signal.SIG_DFL)
        if number == signal.SIGHUP:  # writing to a terminal that has gone is an error
            with open(os.devnull, "w") as nowhere:
                for descriptor in self._terminal:
                    os.dup2(nowhere.fileno(), descriptor)
        if self._listener is not None:
            self._listener()
        if self._at_once:
            self._at_once = False  # a second signal must not break the cleaning up
            raise StopRequested


@dataclass(frozen=True)
class Process:
    """A process; its start time tells it from a later one of the same number."""

    pid: int
    parent: int
    started: str

    @classmethod
    def find(cls, pid: int) -> Process | None:
        """The living process of this number, or None."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (OSError, UnicodeDecodeError):
            return None
        # proc(5): state, parent, ... counted from behind the name, which may hold spaces and brackets.
        return None if fields[0] in "ZX" else cls(pid, int(fields[1]), fields[19])

    def is_alive(self) -> bool:
        now = Process.find(self.pid)
        return now is not None and now.started == self.started

    def command(self) -> list[str]:
        """Its command line."""
        try:
            return Path(f"/proc/{self.pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
        except OSError:
            return []


def launchers() -> list[Process]:
    """The processes of `deepspeed` that this rank depends on; empty under torchrun, plain python or another launcher.

    launch.py starts the ranks of a node and waits for them. On a single node, and with --no_ssh, `deepspeed` itself
    waits for launch.py, and has no handler for signals: SIGTERM ends it alone, and would leave the ranks training
    unnoticed.
    """
    parent = Process.find(os.getppid()) if "LOCAL_RANK" in os.environ else None
    if parent is None or LAUNCH_MODULE not in parent.command():
        return []
    runner = Process.find(parent.parent)
    words = [Path(word).name for word in runner.command()[:4]] if runner is not None else []
    if runner is not None and any(word in RUNNERS for word in words):
        return [parent, runner]
    return [parent]


def watch_launchers() -> None:
    """Send this process SIGTERM when its launcher ends before it."""
    watched = launchers()

    def watch() -> None:
        while all(process.is_alive() for process in watched):
            time.sleep(WATCH_SECONDS)
        if os.environ.get("LOCAL_RANK") == "0":
            with contextlib.suppress(OSError, ValueError):
                print("the deepspeed launcher has ended: stopping too", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    if watched:
        threading.Thread(target=watch, name="launcher-watch", daemon=True).start()
