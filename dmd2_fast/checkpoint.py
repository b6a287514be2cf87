"""Saving and loading the whole state of a run: both engines with their optimizers, the average, the counters.

A checkpoint is a folder `iteration-000250/` of DeepSpeed's own files (`generator/`, `fake_score/`), one file a rank
with its shards of the average and its sums since the last log line, and `trainer.json`. It is written beside its final
name and renamed when every rank is done, so a killed run never leaves half of one. Data order and noise are functions
of the iteration, so they need no state of their own.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .engine import Engines, ShardedEMA
from .errors import RunFolderError
from .meters import Metrics
from .ranks import Rank, raise_together
from .runs import RunFolder, replacing

STATE_FILE = "trainer.json"
TAG = "state"
_KINDS: dict[str, Any] = {
    "world_size": int, "iteration": int, "skipped": dict, "in_a_row": dict, "generator_updates": int,
    "seconds": (int, float),
}  # fmt: skip


def _rank_file(folder: Path, rank: Rank) -> Path:
    return folder / f"rank{rank.rank:05d}.safetensors"


def save_checkpoint(
    run: RunFolder,
    iteration: int,
    keep: int,
    engines: Engines,
    ema: ShardedEMA | None,
    metrics: Metrics,
    state: dict[str, Any],
    rank: Rank,
) -> None:
    """Save the state after `iteration` iterations. Collective: every rank calls it."""
    from safetensors.torch import save_file

    folder = run.checkpoints / f"iteration-{iteration:06d}.tmp"
    if rank.is_main:
        folder = run.pending_checkpoint(iteration)
    dist.barrier()
    for name in ("generator", "fake_score"):
        getattr(engines, name).save_checkpoint(str(folder / name), tag=TAG, save_latest=False)
    tensors = {f"metrics.{name}": value for name, value in metrics.sums.items()}
    if ema is not None:
        tensors |= {f"ema.{name}": value for name, value in ema.shards.items()}
    # The order of the names is the order in which ranks reduce them; safetensors does not keep it.
    order = {"counts": json.dumps(dict(metrics.counts))}
    with replacing(_rank_file(folder, rank)) as file:
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, file, order)
    if rank.is_main:
        record = {"iteration": iteration, "world_size": rank.world_size, **state}
        (folder / STATE_FILE).write_text(json.dumps(record, indent=2) + "\n")
    dist.barrier()
    if rank.is_main:
        run.commit_checkpoint(iteration, keep)
    dist.barrier()


def read_state(folder: Path, world_size: int | None = None) -> dict[str, Any]:
    """The counters of a checkpoint; `RunFolderError` when unreadable, or not of `world_size` ranks (None: any)."""
    try:
        state = json.loads((folder / STATE_FILE).read_text())
        for name, kind in _KINDS.items():
            if not isinstance(state[name], kind):
                raise ValueError(f"{name} is {state[name]!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"checkpoint {folder}: {STATE_FILE} cannot be read: {error}. {_remedy(folder)}") from error
    saved = state["world_size"]
    if world_size is not None and saved != world_size:
        raise RunFolderError(
            f"checkpoint {folder} was written by {saved} rank(s) and this run has {world_size}: optimizer states are "
            f"sharded by rank. Resume with {saved} rank(s), or start anew with --fresh"
        )
    return state


def load_checkpoint(folder: Path, engines: Engines, ema: ShardedEMA | None, metrics: Metrics, rank: Rank) -> None:
    """Restore both engines, the average and the open sums. Collective: what one rank cannot load, all refuse."""
    raise_together(_damage(folder, rank), rank)
    for name in ("generator", "fake_score"):
        try:
            loaded, _ = getattr(engines, name).load_checkpoint(str(folder / name), tag=TAG)
        except Exception as error:  # whatever a damaged file makes DeepSpeed or pickle raise
            raise RunFolderError(f"checkpoint {folder / name} cannot be loaded: {error}. {_remedy(folder)}") from error
        if loaded is None:
            raise RunFolderError(f"checkpoint {folder / name} holds no state. {_remedy(folder)}")
    raise_together(_restore_rank(folder, ema, metrics, rank), rank)


def _damage(folder: Path, rank: Rank) -> RunFolderError | None:
    """What is wrong with the files that this rank is about to load: DeepSpeed would leave the other ranks waiting."""
    for name in ("generator", "fake_score"):
        files = sorted((folder / name / TAG).glob("*.pt"))
        # Everybody reads the module's file (of its own rank; at stages 1 and 2 the one "mp_rank_00_model_states.pt" of
        # rank 0) and the optimizer's of its own rank, two of DeepSpeed's naming.
        mine = [path for path in files if f"pp_rank_{rank.rank}_" in path.name or path.name.startswith("mp_rank_")]
        if len(mine) < 2:
            return RunFolderError(
                f"checkpoint {folder / name / TAG} lacks files of rank {rank.rank}: expected 2, found {len(mine)}. "
                f"{_remedy(folder)}"
            )
        for path in mine:
            try:
                with zipfile.ZipFile(path) as archive:
                    broken = archive.testzip()
            except (OSError, zipfile.BadZipFile) as error:
                broken = str(error)
            if broken is not None:
                return RunFolderError(f"checkpoint {path} is damaged ({broken}). {_remedy(folder)}")
    return None


def _restore_rank(folder: Path, ema: ShardedEMA | None, metrics: Metrics, rank: Rank) -> RunFolderError | None:
    import safetensors

    path = _rank_file(folder, rank)
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            counts = json.loads(file.metadata()["counts"])
            sums = {name: file.get_tensor(f"metrics.{name}").to(rank.device) for name in counts}
            if ema is not None:
                for name, value in ema.shards.items():
                    value.copy_(file.get_tensor(f"ema.{name}"))
    except Exception as error:  # whatever a damaged file makes safetensors raise
        return RunFolderError(f"checkpoint {path} cannot be loaded: {error}. {_remedy(folder)}")
    metrics.restore(sums, counts)
    return None


def _remedy(folder: Path) -> str:
    return f"Remove {folder} to resume from the checkpoint before it, or start anew with --fresh"
