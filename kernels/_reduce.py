"""What the reductions share: tensors in one memory order, and sums over programs in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_FOLD = 256
_counters: dict[tuple[torch.device, int], Tensor] = {}


def laid_out_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor with the strides of `like`, a tensor of its shape: itself, or a copy."""
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def fold_counter(on: Tensor) -> Tensor:
    """The zero that `fold` counts programs with on the current stream, () int32; it leaves a zero again."""
    if not on.is_cuda:
        return _counters.setdefault((on.device, 0), torch.zeros((), dtype=torch.int32, device=on.device))
    with torch.cuda.device(on.device):
        if torch.cuda.is_current_stream_capturing():  # memory of a graph is set to 0 when the graph runs, not now
            return torch.zeros((), dtype=torch.int32, device=on.device)
        key = on.device, torch.cuda.current_stream().cuda_stream
    if key not in _counters:
        _counters[key] = torch.zeros((), dtype=torch.int32, device=on.device)
    return _counters[key]


@triton.jit
def fold(value, out_ptr, values_ptr, counter_ptr, BLOCK: tl.constexpr = _FOLD):
    """*out_ptr = the sum of all programs' values, from the last program to come here and in a fixed order.

    values_ptr: room for one f32 a program. counter_ptr: `fold_counter`. No other launch may use them meanwhile.
    """
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    if num_programs == 1:
        tl.store(out_ptr, value)
    else:
        tl.store(values_ptr + program, value)
        # Releases this program's value, and for the last one acquires those of the others.
        if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == num_programs - 1:
            tl.store(counter_ptr, 0)
            sums = tl.zeros((BLOCK,), tl.float32)
            for first in range(0, num_programs, BLOCK):
                index = first + tl.arange(0, BLOCK)
                sums += tl.load(values_ptr + index, mask=index < num_programs, other=0.0, volatile=True)
            tl.store(out_ptr, tl.sum(sums, 0))
