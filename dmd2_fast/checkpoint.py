"""Saving and loading the whole state of a run: both engines with their optimizers, the average, the counters.

A checkpoint is a folder `iteration-000250/` of DeepSpeed's own files (`generator/`, `fake_score/`), one file of averaged
shards a rank and `trainer.json`. It is written beside its final name and renamed when every rank is done, so a killed
run never leaves half of one. Data order and noise are functions of the iteration, so they need no state of their own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .engine import Engines, Rank, ShardedEMA
from .errors import RunFolderError
from .runs import RunFolder

STATE_FILE = "trainer.json"
TAG = "state"


def _ema_file(folder: Path, rank: Rank) -> Path:
    return folder / f"ema-rank{rank.rank:05d}.safetensors"


def save_checkpoint(
    run: RunFolder, iteration: int, keep: int, engines: Engines, ema: ShardedEMA | None, state: dict[str, Any], rank: Rank
) -> None:
    """Save the state after `iteration` iterations. Collective: every rank calls it."""
    from safetensors.torch import save_file

    folder = run.checkpoints / f"iteration-{iteration:06d}.tmp"
    if rank.is_main:
        folder = run.pending_checkpoint(iteration)
    dist.barrier()
    for name in ("generator", "fake_score"):
        getattr(engines, name).save_checkpoint(str(folder / name), tag=TAG, save_latest=False)
    if ema is not None:
        save_file({name: value.cpu() for name, value in ema.shards.items()}, _ema_file(folder, rank))
    if rank.is_main:
        record = {"iteration": iteration, "world_size": rank.world_size, **state}
        (folder / STATE_FILE).write_text(json.dumps(record, indent=2) + "\n")
    dist.barrier()
    if rank.is_main:
        run.commit_checkpoint(iteration, keep)
    dist.barrier()


def read_state(folder: Path, world_size: int) -> dict[str, Any]:
    """The counters of a checkpoint; `RunFolderError` when it is unreadable or of another number of ranks."""
    try:
        state = json.loads((folder / STATE_FILE).read_text())
        saved = state["world_size"]
    except (OSError, ValueError, KeyError) as error:
        raise RunFolderError(f"checkpoint {folder}: {STATE_FILE} cannot be read: {error}. {_remedy(folder)}") from error
    if saved != world_size:
        raise RunFolderError(
            f"checkpoint {folder} was written by {saved} rank(s) and this run has {world_size}: optimizer states are "
            f"sharded by rank. Resume with {saved} rank(s), or start anew with --fresh"
        )
    return state


def load_checkpoint(folder: Path, engines: Engines, ema: ShardedEMA | None, rank: Rank) -> None:
    """Restore both engines and the average. Collective. `RunFolderError` names what is damaged."""
    from safetensors.torch import load_file

    for name in ("generator", "fake_score"):
        try:
            loaded, _ = getattr(engines, name).load_checkpoint(str(folder / name), tag=TAG)
        except Exception as error:  # whatever a damaged file makes DeepSpeed or pickle raise
            raise RunFolderError(f"checkpoint {folder / name} cannot be loaded: {error}. {_remedy(folder)}") from error
        if loaded is None:
            raise RunFolderError(f"checkpoint {folder / name} holds no state. {_remedy(folder)}")
    if ema is None:
        return
    try:
        shards = load_file(_ema_file(folder, rank))
        for name, value in ema.shards.items():
            value.copy_(shards[name])
    except Exception as error:
        raise RunFolderError(f"checkpoint {_ema_file(folder, rank)}: {error}. {_remedy(folder)}") from error


def _remedy(folder: Path) -> str:
    return f"Remove {folder} to resume from the checkpoint before it, or start anew with --fresh"
