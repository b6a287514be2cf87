"""The run folder: created, resumed or moved aside; its files written whole or not at all.

One process (rank 0) writes. A folder is a run folder when it holds config.json, which is written before anything else.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dmd2_fast.config import Config, config_from_dict
from dmd2_fast.config_parse import SECTION, read_json_object, show
from dmd2_fast.errors import ConfigError, RunFolderError
from dmd2_fast.locks import WAIT_SECONDS, Lock, acquire

HARMLESS_KEYS = (
    f"{SECTION}.run.folder",  # the folder may have been moved
    f"{SECTION}.run.log_interval",
    f"{SECTION}.run.checkpoint_interval",
    f"{SECTION}.run.keep_checkpoints",
    f"{SECTION}.run.sample_interval",
    f"{SECTION}.run.sample_prompts",
    f"{SECTION}.run.num_samples",
    f"{SECTION}.run.progress",
    f"{SECTION}.run.gather",  # where the weights are, not what is computed with them
    f"{SECTION}.data.loader",  # both loaders give the same batches
    f"{SECTION}.data.num_threads",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "log_level",
    "comms_logger",
    "flops_profiler",
    "tensorboard",
    "wandb",
    "comet",
    "csv_monitor",
)
"""Settings that may change between the parts of one run: what is trained does not depend on them.

`run.iterations` is not among them: a cosine schedule ends at the last iteration, so that another number gives every
later iteration another learning rate. With constant schedules on both networks it may change.
"""

METADATA_FILE = "generator.json"
"""In an exported folder: what the metadata of generator.safetensors are in a run's."""
LOCK_FILE = ".lock"
"""In a run folder while a process trains there."""

_ABSENT = object()
_CHECKPOINT = re.compile(r"iteration-(\d+)")


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A name to write to, which becomes `path` at the end of the block; a block that fails leaves nothing behind."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's umask leaves; safetensors makes its files private
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Write a file so that a reader, or a crash, finds the old content or the new and never a part. Raises OSError."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


def _finite(value: Any) -> Any:
    """The value with non-finite numbers as null: JSON has no NaN, and a curve shows a gap there."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def write_json(path: str | Path, value: Any) -> None:
    """`write_atomic` of indented JSON; non-finite numbers become null."""
    write_atomic(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file; empty when it is missing, unreadable or something else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in file order; a line torn by a crash is left out, a missing file is empty."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    records = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        iteration = record.get("iteration") if isinstance(record, dict) else None
        if isinstance(iteration, (int, float)) and not isinstance(iteration, bool) and abs(iteration) < 2**63:
            records.append(record)
    return records


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flatten(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _shown(value: Any) -> str:
    return "(absent)" if value is _ABSENT else show(value)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(dotted key, old, new) of every setting that differs, values as JSON text, in the new order."""
    before, after = dict(_flatten(dict(old))), dict(_flatten(dict(new)))
    keys = [*after, *(key for key in before if key not in after)]
    text = {key: (before.get(key, _ABSENT), after.get(key, _ABSENT)) for key in keys}
    return [
        (key, _shown(pair[0]), _shown(pair[1]))
        for key, pair in text.items()
        if pair[0] is _ABSENT or pair[1] is _ABSENT or pair[0] != pair[1]
    ]


def is_run_folder(folder: str | Path) -> bool:
    """Whether a run has been started there."""
    return (Path(folder) / "config.json").is_file()


def load_run_config(folder: str | Path, world_size: int = 1) -> Config:
    """The configuration a run was started with. Raises RunFolderError."""
    folder = Path(folder)
    if not is_run_folder(folder):
        raise RunFolderError(f"{folder} is no run folder: it has no config.json. Start one with train.py --config.")
    try:
        return config_from_dict(read_json_object(folder / "config.json"), world_size)
    except ConfigError as error:
        raise RunFolderError(f"{folder}: its config.json is not usable: {error}") from None


class RunFolder:
    """Names and upkeep of one run's files. Build it with `open_run`."""

    def __init__(self, path: str | Path, resumed: bool = False, lock: Lock | None = None) -> None:
        self.path = Path(path)
        self.lock = lock
        """Held by the one process that writes, until this object goes."""
        self.resumed = resumed
        """Whether the folder held a run of this configuration before."""

    @property
    def metrics(self) -> Path:
        """metrics.jsonl, one object a log interval."""
        return self.path / "metrics.jsonl"

    @property
    def grids(self) -> Path:
        """Folder of the fixed-noise sample grids."""
        return self.path / "grids"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def grid(self, iteration: int) -> Path:
        """The PNG of an iteration's grid; makes its folder."""
        self.grids.mkdir(exist_ok=True)
        return self.grids / f"iteration-{iteration:06d}.png"

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl in one write."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(record), allow_nan=False) + "\n")

    def truncate_metrics(self, first_iteration: int) -> None:
        """Drop the lines from `first_iteration` on, which is about to run again, and a torn last line."""
        if self.metrics.exists():
            kept = [record for record in read_metrics(self.metrics) if record["iteration"] < first_iteration]
            write_atomic(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))

    def pending_checkpoint(self, iteration: int) -> Path:
        """An empty folder to write a checkpoint into; it counts only after `commit_checkpoint`."""
        folder = self.checkpoints / f"iteration-{iteration:06d}.tmp"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def commit_checkpoint(self, iteration: int, keep: int) -> Path:
        """Make the pending checkpoint count, by a rename, and remove all but the newest `keep`."""
        final = self.checkpoints / f"iteration-{iteration:06d}"
        if final.exists():  # the same iteration saved again, as a stop right after an interval does
            _remove_tree(final)
        os.replace(final.with_name(final.name + ".tmp"), final)
        write_atomic(self.checkpoints / "latest", final.name + "\n")
        self.prune_checkpoints(keep)
        return final

    def list_checkpoints(self) -> list[tuple[int, Path]]:
        """(iteration, folder) of the whole checkpoints, oldest first; half-written ones (*.tmp) are left out."""
        entries = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        found = [(_CHECKPOINT.fullmatch(entry.name), entry) for entry in entries if entry.is_dir()]
        return sorted((int(match[1]), entry) for match, entry in found if match)

    def latest_checkpoint(self) -> tuple[int, Path] | None:
        """(iteration, folder) to resume from, or None.

        The newest whole folder, not the file `latest`: a crash may fall between the rename and the writing of it.
        """
        found = self.list_checkpoints()
        return found[-1] if found else None

    def prune_checkpoints(self, keep: int) -> None:
        """Remove all but the newest `keep` >= 1 checkpoints, and what crashes left half-written."""
        if keep < 1:
            raise ValueError(f"keep is {keep}: expected at least 1 checkpoint to keep.")
        for _, folder in self.list_checkpoints()[:-keep]:
            _remove_tree(folder)
        self.discard_pending()

    def discard_pending(self) -> None:
        """Remove what is half-written."""
        for leftover in self.checkpoints.glob("*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def _remove_tree(folder: Path) -> None:
    """Remove a checkpoint; the rename first, so that a crash in between leaves no half of one that counts."""
    doomed = folder.with_name(folder.name + ".old.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def move_aside(folder: Path) -> Path:
    """Rename a folder to FOLDER.1, or the first free number; the new name."""
    folder, number = folder.absolute(), 1
    while os.path.lexists(target := folder.with_name(f"{folder.name}.{number}")):
        number += 1
    os.rename(folder, target)
    return target


def _holds_nothing(entries: Iterable[Path]) -> bool:
    return all(entry.name.endswith(".tmp") or entry.name == LOCK_FILE for entry in entries)


def _check_same(folder: Path, config: Config) -> None:
    old = load_run_config(folder, config.world_size).to_dict()
    blocking = []
    constant = {config.generator.lr_scheduler.type, config.fake_score.lr_scheduler.type} == {"constant"}
    for key, before, after in differences(old, config.to_dict()):
        if any(key == harmless or key.startswith(harmless + ".") for harmless in HARMLESS_KEYS):
            continue
        if key == f"{SECTION}.run.iterations":
            if constant:
                continue
            after += "  (the cosine schedule ends there: every later learning rate would change)"
        blocking.append(f"  {key}: {before} -> {after}")
    if blocking:
        raise RunFolderError(
            f"{folder} holds a run of another configuration:\n" + "\n".join(blocking) + "\n"
            "Use the old values to resume it, --fresh to move it aside and start anew, or another run.folder."
        )


def inspect_run(config: Config, fresh: bool = False) -> bool:
    """Whether the folder holds a run to resume or, with `fresh`, to move aside. Raises RunFolderError."""
    folder = Path(config.run.folder)
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file: run.folder must name a folder.")
    resumed = is_run_folder(folder)
    if not resumed and folder.exists() and not _holds_nothing(folder.iterdir()):
        raise RunFolderError(
            f"{folder} is not empty and holds no run (no config.json): choose another run.folder, or clear it."
        )
    if resumed and not fresh:
        _check_same(folder, config)
    return resumed


def open_run(config: Config, fresh: bool = False, wait: float = WAIT_SECONDS) -> RunFolder:
    """Create the run folder of a configuration, or open it to resume; it is locked while the result is held.

    Args:
        config: the checked configuration; its `run.folder` is the folder.
        fresh: move an existing run to `FOLDER.1`, `.2` ... first.
        wait: seconds to wait for another process that is in the folder.

    Raises:
        RunFolderError: the folder holds a run of another configuration (the differing keys are listed), or something
            that is no run, or another process is in it, or it cannot be written. Nothing is changed then.
    """
    folder = Path(config.run.folder)
    try:
        if inspect_run(config, fresh) and fresh:
            with acquire(folder / LOCK_FILE, str(folder), wait):
                (move_aside(folder) / LOCK_FILE).unlink(missing_ok=True)
        existed = folder.exists()
        lock = acquire(folder / LOCK_FILE, str(folder), wait)
        resumed = inspect_run(config)  # a process that was waited for may have changed it
        try:
            write_json(folder / "config.json", config.to_dict())
        except OSError:
            lock.release()
            if not existed:
                folder.rmdir()
            raise
    except OSError as error:
        raise RunFolderError(f"{folder}: the run folder cannot be written: {error}.") from None
    return RunFolder(folder, resumed, lock)
