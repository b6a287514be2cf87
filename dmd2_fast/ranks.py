"""This process among the ranks: joining them, and the small collectives by which all of them go the same way."""

from __future__ import annotations

import datetime
import logging
import os
import socket
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import UserError
from .rendezvous import COLLECTIVE_MINUTES, meet

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=COLLECTIVE_MINUTES)

T = TypeVar("T")


@dataclass(frozen=True)
class Rank:
    """This process's place: global rank, number of ranks, its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def world_size_from_environment() -> int:
    """Ranks that the launcher started, before anything is initialised."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def init_distributed() -> Rank:
    """Join the process group that the launcher describes, or make one of a single rank (`python train.py`).

    `UserError` when the ranks do not come together (`rendezvous.meet`) or cannot reach each other. A single rank needs
    no port, so any number of them run side by side.
    """
    import deepspeed

    # Without this the first start compiles a shared-memory collective for minutes on CPU.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ:  # DeepSpeed looks for these, and for MPI where they are missing
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    local_rank, world_size = int(os.environ.get("LOCAL_RANK", "0")), world_size_from_environment()
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
        # torchrun's name, DeepSpeed's, none
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, available_cores() // local_ranks))
    if not dist.is_initialized():
        _make_group("nccl" if device.type == "cuda" else "gloo", world_size)
    return Rank(dist.get_rank(), dist.get_world_size(), device)


def _make_group(backend: str, world_size: int) -> None:
    import deepspeed

    rank = int(os.environ["RANK"])
    store = dist.HashStore() if world_size == 1 else meet(backend)
    try:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)
    except RuntimeError as error:
        if "connectFullMesh" not in str(error):
            raise
        raise UserError(
            f"rank {rank} on {socket.gethostname()} and the others do not reach each other: name the network interface "
            "between the nodes on each, as in `export GLOO_SOCKET_IFNAME=eth0`, and let all ports through between "
            f"them: see docs/multinode.md. ({str(error).splitlines()[0]})"
        ) from None
    deepspeed.init_distributed(backend, timeout=COLLECTIVE_TIMEOUT, verbose=False)


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quiet_libraries() -> None:
    """Keep DeepSpeed's start-up chatter out of the terminal; warnings stay."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls collectives by the names that torch 2.13 has given up.
    warnings.filterwarnings("ignore", r".torch\.distributed\..* is deprecated", FutureWarning)


def reduce_mean(values: Tensor) -> Tensor:
    """Mean over ranks, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def all_sum(values: Tensor) -> Tensor:
    """The sum over ranks, on all of them; one rank's own. Collective."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether any rank raised the flag. Collective; a host read."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flag
    value = torch.tensor([float(flag)], device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def raise_together(error: UserError | None, rank: Rank) -> None:
    """Raise on every rank what any rank met, so that none is left waiting in a collective. Collective."""
    messages: list[str | None] = [None if error is None else str(error)]
    if rank.world_size > 1:
        messages = [None] * rank.world_size
        dist.all_gather_object(messages, None if error is None else str(error))
    found = list(dict.fromkeys(message for message in messages if message is not None))
    if found:
        raise UserError("; ".join(found)) from error


def on_main(rank: Rank, action: Callable[[], T]) -> T | None:
    """Run an action on rank 0 alone; a `UserError` it raises is raised on every rank, so that none is left waiting."""
    result: T | None = None
    message: list[str | None] = [None]
    if rank.is_main:
        try:
            result = action()
        except UserError as error:
            message = [str(error)]
    if rank.world_size > 1:
        dist.broadcast_object_list(message)
    if message[0] is not None:
        raise UserError(message[0])
    return result


def from_main(rank: Rank, action: Callable[[], T]) -> T:
    """`on_main`, whose result every rank gets. It is pickled."""
    results = [on_main(rank, action)]
    if rank.world_size > 1:
        dist.broadcast_object_list(results)
    return cast(T, results[0])
