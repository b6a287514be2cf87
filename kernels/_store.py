"""Rounding at the store, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(x, dtype: tl.constexpr, FAST: tl.constexpr):
    """f32 to `dtype`, to nearest with ties to even. FAST: compiled; the interpreter's own cast to bf16 truncates."""
    if FAST or dtype != tl.bfloat16:
        result = x.to(dtype)
    else:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        high = tl.where(x == x, bits >> 16, 0x7FC0)
        result = high.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return result
