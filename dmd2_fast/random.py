"""Counter-based random numbers: every draw is a pure function of a key, a sample's id and an element's position.

Philox4x32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011):

    key     = the 64-bit seed (low word, high word)
    counter = (element // 4, sample id, step, stream)
    words   = (w0, w1, w2, w3), which serve elements 4 c, 4 c + 1, 4 c + 2 and 4 c + 3

Uniforms are u = fma(f32(w), 2^-32, 2^-33), in (0, 1]. Normals come in pairs from (w0, w1) and (w2, w3) by Box-Muller:
theta = 2 pi w1 2^-32 with w1 read as a signed integer, r = sqrt(-2 ln u(w0)), (r cos theta, r sin theta).

The sample id is the position in the global batch of the step, so nothing here depends on the number of ranks, on the
micro-batch split, on earlier draws or on where a run was resumed.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

from dmd2_fast import dispatch

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
NUM_ROUNDS = 10
MASK = 0xFFFFFFFF
NORMAL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Stream(IntEnum):
    """What a random number is for: draws of different streams are independent."""

    DATA_ORDER = 0
    AUGMENTATION = 1
    DMD_TIME = 2
    DMD_NOISE = 3
    DENOISING_TIME = 4
    DENOISING_NOISE = 5
    GAN_FAKE_TIME = 6
    GAN_FAKE_NOISE = 7
    GAN_REAL_TIME = 8
    GAN_REAL_NOISE = 9
    R1 = 10
    ROLLOUT_INDEX = 11
    GENERATOR_INPUT = 12
    PAIR_ORDER = 13
    INPUT_SOURCE = 14
    INPUT_NOISE = 15
    ROLLOUT_STEP = 16
    """Rollout step i draws from ROLLOUT_STEP + i, up to 47."""
    USER = 64
    """This number and all above it are never drawn from by the library."""


@dataclass(frozen=True)
class NoiseKey:
    """Names one family of random numbers: everything but the sample and the element.

    Raises ValueError for a seed outside [0, 2^64) or a step or stream outside [0, 2^32).
    """

    seed: int
    """The run's seed, in [0, 2^64)."""
    step: int = 0
    """The training iteration (an epoch, for data order), in [0, 2^32)."""
    stream: int = 0
    """What the numbers are for, in [0, 2^32); see Stream."""

    def __post_init__(self) -> None:
        for name, value, bits in (("seed", self.seed, 64), ("step", self.step, 32), ("stream", self.stream, 32)):
            if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
                raise ValueError(f"NoiseKey {name}: got {value!r}, expected an integer in [0, 2^{bits})")
            if value < 0 or value >= 1 << bits:
                raise ValueError(f"NoiseKey {name}: got {value}, expected an integer in [0, 2^{bits})")

    def at(self, step: int) -> "NoiseKey":
        """The same key at another step."""
        return replace(self, step=step)

    def fork(self, stream: int) -> "NoiseKey":
        """The same key for another stream."""
        return replace(self, stream=stream)


@functools.lru_cache(maxsize=64)
def _constants(seed: int, device: torch.device) -> tuple[Tensor, tuple[Tensor, ...], Tensor, Tensor]:
    """Multipliers (2, 1, 1), one key (2, 1, 1) a round, shift and mask as 0-d tensors (cheaper than numbers)."""
    words = (seed & MASK, seed >> 32 & MASK)
    keys = [
        [[[(word + i * increment) & MASK]] for word, increment in zip(words, KEY_INCREMENTS, strict=True)]
        for i in range(NUM_ROUNDS)
    ]
    multipliers = torch.tensor([[[m]] for m in MULTIPLIERS], dtype=torch.int64, device=device)
    rounds = torch.tensor(keys, dtype=torch.int64, device=device).unbind()
    return multipliers, rounds, torch.tensor(32), torch.tensor(MASK)


def philox_rounds(even: Tensor, odd: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Ten rounds on counters even = (c0, c2) and odd = (c1, c3), int64 (2, N, C) each or broadcasting to that.

    Returns (w0, w2) and (w1, w3), of which only the low 32 bits of the latter are the words. A round is
    even, odd = flip(high(even * multipliers)) ^ odd ^ key, flip(low(even * multipliers)).
    The product of two 32-bit words fits the 64 bits of int64 and wraps there, so its two halves are exact whatever the
    sign. Bits above 32 are let run on in `odd` and cut once, where they would reach the next product.
    """
    multipliers, keys, shift, mask = _constants(seed, even.device)
    for key in keys:
        product = (even * multipliers).flip(0)
        even = (product >> shift).bitwise_xor_(odd).bitwise_xor_(key).bitwise_and_(mask)
        odd = product
    return even, odd


def _philox(sample_ids: Tensor, num_elements: int, seed: int, step: int, stream: int) -> tuple[Tensor, Tensor]:
    """The words for num_elements elements of each sample, as philox_rounds gives them, (2, N, counters)."""
    device, num_samples, num_counters = sample_ids.device, sample_ids.shape[0], -(-num_elements // 4)
    even = torch.empty((2, num_samples, num_counters), dtype=torch.int64, device=device)
    even[0] = torch.arange(num_counters, device=device)
    even[1].fill_(step)
    odd = torch.empty((2, num_samples, 1), dtype=torch.int64, device=device)
    odd[0, :, 0] = sample_ids
    odd[1].fill_(stream)
    return philox_rounds(even, odd, seed)


def _flatten(words: Tensor, sample_shape: Sequence[int]) -> Tensor:
    """(N, num_counters, ...) in element order to (N, *sample_shape): the last counter's surplus is dropped."""
    num_elements = math.prod(sample_shape)
    rows = words.reshape(words.shape[0], math.prod(words.shape[1:]))
    if rows.shape[1] != num_elements:
        rows = rows[:, :num_elements].contiguous()
    return rows.view(words.shape[0], *sample_shape)


def check_range(sample_ids: Tensor | None) -> None:
    """ValueError for ids outside [0, 2^32). On the CPU only: reading from a GPU would make every draw wait for it."""
    if sample_ids is not None and sample_ids.device.type == "cpu" and bool((sample_ids >> 32).any()):
        low, high = sample_ids.min().item(), sample_ids.max().item()
        raise ValueError(f"sample_ids: got values from {low} to {high}, expected positions in [0, 2^32)")


def _uniform_of(words: Tensor) -> Tensor:
    """u of unsigned words, f32. The product with 2^-32 is exact, so the sum rounds once: this is the fma."""
    return words.to(torch.float32).mul_(2.0**-32).add_(2.0**-33)


def philox_words(sample_ids: Tensor, num_words: int, key: NoiseKey) -> Tensor:
    """The raw words, (N, num_words) int64 in [0, 2^32), in element order: for tests and for other distributions."""
    check_range(sample_ids)
    even, odd = _philox(sample_ids, num_words, key.seed, key.step, key.stream)
    words = torch.stack((even, odd & MASK), dim=-1).movedim(0, 2)
    return _flatten(words, (num_words,))


def normal_reference(
    sample_ids: Tensor, sample_shape: Sequence[int], seed: int, step: int, stream: int, dtype: torch.dtype
) -> Tensor:
    """Plain PyTorch normals. f64 takes logarithm, cosine and product in f64, from the same f32 u."""
    even, odd = _philox(sample_ids, math.prod(sample_shape), seed, step, stream)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    radius = _uniform_of(even).to(working).log_().mul_(-2.0).sqrt_()
    # The conversion to int32 keeps the low word and reads it as signed.
    theta = odd.to(torch.int32).to(working).mul_(2.0 * math.pi * 2.0**-32)
    pairs = torch.empty((*even.shape[1:], 2), dtype=working.to_complex(), device=even.device)
    torch.polar(radius, theta, out=pairs.permute(2, 0, 1))
    return _flatten(torch.view_as_real(pairs), sample_shape).to(dtype)


def uniform_reference(sample_ids: Tensor, sample_shape: Sequence[int], seed: int, step: int, stream: int) -> Tensor:
    """Plain PyTorch uniforms, f32."""
    even, odd = _philox(sample_ids, math.prod(sample_shape), seed, step, stream)
    words = torch.stack((even, odd & MASK), dim=-1).movedim(0, 2)
    return _flatten(_uniform_of(words), sample_shape)


_normal = dispatch.define(
    "philox_normal",
    "(Tensor sample_ids, SymInt[] sample_shape, SymInt seed, SymInt step, SymInt stream, ScalarType dtype) -> Tensor",
    reference=normal_reference,
    fake=lambda sample_ids, sample_shape, seed, step, stream, dtype: sample_ids.new_empty(
        (sample_ids.shape[0], *sample_shape), dtype=dtype
    ),
    check=lambda sample_ids, *_: check_range(sample_ids),
)
_uniform = dispatch.define(
    "philox_uniform",
    "(Tensor sample_ids, SymInt[] sample_shape, SymInt seed, SymInt step, SymInt stream) -> Tensor",
    reference=uniform_reference,
    fake=lambda sample_ids, sample_shape, seed, step, stream: sample_ids.new_empty(
        (sample_ids.shape[0], *sample_shape), dtype=torch.float32
    ),
    check=lambda sample_ids, *_: check_range(sample_ids),
)


def key_words(key: NoiseKey) -> tuple[int, int, int]:
    """(seed, step, stream) as operators take them: a seed of 2^63 or more wraps to the int64 of the same bits."""
    seed = key.seed if key.seed < 1 << 63 else key.seed - (1 << 64)
    return seed, key.step, key.stream


def check_sample_ids(sample_ids: Tensor, num_samples: int | None = None) -> None:
    """Raises ValueError unless sample_ids is an int64 vector, of length num_samples where that is given."""
    expected = "(N,)" if num_samples is None else f"({num_samples},)"
    if not isinstance(sample_ids, Tensor):
        raise ValueError(f"sample_ids: got {type(sample_ids).__name__}, expected an int64 tensor {expected}")
    if sample_ids.dtype != torch.int64 or sample_ids.dim() != 1:
        got = f"{sample_ids.dtype} of shape {tuple(sample_ids.shape)}"
        raise ValueError(f"sample_ids: got {got}, expected torch.int64 of shape {expected}")
    if num_samples is not None and sample_ids.shape[0] != num_samples:
        raise ValueError(f"sample_ids: got {sample_ids.shape[0]} ids, expected one for each of {num_samples} samples")


def _check_draw(sample_ids: Tensor, sample_shape: Sequence[int], key: NoiseKey) -> None:
    check_sample_ids(sample_ids)
    if not isinstance(key, NoiseKey):
        raise ValueError(f"key: got {type(key).__name__}, expected a NoiseKey")
    if isinstance(sample_shape, int):
        raise ValueError(f"sample_shape: got {sample_shape}, expected a sequence of sizes such as ({sample_shape},)")
    for size in sample_shape:
        if size < 0:
            raise ValueError(f"sample_shape: got {tuple(sample_shape)}, expected sizes of 0 or more")


def philox_normal(
    sample_ids: Tensor, sample_shape: Sequence[int], key: NoiseKey, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normals (N, *sample_shape) of `dtype`, on the device of sample_ids; see the module for the formula.

    sample_ids: (N,) int64 in [0, 2^32), each sample's position in the global batch (the range is checked on the CPU
    only). dtype: f16, bf16, f32 (computed in f32 and rounded once) or f64 (computed in f64). An element depends only on
    (key, its sample id, its position in the sample). Raises ValueError for other dtypes, shapes and ids.
    """
    _check_draw(sample_ids, sample_shape, key)
    if dtype not in NORMAL_DTYPES:
        raise ValueError(f"dtype: got {dtype}, expected one of {', '.join(map(str, NORMAL_DTYPES))}")
    return _normal(sample_ids, list(sample_shape), *key_words(key), dtype)


def philox_uniform(sample_ids: Tensor, sample_shape: Sequence[int], key: NoiseKey) -> Tensor:
    """Uniforms in (0, 1], (N, *sample_shape) f32, on the device of sample_ids: for times and indices.

    The arguments and errors are those of philox_normal. 1 itself occurs (once in 2^25 draws): floor(u * n) of an index
    in [0, n) needs a clamp to n - 1.
    """
    _check_draw(sample_ids, sample_shape, key)
    return _uniform(sample_ids, list(sample_shape), *key_words(key))
