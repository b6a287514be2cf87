"""The noise stream inside Triton kernels: Philox4x32-10 and Box-Muller.

Counter = (element // 4, sample id, step, stream), key = the low and high word of the 64-bit seed: the integers equal
those of the other backends bit for bit. One call of `normals` gives the four normals of a counter; `tl.randn` would
spend a whole call on one, and Triton's own offsets are another counter layout.
"""

from __future__ import annotations

import triton
import triton.language as tl

_TWO_PI_OVER_2_TO_32 = tl.constexpr(1.4629180792671596e-09)
_MINUS_2_LN_2 = tl.constexpr(-1.3862943611198906)


def as_int32(word: int) -> int:
    """The same 32 bits as a signed integer: Triton would type 2^31 and above as 64-bit, a second compilation."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word


def stream_arguments(seed: int, step: int, stream: int) -> dict[str, int]:
    """The kernel arguments of a key; seed of 64 bits, step and stream of 32. The name `stream` is Triton's own."""
    return {
        "seed_low": as_int32(seed),
        "seed_high": as_int32(seed >> 32),
        "step": as_int32(step),
        "noise_stream": as_int32(stream),
    }


# A new seed or step must not compile the kernel again.
STREAM_ARGUMENTS = ["seed_low", "seed_high", "step", "noise_stream"]


@triton.jit
def philox(counter, sample_id, step, noise_stream, seed_low, seed_high):
    """Philox4x32, 10 rounds: counter a uint32 block, the others uint32 scalars; four uint32 blocks."""
    c0 = counter
    c1 = tl.zeros_like(counter) + sample_id
    c2 = tl.zeros_like(counter) + step
    c3 = tl.zeros_like(counter) + noise_stream
    k0 = seed_low
    k1 = seed_high
    for _ in tl.static_range(10):
        # One 64-bit product each: a wide multiply on the GPU, where high and low word apart are two instructions.
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _uniform(word):
    """(0, 1] from a uint32 block. From the unsigned word: a signed one could give 0, and its logarithm."""
    return tl.fma(word.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)


@triton.jit
def _normal_pair(radius_word, angle_word, FAST: tl.constexpr):
    u = _uniform(radius_word)
    angle = angle_word.to(tl.int32, bitcast=True).to(tl.float32) * _TWO_PI_OVER_2_TO_32
    if FAST:
        # The hardware's own functions, good to 2^-20 for |angle| <= pi; libdevice's take 38 instructions more.
        log2_u = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [u], tl.float32, True, 1)
        cosine = tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1)
        sine = tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1)
        # At u = 1 a logarithm that is not exactly 0 must not give the root of a negative number.
        squared = tl.maximum(log2_u * _MINUS_2_LN_2, 0.0)
        radius = tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [squared], tl.float32, True, 1)
    else:
        radius = tl.sqrt(-2.0 * tl.log(u))
        cosine = tl.cos(angle)
        sine = tl.sin(angle)
    return radius * cosine, radius * sine


@triton.jit
def normals(counter, sample_id, step, noise_stream, seed_low, seed_high, FAST: tl.constexpr):
    """Normals 4 c .. 4 c + 3 for each counter c of a (C,) uint32 block, as one (4 C,) f32 block in element order.

    The scalars are the int32 kernel arguments of `stream_arguments`, sample_id any integer scalar. FAST: the GPU's fast
    functions, which the interpreter does not have.
    """
    w0, w1, w2, w3 = philox(
        counter,
        sample_id.to(tl.uint32),
        step.to(tl.uint32),
        noise_stream.to(tl.uint32),
        seed_low.to(tl.uint32),
        seed_high.to(tl.uint32),
    )
    z0, z1 = _normal_pair(w0, w1, FAST)
    z2, z3 = _normal_pair(w2, w3, FAST)
    # join appends an axis of 2, so the pair that is joined last varies fastest.
    return tl.join(tl.join(z0, z2), tl.join(z1, z3)).reshape(4 * counter.shape[0])
