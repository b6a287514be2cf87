"""group_norm_silu for groups that one program should not have alone: cut into tiles, each held in registers.

Forward: every tile's mean and sum of (x - mean)^2 by channel; these joined by group (Chan, Golub and LeVeque, 1979: a
sum of squares about the tile's own mean is exact where E[x^2] - E[x]^2 is not); the result. Backward: every tile's sums
by channel, their sums by group, the gradient. x is read twice each way, the second time from the end backwards, where
the cache still has it. Legend as in `norm`, and T tiles along positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import IS_COMPILED, launch
from ._silu import sigmoid, silu_slope
from ._store import rounded

# Channels and positions of a tile, with 8 warps. From ahead-of-time compilation for sm_80 and sm_90.
_CONTIGUOUS = (4, 2048)
_CHANNELS_LAST = (32, 256)
_NUM_WARPS = 8
_PARTS = 64  # partial results of a channel that are joined at a time


@triton.jit
def load_tile(pointer, mask, EVEN: tl.constexpr):
    """A tile in f32, 0 outside the mask, which EVEN says is true throughout."""
    values = tl.load(pointer) if EVEN else tl.load(pointer, mask=mask, other=0.0)
    return values.to(tl.float32)


@triton.jit
def total(block):
    """The sum of a 2-D block."""
    return tl.sum(tl.sum(block, 1), 0)


@triton.jit
def _locate(
    program,
    num_channels,
    num_positions,
    stride_channel,
    stride_position,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Of a tile: sample, row of its partial results, channels (BLOCK_C, 1), offsets, mask, positions it has."""
    channel_tiles = tl.cdiv(num_channels, BLOCK_C)
    row = program // channel_tiles
    num_tiles = tl.cdiv(num_positions, BLOCK_S)
    sample = tl.cast(row // num_tiles, tl.int64)
    first = tl.cast(row % num_tiles, tl.int64) * BLOCK_S
    channel = program % channel_tiles * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    position = tl.arange(0, BLOCK_S)[None, :]
    start = sample * num_channels * num_positions + first * stride_position
    element = start + tl.cast(channel, tl.int64) * stride_channel + tl.cast(position, tl.int64) * stride_position
    left = tl.minimum(num_positions - first, BLOCK_S).to(tl.int32)
    return sample, tl.cast(row, tl.int64), channel, element, (channel < num_channels) & (position < left), left


@triton.jit
def _of_channels(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, group, channel, in_range, EVEN: tl.constexpr):
    """Of a tile's channels: mean and rstd of the group of each, weight, bias; (BLOCK_C, 1) f32."""
    mean = tl.load(mean_ptr + group, mask=in_range, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=in_range, other=0.0)
    weight = load_tile(weight_ptr + channel, in_range, EVEN)
    bias = load_tile(bias_ptr + channel, in_range, EVEN)
    return mean, rstd, weight, bias


@triton.jit
def _tile_statistics_kernel(
    x_ptr,  # (N, C, S), strides (C * S, stride_channel, stride_position)
    parts_ptr,  # (2, N, T, C) f32: mean, sum of (x - mean)^2
    half,  # N * T * C
    num_channels,  # C
    num_positions,  # S
    stride_channel,
    stride_position,
    EVEN: tl.constexpr,  # tiles of BLOCK_C x BLOCK_S have no rest in C x S
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    _, row, channel, element, mask, left = _locate(
        tl.program_id(0), num_channels, num_positions, stride_channel, stride_position, BLOCK_C, BLOCK_S
    )
    x = load_tile(x_ptr + element, mask, EVEN)
    mean = tl.div_rn(tl.sum(x, 1, keep_dims=True), left.to(tl.float32))
    difference = x - mean
    if not EVEN:
        difference = tl.where(mask, difference, 0.0)
    squares = tl.sum(difference * difference, 1, keep_dims=True)
    part = parts_ptr + row * num_channels + channel
    tl.store(part, mean, mask=channel < num_channels)
    tl.store(part + half, squares, mask=channel < num_channels)


@triton.jit
def _group_statistics_kernel(
    parts_ptr,  # (2, N, T, C) f32: mean, sum of (x - mean)^2
    mean_ptr,  # (N, G) f32
    rstd_ptr,  # (N, G) f32
    half,  # N * T * C
    num_groups,  # G
    num_positions,  # S
    num_tiles,  # T
    eps,
    GROUP_CHANNELS: tl.constexpr,  # K
    TILE_POSITIONS: tl.constexpr,  # all tiles but a sample's last have as many
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)[None, :]
    sample = tl.cast(program // num_groups, tl.int64)
    channel = program % num_groups * GROUP_CHANNELS + k
    part = parts_ptr + sample * num_tiles * num_groups * GROUP_CHANNELS + channel
    count = GROUP_CHANNELS * 1.0 * num_positions
    sums = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for first in range(0, num_tiles, BLOCK_T):
        tile = tl.cast(first + tl.arange(0, BLOCK_T)[:, None], tl.int64)
        mask = (tile < num_tiles) & (k < GROUP_CHANNELS)
        positions = tl.minimum(num_positions - tile * TILE_POSITIONS, TILE_POSITIONS).to(tl.float32)
        sums += positions * tl.load(part + tile * (num_groups * GROUP_CHANNELS), mask=mask, other=0.0)
    mean = tl.div_rn(total(sums), count)
    sums = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for first in range(0, num_tiles, BLOCK_T):
        tile = tl.cast(first + tl.arange(0, BLOCK_T)[:, None], tl.int64)
        mask = (tile < num_tiles) & (k < GROUP_CHANNELS)
        positions = tl.minimum(num_positions - tile * TILE_POSITIONS, TILE_POSITIONS).to(tl.float32)
        pointer = part + tile * (num_groups * GROUP_CHANNELS)
        difference = tl.load(pointer, mask=mask, other=0.0) - mean
        squares = tl.load(pointer + half, mask=mask, other=0.0)
        sums += tl.where(mask, squares + positions * difference * difference, 0.0)
    tl.store(mean_ptr + program, mean)
    tl.store(rstd_ptr + program, tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(total(sums), count) + eps)))


@triton.jit
def _tile_forward_kernel(
    x_ptr,  # (N, C, S), strides (C * S, stride_channel, stride_position)
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    mean_ptr,  # (N, G) f32
    rstd_ptr,  # (N, G) f32
    y_ptr,  # as x
    num_groups,  # G
    num_channels,  # C
    num_positions,  # S
    stride_channel,
    stride_position,
    GROUP_CHANNELS: tl.constexpr,  # K
    EVEN: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    sample, _, channel, element, mask, _ = _locate(
        program, num_channels, num_positions, stride_channel, stride_position, BLOCK_C, BLOCK_S
    )
    x = load_tile(x_ptr + element, mask, EVEN)
    in_range = channel < num_channels
    group = sample * num_groups + channel // GROUP_CHANNELS
    mean, rstd, weight, bias = _of_channels(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, group, channel, in_range, EVEN)
    z = tl.fma(x - mean, weight * rstd, bias)
    y = rounded(z * sigmoid(z, FAST), y_ptr.dtype.element_ty, FAST)
    tl.store(y_ptr + element, y, mask=None if EVEN else mask)


@triton.jit
def _tile_sums_kernel(
    grad_ptr,  # (N, C, S), strides as x
    x_ptr,  # (N, C, S), strides (C * S, stride_channel, stride_position)
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    mean_ptr,  # (N, G) f32
    rstd_ptr,  # (N, G) f32
    sums_ptr,  # (2, N, T, C) f32: of grad_z, and of grad_z * normalised
    half,  # N * T * C
    num_groups,  # G
    num_channels,  # C
    num_positions,  # S
    stride_channel,
    stride_position,
    GROUP_CHANNELS: tl.constexpr,  # K
    EVEN: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    sample, row, channel, element, mask, _ = _locate(
        tl.program_id(0), num_channels, num_positions, stride_channel, stride_position, BLOCK_C, BLOCK_S
    )
    x = load_tile(x_ptr + element, mask, EVEN)
    grad = load_tile(grad_ptr + element, mask, EVEN)
    in_range = channel < num_channels
    group = sample * num_groups + channel // GROUP_CHANNELS
    mean, rstd, weight, bias = _of_channels(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, group, channel, in_range, EVEN)
    difference = x - mean
    grad_z = grad * silu_slope(difference, rstd, weight, bias, FAST)
    pointer = sums_ptr + row * num_channels + channel
    tl.store(pointer, tl.sum(grad_z, 1, keep_dims=True), mask=in_range)
    tl.store(pointer + half, tl.sum(grad_z * difference, 1, keep_dims=True) * rstd, mask=in_range)


@triton.jit
def _group_sums_kernel(
    sums_ptr,  # (2, N, T, C) f32: of grad_z, and of grad_z * normalised
    weight_ptr,  # (C,)
    group_sums_ptr,  # (2, N, G) f32: means over the group of weight times these
    half,  # N * T * C
    num_samples,  # N
    num_groups,  # G
    num_positions,  # S
    num_tiles,  # T
    GROUP_CHANNELS: tl.constexpr,  # K
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)[None, :]
    sample = tl.cast(program // num_groups, tl.int64)
    channel = program % num_groups * GROUP_CHANNELS + k
    part = sums_ptr + sample * num_tiles * num_groups * GROUP_CHANNELS + channel
    weight = tl.load(weight_ptr + channel, mask=k < GROUP_CHANNELS, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    projections = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for first in range(0, num_tiles, BLOCK_T):
        tile = tl.cast(first + tl.arange(0, BLOCK_T)[:, None], tl.int64)
        mask = (tile < num_tiles) & (k < GROUP_CHANNELS)
        pointer = part + tile * (num_groups * GROUP_CHANNELS)
        sums += tl.load(pointer, mask=mask, other=0.0)
        projections += tl.load(pointer + half, mask=mask, other=0.0)
    count = GROUP_CHANNELS * 1.0 * num_positions
    tl.store(group_sums_ptr + program, tl.div_rn(total(sums * weight), count))
    pointer = group_sums_ptr + num_samples * num_groups + program
    tl.store(pointer, tl.div_rn(total(projections * weight), count))


@triton.jit
def _tile_backward_kernel(
    grad_ptr,  # (N, C, S), strides as x
    x_ptr,  # (N, C, S), strides (C * S, stride_channel, stride_position)
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    mean_ptr,  # (N, G) f32
    rstd_ptr,  # (N, G) f32
    group_sums_ptr,  # (2, N, G) f32
    grad_x_ptr,  # as x
    num_samples,  # N
    num_groups,  # G
    num_channels,  # C
    num_positions,  # S
    stride_channel,
    stride_position,
    GROUP_CHANNELS: tl.constexpr,  # K
    EVEN: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    sample, _, channel, element, mask, _ = _locate(
        program, num_channels, num_positions, stride_channel, stride_position, BLOCK_C, BLOCK_S
    )
    x = load_tile(x_ptr + element, mask, EVEN)
    grad = load_tile(grad_ptr + element, mask, EVEN)
    in_range = channel < num_channels
    group = sample * num_groups + channel // GROUP_CHANNELS
    mean, rstd, weight, bias = _of_channels(mean_ptr, rstd_ptr, weight_ptr, bias_ptr, group, channel, in_range, EVEN)
    constant = tl.load(group_sums_ptr + group, mask=in_range, other=0.0)
    slope = tl.load(group_sums_ptr + num_samples * num_groups + group, mask=in_range, other=0.0)
    difference = x - mean
    grad_z = grad * silu_slope(difference, rstd, weight, bias, FAST)
    grad_x = rstd * tl.fma(grad_z, weight, tl.fma(difference, -rstd * slope, -constant))
    tl.store(grad_x_ptr + element, rounded(grad_x, grad_x_ptr.dtype.element_ty, FAST), mask=None if EVEN else mask)


class Tiles(NamedTuple):
    """How x (N, C, *) is cut up."""

    num_programs: int
    num_tiles: int
    """T, along the positions of a sample."""
    num_channels: int
    num_positions: int
    arguments: dict[str, int]
    """The kernels' arguments for it, by name."""


def tiles_of(x: Tensor) -> Tiles:
    """x is contiguous or channels_last, and not empty."""
    num_samples, num_channels = x.shape[:2]
    num_positions = x.numel() // (num_samples * num_channels)
    is_contiguous = x.is_contiguous()
    channels, positions = _CONTIGUOUS if is_contiguous else _CHANNELS_LAST
    block_s = min(triton.next_power_of_2(num_positions), positions)
    block_c = min(triton.next_power_of_2(num_channels), channels * positions // block_s)
    block_s = min(triton.next_power_of_2(num_positions), channels * positions // block_c)
    num_tiles = triton.cdiv(num_positions, block_s)
    arguments = {
        "num_channels": num_channels,
        "num_positions": num_positions,
        "stride_channel": num_positions if is_contiguous else 1,
        "stride_position": 1 if is_contiguous else num_channels,
        "EVEN": num_channels % block_c == 0 and num_positions % block_s == 0,
        "BLOCK_C": block_c,
        "BLOCK_S": block_s,
        "num_warps": _NUM_WARPS,
    }
    num_programs = num_samples * num_tiles * triton.cdiv(num_channels, block_c)
    return Tiles(num_programs, num_tiles, num_channels, num_positions, arguments)


def _joined(group_channels: int) -> dict[str, int]:
    block_k = triton.next_power_of_2(group_channels)
    return {"GROUP_CHANNELS": group_channels, "BLOCK_T": max(1, min(_PARTS, 4096 // block_k)), "BLOCK_K": block_k}


def forward(x: Tensor, weight: Tensor, bias: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, eps: float) -> None:
    """Writes y, mean and rstd; x and y (N, C, *) of the same strides, contiguous or channels_last, and not empty."""
    tiles, num_groups = tiles_of(x), mean.shape[1]
    joined = _joined(tiles.num_channels // num_groups)
    half = x.shape[0] * tiles.num_tiles * tiles.num_channels
    parts = torch.empty(2 * half, dtype=torch.float32, device=x.device)
    launch(_tile_statistics_kernel, tiles.num_programs, x, x, parts, half, **tiles.arguments)
    launch(
        _group_statistics_kernel,
        mean.numel(),
        x,
        parts,
        mean,
        rstd,
        half,
        num_groups,
        tiles.num_positions,
        tiles.num_tiles,
        eps,
        TILE_POSITIONS=tiles.arguments["BLOCK_S"],
        **joined,
    )
    launch(
        _tile_forward_kernel,
        tiles.num_programs,
        x,
        x,
        weight,
        bias,
        mean,
        rstd,
        y,
        num_groups,
        GROUP_CHANNELS=joined["GROUP_CHANNELS"],
        FAST=IS_COMPILED,
        **tiles.arguments,
    )


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, grad_x: Tensor
) -> Tensor:
    """Writes grad_x and returns the sums (2, N * T, C) whose sums over the second axis are the bias's and the weight's
    gradient; grad, x and grad_x of the same strides, contiguous or channels_last, and not empty.
    """
    tiles, (num_samples, num_groups) = tiles_of(x), mean.shape
    joined = _joined(tiles.num_channels // num_groups)
    sums = torch.empty((2, num_samples * tiles.num_tiles, tiles.num_channels), dtype=torch.float32, device=x.device)
    group_sums = torch.empty((2, num_samples, num_groups), dtype=torch.float32, device=x.device)
    half = sums[0].numel()
    tile = {"GROUP_CHANNELS": joined["GROUP_CHANNELS"], "FAST": IS_COMPILED, **tiles.arguments}
    saved = (grad, x, weight, bias, mean, rstd)
    launch(_tile_sums_kernel, tiles.num_programs, x, *saved, sums, half, num_groups, **tile)
    launch(
        _group_sums_kernel,
        mean.numel(),
        x,
        sums,
        weight,
        group_sums,
        half,
        num_samples,
        num_groups,
        tiles.num_positions,
        tiles.num_tiles,
        **joined,
    )
    launch(_tile_backward_kernel, tiles.num_programs, x, *saved, group_sums, grad_x, num_samples, num_groups, **tile)
    return sums
