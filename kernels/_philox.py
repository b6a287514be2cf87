"""The noise stream inside Triton kernels: Philox4x32-10 and Box-Muller.

Counter = (element // 4, sample id, step, stream), key = the low and high word of the 64-bit seed: the integers equal
those of the other backends bit for bit. One Philox call gives the four normals of a counter; `tl.randn` would spend a
whole call on one, and Triton's own offsets are another counter layout.
"""

from __future__ import annotations

import triton
import triton.language as tl

_TWO_PI_OVER_2_TO_32 = tl.constexpr(1.4629180792671596e-09)
_ROOT_OF_2_LN_2 = tl.constexpr(1.1774100225154747)


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
def _product(word, MULTIPLIER: tl.constexpr, FAST: tl.constexpr):
    """(low, high) word of a 64-bit product."""
    if FAST:
        # One wide multiply; of a 64-bit product in Triton the compiler makes a high and a low one here and there.
        low, high = tl.inline_asm_elementwise(
            "{ .reg .b64 p; mul.wide.u32 p, $2, $3; mov.b64 {$0, $1}, p; }",
            "=r,=r,r,r",
            [word, MULTIPLIER],
            (tl.uint32, tl.uint32),
            True,
            1,
        )
    else:
        product = word.to(tl.uint64) * MULTIPLIER
        low = product.to(tl.uint32)
        high = (product >> 32).to(tl.uint32)
    return low, high


@triton.jit
def philox(counter, sample_id, step, noise_stream, seed_low, seed_high, FAST: tl.constexpr):
    """Philox4x32, 10 rounds: counter a uint32 block, the others integer scalars; four uint32 blocks."""
    c0 = counter
    c1 = tl.zeros_like(counter) + sample_id.to(tl.uint32)
    c2 = tl.zeros_like(counter) + step.to(tl.uint32)
    c3 = tl.zeros_like(counter) + noise_stream.to(tl.uint32)
    k0 = seed_low.to(tl.uint32)
    k1 = seed_high.to(tl.uint32)
    for _ in tl.static_range(10):
        low0, high0 = _product(c0, 0xD2511F53, FAST)
        low1, high1 = _product(c2, 0xCD9E8D57, FAST)
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _uniform(word):
    """(0, 1] from a uint32 block. From the unsigned word: a signed one could give 0, and its logarithm."""
    return tl.fma(word.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)


@triton.jit
def _normal_pair(radius_word, angle_word, scale, FAST: tl.constexpr):
    u = _uniform(radius_word)
    angle = angle_word.to(tl.int32, bitcast=True).to(tl.float32) * _TWO_PI_OVER_2_TO_32
    if FAST:
        # The hardware's own functions, good to 2^-20 for |angle| <= pi; libdevice's take 38 instructions more.
        log2_u = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [u], tl.float32, True, 1)
        cosine = tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1)
        sine = tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1)
        # The logarithm is negative, but at u = 1 the hardware's may come out a little above 0.
        magnitude = tl.abs(log2_u)
        root = tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [magnitude], tl.float32, True, 1)
        radius = root * (scale * _ROOT_OF_2_LN_2)
    else:
        radius = tl.sqrt(-2.0 * tl.log(u)) * scale
        cosine = tl.cos(angle)
        sine = tl.sin(angle)
    return radius * cosine, radius * sine


@triton.jit
def _four(
    counter, scale, sample_id, step, noise_stream, seed_low, seed_high, UNIFORM: tl.constexpr, FAST: tl.constexpr
):
    """The four draws of each counter as one (C, 2, 2) block, in element order."""
    w0, w1, w2, w3 = philox(counter, sample_id, step, noise_stream, seed_low, seed_high, FAST)
    if UNIFORM:
        z0 = _uniform(w0)
        z1 = _uniform(w1)
        z2 = _uniform(w2)
        z3 = _uniform(w3)
    else:
        z0, z1 = _normal_pair(w0, w1, scale, FAST)
        z2, z3 = _normal_pair(w2, w3, scale, FAST)
    # join appends an axis of 2, so the pair that is joined last varies fastest.
    return tl.join(tl.join(z0, z2), tl.join(z1, z3))


@triton.jit
def drawn(
    tile,
    scale,
    sample_id,
    step,
    noise_stream,
    seed_low,
    seed_high,
    UNIFORM: tl.constexpr,
    WIDE: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """scale * normals (or the uniforms, whatever scale is) of elements tile * BLOCK .. of a sample, (BLOCK,) f32.

    scale enters the radius, which two normals share: cheaper than scaling each. The integers are the int32 kernel
    arguments of `stream_arguments`, tile and sample_id any integer scalars. WIDE: each thread holds eight consecutive
    elements, from two adjacent counters, for 16-bit tensors; otherwise four. The block then lies across the threads
    as 128-bit accesses want it, and nothing goes through shared memory. FAST: compiled; the interpreter has no inline
    assembly.
    """
    first = tile.to(tl.uint32) * (BLOCK // 4)
    if WIDE:
        counter = first + 2 * tl.arange(0, BLOCK // 8).to(tl.uint32)
        even = _four(counter, scale, sample_id, step, noise_stream, seed_low, seed_high, UNIFORM, FAST)
        odd = _four(counter + 1, scale, sample_id, step, noise_stream, seed_low, seed_high, UNIFORM, FAST)
        result = tl.join(even, odd).permute(0, 3, 1, 2).reshape(BLOCK)
    else:
        counter = first + tl.arange(0, BLOCK // 4).to(tl.uint32)
        four = _four(counter, scale, sample_id, step, noise_stream, seed_low, seed_high, UNIFORM, FAST)
        result = four.reshape(BLOCK)
    return result
