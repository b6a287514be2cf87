"""out = factor * grad * weight * x: the backward passes that need no more, in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import TILE_ARGUMENTS, Layout, launch, tile_of, tiling
from ._store import rounded


@triton.jit(do_not_specialize=TILE_ARGUMENTS)
def scale_kernel(
    x_ptr,  # (N, D)
    weight_ptr,  # (N,) f32 or None
    grad_ptr,  # () or None: a gradient that came back, read here so that the host need not wait for it
    factor,  # f32
    out_ptr,  # (N, D)
    num_units,
    num_tiles,
    FAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, _, offset, left = tile_of(num_units, num_tiles, UNIT, BLOCK)
    element = tl.arange(0, BLOCK)
    mask = element < left
    x = tl.load(x_ptr + offset + element, mask=mask)
    if grad_ptr is not None:
        factor *= tl.load(grad_ptr).to(tl.float32)
    if weight_ptr is not None:
        factor *= tl.load(weight_ptr + sample)
    out = x.to(tl.float32) * factor
    tl.store(out_ptr + offset + element, rounded(out, out_ptr.dtype.element_ty, FAST), mask=mask)


def scaled(x: Tensor, weight: Tensor | None, grad: Tensor | None, factor: float, dtype: torch.dtype) -> Tensor:
    """factor * grad * weight * x in `dtype`, with the strides of torch.empty_like(x).

    x (N, *) f16, bf16 or f32; weight (N,) f32; grad () f32; either may be None.
    """
    out = torch.empty_like(x, dtype=dtype)
    if out.numel() == 0:
        return out
    layout = Layout(out, samples_first=weight is not None)
    written = layout.write(out)
    # Without a weight there is one sample, of any shape: rows need no alignment of their own.
    num_samples = 1 if weight is None else x.shape[0]
    tiles = tiling(x.dtype, num_samples, x.numel() // num_samples)
    launch(
        scale_kernel,
        tiles.num_programs,
        x,
        layout.read(x),
        None if weight is None else weight.contiguous(),
        grad,
        factor,
        written,
        **tiles.arguments(),
    )
    return layout.finish(out, written)
