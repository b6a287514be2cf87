"""What the launchers share: memory orders, tiles and the launch itself.

Kernels see tensors as (N, D): N samples, one after another in memory, of D elements. A program takes one tile, BLOCK
consecutive elements of one sample. Offsets are 64-bit.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements a program, by bytes an element. From ahead-of-time compilation for sm_80 and sm_90: four 128-bit accesses a
# thread and tensor, without spills, at 4 warps.
BLOCK = {4: 2048, 2: 4096}
SMALL_BLOCK = {4: 512, 2: 1024}  # one access a thread, where the larger would leave multiprocessors idle
FEW_PROGRAMS = 128  # about one for each multiprocessor (A100 108, H100 132), which is what SDXL latents of batch 8 give
NUM_WARPS = 4
VECTOR_BYTES = 16

TILE_ARGUMENTS = ["num_units", "num_tiles"]
"""Kernel arguments that must not be specialised on: shapes would compile kernels again."""


@triton.jit
def tile_of(num_units, num_tiles, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """This program's (sample, tile in the sample, offset of its first element, elements left in the sample)."""
    program = tl.program_id(0)
    sample = program // num_tiles
    tile = program - sample * num_tiles
    # The compiler sees that UNIT divides this: rows are aligned for wide accesses wherever it is large enough.
    size = num_units.to(tl.int64) * UNIT
    start = tile.to(tl.int64) * BLOCK
    left = tl.minimum(size - start, BLOCK).to(tl.int32)
    return sample, tile, sample.to(tl.int64) * size + start, left


IS_COMPILED = isinstance(tile_of, triton.runtime.JITFunction)
"""False in the interpreter: FAST of the kernels, which switches inline assembly and the hardware's casts on."""


class Tiling(NamedTuple):
    """How (N, D) elements are cut into programs."""

    block: int
    """Elements a program, a power of 2."""
    num_tiles: int
    """Tiles a sample."""
    num_programs: int
    unit: int
    """The largest power of 2, up to 16, that divides D."""
    sample_size: int
    is_wide: bool
    """16-bit elements, eight of which make one access."""

    def arguments(self) -> dict[str, Any]:
        """The arguments that every kernel takes for its tiles."""
        return {
            "num_units": self.sample_size // self.unit,
            "num_tiles": self.num_tiles,
            "FAST": IS_COMPILED,
            "UNIT": self.unit,
            "BLOCK": self.block,
            "num_warps": num_warps(self.block, self.is_wide),
        }


def num_warps(block: int, is_wide: bool) -> int:
    """So many that no thread is left without a full access, at most NUM_WARPS."""
    return max(1, min(NUM_WARPS, block // (256 if is_wide else 128)))


def tiling(dtype: torch.dtype, num_samples: int, sample_size: int) -> Tiling:
    """The tiles for tensors of `dtype`, (num_samples, sample_size), neither of them 0."""
    size = dtype.itemsize
    block = BLOCK[size]
    if num_samples * triton.cdiv(sample_size, block) < FEW_PROGRAMS:
        block = SMALL_BLOCK[size]
    one_warp = 32 * VECTOR_BYTES // size
    block = max(one_warp, min(block, triton.next_power_of_2(sample_size)))
    num_tiles = triton.cdiv(sample_size, block)
    return Tiling(block, num_tiles, num_samples * num_tiles, math.gcd(sample_size, 16), sample_size, size == 2)


def tiling_of(tensor: Tensor) -> Tiling:
    """The tiles of an (N, *) tensor that is not empty."""
    return tiling(tensor.dtype, tensor.shape[0], tensor.numel() // tensor.shape[0])


def _same_strides(a: Tensor, b: Tensor) -> bool:
    return all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))


def _samples_first(dense: Tensor) -> bool:
    return dense.shape[0] == 1 or dense.stride(0) == dense.numel() // dense.shape[0]


def laid_out_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in the memory order of `like`, a tensor of its shape: itself, or a copy."""
    return tensor if _same_strides(tensor, like) else torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


class Layout:
    """One memory order for the tensors of a launch, copying only those that have another.

    like: the output, from torch.empty_like, so dense in some order. That order serves elementwise kernels. Where
    `samples_first`, samples must lie one after another; where `row_major`, as for keyed noise, elements too.
    """

    def __init__(self, like: Tensor, *, samples_first: bool = True, row_major: bool = False) -> None:
        self.is_direct = like.is_contiguous() or (not row_major and (not samples_first or _samples_first(like)))
        self.model = like if self.is_direct else torch.empty(like.shape, dtype=like.dtype, device=like.device)

    def read(self, tensor: Tensor) -> Tensor:
        """The tensor in this order."""
        return laid_out_like(tensor, self.model)

    def write(self, out: Tensor) -> Tensor:
        """What to write in place of `out`, a tensor with the strides of `like`; `finish` brings it there."""
        return out if self.is_direct else torch.empty_like(self.model, dtype=out.dtype)

    def finish(self, out: Tensor, written: Tensor) -> Tensor:
        """The output, after the launch."""
        return out if written is out else out.copy_(written)


def launch(kernel: Any, num_programs: int, on: Tensor, *arguments: Any, **options: Any) -> None:
    """Run a kernel on the device of the tensor `on`: Triton launches on the current one, which may be another."""
    with torch.cuda.device(on.device) if on.is_cuda else contextlib.nullcontext():
        kernel[(num_programs,)](*arguments, **options)
