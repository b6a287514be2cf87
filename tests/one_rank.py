"""A trainer in the test's own process: a process group of one rank, and small runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from plain_loop import write_config

from dmd2_fast.ranks import Rank, init_distributed, quiet_libraries
from dmd2_fast.runs import RunFolder, open_run
from dmd2_fast.trainer import Trainer

RATES = {"lr_scheduler": {"type": "cosine", "params": {"warmup_iterations": 2}}}
OPTIMIZER = {"optimizer": {"params": {"lr": 1e-3, "eps": 1e-5}}}


@contextmanager
def group_of_one() -> Iterator[Rank]:
    """The variables that describe the group are not left to processes that the test may start, which have their own."""
    before, threads = dict(os.environ), torch.get_num_threads()
    quiet_libraries()
    rank = init_distributed()
    os.environ.clear()
    os.environ.update(before)
    torch.set_num_threads(threads)
    with mock.patch.dict(os.environ, LOCAL_RANK="0"):  # DeepSpeed asks for this one all the time
        yield rank


def make_trainer(folder: Path, name: str, rank: Rank, deepspeed: dict | None = None, **section) -> Trainer:
    """A trainer for folder/NAME on the data and teacher that plain_loop.prepare put into `folder`."""
    for network in ("generator", "fake_score"):
        section[network] = {**RATES, **OPTIMIZER, **section.get(network, {})}
    config = write_config(folder, name, 1, deepspeed, **section)[1]
    open_run(config)
    return Trainer(config, RunFolder(config.run.folder), rank)


def steps(trainer: Trainer, number: int, after=lambda: None) -> None:
    """Iterations without logging or saving."""
    batches = iter(trainer.loader)
    for _ in range(number):
        trainer.step(next(batches))
        after()
        trainer.iteration += 1
