"""Sums over a whole launch without a second one.

Each program leaves its partial sums in scratch memory and counts itself in; the last to arrive folds all of them, in an
order that does not depend on who came when: the same bits every time. It also sets the counter back to 0, so nothing
has to be cleared before a launch.

The counter must not be shared by launches that may run at the same time. One is kept for each stream, on which launches
follow one another. A launch that is being captured gets one of its own, cleared by a node of the graph: a graph may be
replayed on another stream than it was captured on, beside other graphs. Scratch memory comes from PyTorch's allocator
anew each time, which knows streams and graphs, so it needs no care here, whatever its size.
"""

from __future__ import annotations

import threading

import torch
import triton
import triton.language as tl
from torch import Tensor

FOLD = 1024  # partial sums that the last program takes at a time

_counters: dict[tuple[torch.device, int], Tensor] = {}


def _kept(on: Tensor) -> Tensor:
    """A (1,) int32 zero that stays outside every memory pool that is in force.

    The warm-up run of torch.compile's CUDA graphs allocates from the graph's pool, whose memory is handed out again
    behind the back of whoever keeps it. Such pools hold for one thread, so another does the allocation.
    """
    made: list[Tensor] = []
    thread = threading.Thread(target=lambda: made.append(on.new_zeros(1, dtype=torch.int32)))
    thread.start()
    thread.join()
    if on.is_cuda:
        # It was cleared on that thread's stream, the default one.
        torch.cuda.current_stream(on.device).wait_stream(torch.cuda.default_stream(on.device))
    return made[0]


def counter(on: Tensor) -> Tensor:
    """The zero, (1,) int32, for a launch on the device of the tensor `on` to count its programs with."""
    stream = 0
    if on.is_cuda:
        with torch.cuda.device(on.device):
            if torch.cuda.is_current_stream_capturing():
                return torch.zeros(1, dtype=torch.int32, device=on.device)
            stream = torch.cuda.current_stream().cuda_stream
    key = on.device, stream
    if key not in _counters:
        _counters[key] = _kept(on)
    return _counters[key]


def workspace(on: Tensor, num_sums: int) -> tuple[Tensor, Tensor]:
    """(counter, room for sums (num_sums,) f32) for a launch on the device of the tensor `on`."""
    return counter(on), torch.empty((num_sums,), dtype=torch.float32, device=on.device)


def forget() -> None:
    """Drop the counters: after a launch that was not run to its end, as in a simulator, they are not 0."""
    _counters.clear()


@triton.jit
def is_last(counter_ptr):
    """Whether all other programs of the launch have stored what they stored, as scalars, before this call of theirs.

    One thread stores scalars and counts: its release covers them. They are to be read with volatile=True, past this
    multiprocessor's cache.
    """
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    last = arrived == tl.num_programs(0) - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def folded(partials_ptr, count, FOLD: tl.constexpr):
    """The sum of `count` partial sums, an f32 scalar."""
    sums = tl.zeros((FOLD,), tl.float32)
    for first in range(0, count, FOLD):
        at = first + tl.arange(0, FOLD)
        sums += tl.load(partials_ptr + at, mask=at < count, other=0.0, volatile=True)
    return tl.sum(sums)


@triton.jit
def fold(value, out_ptr, values_ptr, counter_ptr, BLOCK: tl.constexpr = 256):
    """*out_ptr = the sum of all programs' values, from the last program to come here and in a fixed order.

    values_ptr: room for one f32 a program. counter_ptr: `counter`.
    """
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    if num_programs == 1:
        tl.store(out_ptr, value)
    else:
        tl.store(values_ptr + program, value)
        if is_last(counter_ptr):
            tl.store(out_ptr, folded(values_ptr, num_programs, BLOCK))
