"""Exponential functions good to a unit or two in the last place, for losses of few logits, where that costs nothing.

The GPU's own are off by more, each in its own way, and a scalar shows it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _exp(x):
    """exp of an f32 block to 1 ulp: the hardware's is off by 2 and more, which a loss of few logits would show."""
    x = tl.clamp(x, -104.0, 89.0, propagate_nan=tl.PropagateNan.ALL)  # 0 and infinity beyond
    n = tl.floor(tl.fma(x, 1.4426950408889634, 0.5))
    # r = x - n ln(2), |r| <= ln(2) / 2, with ln(2) in two parts.
    r = tl.fma(n, 2.12194440e-4, tl.fma(n, -0.693359375, x))
    series = tl.zeros_like(r) + 1.0 / 5040.0
    series = tl.fma(series, r, 1.0 / 720.0)
    series = tl.fma(series, r, 1.0 / 120.0)
    series = tl.fma(series, r, 1.0 / 24.0)
    series = tl.fma(series, r, 1.0 / 6.0)
    series = tl.fma(series, r, 0.5)
    series = tl.fma(series * r, r, r) + 1.0
    # 2^n in two factors, each of which is an f32.
    whole = n.to(tl.int32)
    half = whole >> 1
    first = ((half + 127) << 23).to(tl.float32, bitcast=True)
    second = ((whole - half + 127) << 23).to(tl.float32, bitcast=True)
    return series * first * second


@triton.jit
def over(x, count):
    """x / count, of an int, rounded to nearest, which Triton's own f32 division is not."""
    return tl.div_rn(x, tl.cast(count, tl.float32))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) of an f32 block."""
    return tl.div_rn(1.0, 1.0 + _exp(-x))


@triton.jit
def softplus(x):
    """log(1 + exp(x)) of an f32 block, precise also where it is small."""
    p = _exp(-tl.abs(x))
    # log(1 + p) = 2 artanh(s), s = p / (2 + p) <= 1 / 3: the series 2 (s + s^3 / 3 + s^5 / 5 + ...) to s^15.
    s = tl.div_rn(p, 2.0 + p)
    square = s * s
    series = tl.zeros_like(s) + 1.0 / 15.0
    for i in tl.static_range(6):
        series = tl.fma(series, square, 1.0 / (13 - 2 * i))
    return tl.maximum(x, 0.0) + 2.0 * tl.fma(series * square, s, s)
