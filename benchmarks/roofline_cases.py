"""The operators of the roofline, at the sizes of its table: each a call of the public function on CPU tensors.

Values do not matter, nothing runs: only dtypes, shapes, strides and alignments reach the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import dmd2_fast


@dataclass(frozen=True)
class Case:
    """An operator on a tensor x of `shape`: `call` takes x, forward and backward as it likes."""

    name: str
    shape: tuple[int, ...]
    call: Callable[[Tensor], Any]
    # How often the loops of a kernel run, in the order of their addresses, from its compile-time constants.
    trips: dict[str, Callable[[dict[str, Any]], tuple[int, ...]]] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)


KEY = dmd2_fast.NoiseKey(1)


def keyed(x: Tensor) -> dict[str, Any]:
    return {"key": KEY, "sample_ids": torch.arange(x.shape[0])}


def levels(x: Tensor) -> dict[str, Tensor]:
    return {"alpha": torch.ones(x.shape[0]), "sigma": torch.ones(x.shape[0])}


def dmd_loss(x: Tensor) -> None:
    others = [torch.empty_like(x) for _ in range(4)]
    loss = dmd2_fast.dmd_loss(x.requires_grad_(), *others, **levels(x), prediction_type="epsilon", guidance_scale=8.0)
    loss.backward()


def denoising_loss(x: Tensor) -> None:
    x0 = torch.empty_like(x)
    loss = dmd2_fast.denoising_loss(x.requires_grad_(), x0, **levels(x), prediction_type="epsilon", **keyed(x))
    loss.backward()


def renoise(x: Tensor) -> None:
    next_levels = {f"next_{name}": value for name, value in levels(x).items()}
    dmd2_fast.renoise(x, torch.empty_like(x), **levels(x), **next_levels, prediction_type="epsilon", **keyed(x))


def group_norm_silu(x: Tensor) -> None:
    channels = x.shape[1]
    parameters = [torch.ones(channels, dtype=x.dtype, requires_grad=True) for _ in range(2)]
    out = dmd2_fast.group_norm_silu(x.requires_grad_(), *parameters, 32)
    out.backward(torch.empty_like(out))


def gan_head_loss(x: Tensor) -> None:
    channels = x.shape[1]
    sizes = (channels, channels, channels, 1)
    parameters = [torch.ones(size, dtype=x.dtype, requires_grad=True) for size in sizes]
    parameters[2] = parameters[2].detach().reshape(1, channels).requires_grad_()
    loss, _ = dmd2_fast.gan_head_loss(x.requires_grad_(), *parameters, 32, sign=-1)
    loss.backward()


# A group of 40 channels in 32 x 32 positions: tiles for mean, variance and result; backward, channels and in
# them positions for the sums, then tiles. Sums of 8 samples are folded.
GROUP_TRIPS: dict[str, Callable[[dict[str, Any]], tuple[int, ...]]] = {
    "group_forward": lambda k: (-(-40 // k["BLOCK_C"]) * -(-1024 // k["BLOCK_S"]),) * 3,
    "group_backward": lambda k: (
        -(-40 // k["BLOCK_C"]),
        -(-1024 // k["BLOCK_S"]),
        -(-40 // k["BLOCK_C"]) * -(-1024 // k["BLOCK_S"]),
    ),
    "fold": lambda k: (-(-8 // k["BLOCK_R"]),),
}
# 32 groups forward, 64 samples backward.
HEAD_TRIPS: dict[str, Callable[[dict[str, Any]], tuple[int, ...]]] = {
    "head_forward": lambda k: (-(-32 // k["BLOCK_G"]),),
    "head_backward": lambda k: (-(-64 // k["BLOCK_N"]),),
}
LATENTS = [(8, 4, 128, 128), (64, 4, 128, 128)]  # SDXL's
CASES = [
    *(
        Case(name, shape, call)
        for name, call in [
            ("philox_normal", lambda x: dmd2_fast.philox_normal(torch.arange(x.shape[0]), x.shape[1:], KEY, x.dtype)),
            ("add_noise", lambda x: dmd2_fast.add_noise(x, **levels(x), **keyed(x))),
            ("renoise", renoise),
            ("r1_perturb", lambda x: dmd2_fast.r1_perturb(x, 0.1, **keyed(x))),
            ("dmd_loss", dmd_loss),
            ("denoising_loss", denoising_loss),
        ]
        for shape in LATENTS
    ),
    Case("group_norm_silu", (8, 1280, 32, 32), group_norm_silu, GROUP_TRIPS, dtypes=(torch.bfloat16,)),
    Case("gan_head_loss", (64, 1280), gan_head_loss, HEAD_TRIPS),
]
