"""The noise stream in plain numpy, written from Salmon et al. (2011) and the definition of the stream alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def words(sample_id: int, num_words: int, seed: int, step: int, stream: int, first: int = 0) -> np.ndarray:
    """Words first .. first + num_words - 1 of one sample, uint32, in Python's unbounded integers; 4 divides first."""
    out: list[int] = []
    for counter in range((num_words + 3) // 4):
        c = [first // 4 + counter, sample_id, step, stream]
        k = [seed & MASK, (seed >> 32) & MASK]
        for _ in range(10):
            high0, low0 = divmod(0xD2511F53 * c[0], 1 << 32)
            high1, low1 = divmod(0xCD9E8D57 * c[2], 1 << 32)
            c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
            k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
        out += c
    return np.array(out[:num_words], dtype=np.uint32)


def normals(
    sample_id: int, count: int, seed: int, step: int, stream: int, first: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(count,) float64 normals from element `first` on, a multiple of 4, and the radius of each, by which errors are
    judged. u alone is f32, by definition.
    """
    w = words(sample_id, -(-count // 4) * 4, seed, step, stream, first).reshape(-1, 2)
    # f32(w) * 2^-32 is exact, so the fused product and sum round once: f64 holds the sum exactly before that.
    u = (w[:, 0].astype(np.float32).astype(np.float64) * 2.0**-32 + 2.0**-33).astype(np.float32).astype(np.float64)
    angle = 2 * np.pi * w[:, 1].view(np.int32).astype(np.float64) * 2.0**-32
    radius = np.sqrt(-2 * np.log(u))
    values = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
    return values[:count], np.repeat(radius, 2)[:count]


def noise(
    sample_ids: Sequence[int], shape: Sequence[int], key: tuple[int, int, int], small: float, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Normals of (seed, step, stream) and the error that the stream's definition allows each, both (N, *shape) f64.

    first: the element that the shape begins with.
    small: what is allowed where the radius is below .1: 3e-5 on CPUs, 7e-4 with a GPU's fast functions.
    """
    size = math.prod(shape)
    draws = [normals(int(i), size, *key, first) for i in sample_ids]
    values, radius = (np.stack([draw[i] for draw in draws]).reshape(-1, *shape) for i in (0, 1))
    device = torch.get_default_device()
    return torch.from_numpy(values).to(device), torch.from_numpy(np.where(radius >= 0.1, 4e-6, small)).to(device)
