"""One writer a folder: a lock that the kernel releases when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
import weakref
from pathlib import Path

from dmd2_fast.errors import RunFolderError

WAIT_SECONDS = 60.0
POLL_SECONDS = 0.2
_NO_LOCKS_HERE = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class Lock:
    """A held lock file; `release`, the end of a `with` block or of the process gives it up and removes the file."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.release = weakref.finalize(self, _release, path, descriptor)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _is_file(path: Path, descriptor: int) -> bool:
    """Whether the file that is open is still the one of that name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def _release(path: Path, descriptor: int) -> None:
    if _is_file(path, descriptor):
        with contextlib.suppress(OSError):
            path.unlink()
    os.close(descriptor)


def acquire(path: str | Path, what: str, wait: float = WAIT_SECONDS) -> Lock:
    """Hold the lock file at `path`, whose folder is made; a process that is just finishing is waited for.

    `what` is the folder's name in the messages. Raises RunFolderError when another process still holds the lock after
    `wait` seconds, and OSError when the file cannot be written. A file system without locks gets a warning.
    """
    path = Path(path).absolute()
    deadline, told = time.monotonic() + wait, False
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", error.filename) from None
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_file(path, descriptor):
                break
            os.close(descriptor)  # its last holder has removed or moved it meanwhile
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            if time.monotonic() >= deadline:
                raise RunFolderError(
                    f"{what} is in use by {holder}, which still runs: wait for it, stop it, or use another folder."
                ) from None
            if not told:
                print(f"{what} is in use by {holder}: waiting up to {wait:.0f} s", file=sys.stderr, flush=True)
            told = True
            time.sleep(POLL_SECONDS)
        except OSError as error:
            if error.errno not in _NO_LOCKS_HERE:
                os.close(descriptor)
                raise
            print(f"{what}: no file locks here ({error.strerror}); start only one process on it", file=sys.stderr)
            break
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return Lock(path, descriptor)
