"""The logistic function and SiLU's slope inside Triton kernels, in powers of two: z = -ln(2) t."""

from __future__ import annotations

import triton
import triton.language as tl

MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def sigmoid_of_power(t, FAST: tl.constexpr):
    """1 / (1 + 2^t) of an f32 block. FAST: the GPU's own functions, good to 2 ulp, which the interpreter lacks."""
    if FAST:
        # Below 2^-126 the result is 0. Triton's own division takes 6 instructions more.
        power = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [t], tl.float32, True, 1)
        gate = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], tl.float32, True, 1)
    else:
        gate = 1.0 / (1.0 + tl.exp2(t))
    return gate


@triton.jit
def sigmoid(z, FAST: tl.constexpr):
    """1 / (1 + exp(-z))."""
    return sigmoid_of_power(z * MINUS_LOG2_E, FAST)


@triton.jit
def silu_slope(difference, rstd, weight, bias, FAST: tl.constexpr):
    """d silu(z) / dz = gate (1 + z (1 - gate)) with gate = sigmoid(z), at z = difference * rstd * weight + bias."""
    t = tl.fma(difference, weight * (rstd * MINUS_LOG2_E), bias * MINUS_LOG2_E)
    gate = sigmoid_of_power(t, FAST)
    return gate * tl.fma(t, tl.fma(gate, _LN_2, -_LN_2), 1.0)
