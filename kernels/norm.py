"""group_norm_silu in Triton, forward and backward: f32 inside, rounded once at the store.

Legend: N batch, C channels, S positions (product of the trailing sizes), G groups, K = C / G channels a group.

A group that fits a multiprocessor's cache is one program's: it goes over its K x S elements three times forward (mean,
sum of (x - mean)^2, result) and twice backward (sums, gradient), of which DRAM sees the first; one launch forward, two
backward. Larger groups, and wide channels_last images, where a group's channels are short pieces of each position's
row, are cut into tiles held in registers (`_norm_tiles`). No atomics: the same bits every time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _norm_tiles
from ._launch import IS_COMPILED, laid_out_like, launch
from ._norm_tiles import load_tile, total
from ._silu import sigmoid, silu_slope
from ._store import rounded

# From ahead-of-time compilation for sm_80 and sm_90: elements a program holds at once, elements a thread, and how wide
# to begin with along positions. Backward, a warp has whole rows of 256, so that sums over positions need no barrier.
_FORWARD = (8192, 32, 8192)
_BACKWARD = (2048, 16, 256)
_FOLD_ROWS, _FOLD_CHANNELS = 64, 16
# Elements of the largest group that one program has, contiguous: 128 KB in 16 bits. In channels_last images, where its
# channels are a short piece of each position's row, smaller ones, for which further launches would cost more.
_LARGEST_GROUP = 65536
_LARGEST_GROUP_CHANNELS_LAST = 16384


@triton.jit
def _tile(
    tile,
    c,
    s,
    num_positions,
    stride_channel,
    stride_position,
    GROUP_CHANNELS: tl.constexpr,
    BLOCK_C,
    BLOCK_S: tl.constexpr,
):
    """First channel, offset and mask of the group's tile of that number: tiles go along positions first."""
    row_tiles = tl.cdiv(num_positions, BLOCK_S)
    c0 = tile // row_tiles * BLOCK_C
    s0 = tile % row_tiles * BLOCK_S
    offset = tl.cast(c0, tl.int64) * stride_channel + tl.cast(s0, tl.int64) * stride_position
    return c0, offset, (c < GROUP_CHANNELS - c0) & (s < num_positions - s0)


@triton.jit
def _group_forward_kernel(
    x_ptr,  # (N, C, S), strides (C * S, stride_channel, stride_position)
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    y_ptr,  # as x
    mean_ptr,  # (N, G) f32
    rstd_ptr,  # (N, G) f32
    num_groups,  # G
    num_positions,  # S
    stride_channel,
    stride_position,
    eps,
    GROUP_CHANNELS: tl.constexpr,  # K
    EVEN: tl.constexpr,  # tiles of BLOCK_C x BLOCK_S have no rest in K x S
    FAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    program = tl.program_id(0)
    first_channel = program % num_groups * GROUP_CHANNELS
    sample = tl.cast(program // num_groups, tl.int64)
    start = sample * num_groups * GROUP_CHANNELS * num_positions + tl.cast(first_channel, tl.int64) * stride_channel
    c = tl.arange(0, BLOCK_C)[:, None]
    s = tl.arange(0, BLOCK_S)[None, :]
    element = start + tl.cast(c, tl.int64) * stride_channel + tl.cast(s, tl.int64) * stride_position
    num_tiles = tl.cdiv(num_positions, BLOCK_S) * tl.cdiv(GROUP_CHANNELS, BLOCK_C)
    count = GROUP_CHANNELS * 1.0 * num_positions

    sums = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    for tile in range(num_tiles):
        c0, offset, mask = _tile(
            tile, c, s, num_positions, stride_channel, stride_position, GROUP_CHANNELS, BLOCK_C, BLOCK_S
        )
        sums += load_tile(x_ptr + offset + element, mask, EVEN)
    mean = tl.div_rn(total(sums), count)

    sums = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    for tile in range(num_tiles):
        c0, offset, mask = _tile(
            tile, c, s, num_positions, stride_channel, stride_position, GROUP_CHANNELS, BLOCK_C, BLOCK_S
        )
        difference = load_tile(x_ptr + offset + element, mask, EVEN) - mean
        if not EVEN:
            difference = tl.where(mask, difference, 0.0)
        sums = tl.fma(difference, difference, sums)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(total(sums), count) + eps))
    tl.store(mean_ptr + program, mean)
    tl.store(rstd_ptr + program, rstd)

    for tile in range(num_tiles):
        c0, offset, mask = _tile(
            tile, c, s, num_positions, stride_channel, stride_position, GROUP_CHANNELS, BLOCK_C, BLOCK_S
        )
        x = load_tile(x_ptr + offset + element, mask, EVEN)
        weight = load_tile(weight_ptr + first_channel + c0 + c, c < GROUP_CHANNELS - c0, EVEN)
        bias = load_tile(bias_ptr + first_channel + c0 + c, c < GROUP_CHANNELS - c0, EVEN)
        # Not x * scale + shift: at a large mean the two would cancel.
        z = tl.fma(x - mean, weight * rstd, bias)
        y = rounded(z * sigmoid(z, FAST), y_ptr.dtype.element_ty, FAST)
        tl.store(y_ptr + offset + element, y, mask=None if EVEN else mask)


@triton.jit
def _group_backward_kernel(
    grad_ptr,  # (N, C, S), strides as x
    x_ptr,  # (N, C, S), strides (C * S, stride_channel, stride_position)
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    mean_ptr,  # (N, G) f32
    rstd_ptr,  # (N, G) f32
    grad_x_ptr,  # as x
    sums_ptr,  # (2, N, C) f32: of grad_z, and of grad_z * normalised, over positions
    num_samples,  # N
    num_groups,  # G
    num_positions,  # S
    stride_channel,
    stride_position,
    GROUP_CHANNELS: tl.constexpr,  # K
    EVEN: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    program = tl.program_id(0)
    first_channel = program % num_groups * GROUP_CHANNELS
    sample = tl.cast(program // num_groups, tl.int64)
    num_channels = num_groups * GROUP_CHANNELS
    start = sample * num_channels * num_positions + tl.cast(first_channel, tl.int64) * stride_channel
    c = tl.arange(0, BLOCK_C)[:, None]
    s = tl.arange(0, BLOCK_S)[None, :]
    element = start + tl.cast(c, tl.int64) * stride_channel + tl.cast(s, tl.int64) * stride_position
    mean = tl.load(mean_ptr + program)
    rstd = tl.load(rstd_ptr + program)
    row_ptr = sums_ptr + sample * num_channels + first_channel + c

    # Of weight * grad_z, and of that times normalised, over the group.
    group_sums = tl.zeros((BLOCK_C, 1), tl.float32)
    group_projections = tl.zeros((BLOCK_C, 1), tl.float32)
    for c0 in range(0, GROUP_CHANNELS, BLOCK_C):
        weight = load_tile(weight_ptr + first_channel + c0 + c, c < GROUP_CHANNELS - c0, EVEN)
        bias = load_tile(bias_ptr + first_channel + c0 + c, c < GROUP_CHANNELS - c0, EVEN)
        sums = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
        projections = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
        for s0 in range(0, num_positions, BLOCK_S):
            offset = c0 * stride_channel + tl.cast(s0, tl.int64) * stride_position
            mask = (c < GROUP_CHANNELS - c0) & (s < num_positions - s0)
            difference = load_tile(x_ptr + offset + element, mask, EVEN) - mean
            grad_z = load_tile(grad_ptr + offset + element, mask, EVEN) * silu_slope(
                difference, rstd, weight, bias, FAST
            )
            sums += grad_z
            projections = tl.fma(grad_z, difference, projections)
        channel_sums = tl.sum(sums, 1, keep_dims=True)
        channel_projections = tl.sum(projections, 1, keep_dims=True) * rstd
        row_mask = c < GROUP_CHANNELS - c0
        tl.store(row_ptr + c0, channel_sums, mask=row_mask)
        tl.store(row_ptr + num_samples * tl.cast(num_channels, tl.int64) + c0, channel_projections, mask=row_mask)
        group_sums = tl.fma(channel_sums, weight, group_sums)
        group_projections = tl.fma(channel_projections, weight, group_projections)

    count = GROUP_CHANNELS * 1.0 * num_positions
    # The gradient is rstd * (weight * grad_z - mean of weight * grad_z - normalised * mean of that times normalised).
    constant = -tl.div_rn(total(group_sums), count)
    slope = -rstd * tl.div_rn(total(group_projections), count)
    num_tiles = tl.cdiv(num_positions, BLOCK_S) * tl.cdiv(GROUP_CHANNELS, BLOCK_C)
    for tile in range(num_tiles):
        c0, offset, mask = _tile(
            tile, c, s, num_positions, stride_channel, stride_position, GROUP_CHANNELS, BLOCK_C, BLOCK_S
        )
        weight = load_tile(weight_ptr + first_channel + c0 + c, c < GROUP_CHANNELS - c0, EVEN)
        bias = load_tile(bias_ptr + first_channel + c0 + c, c < GROUP_CHANNELS - c0, EVEN)
        difference = load_tile(x_ptr + offset + element, mask, EVEN) - mean
        slope_z = silu_slope(difference, rstd, weight, bias, FAST)
        grad_z = load_tile(grad_ptr + offset + element, mask, EVEN) * slope_z
        grad_x = rstd * tl.fma(grad_z, weight, tl.fma(difference, slope, constant))
        stored = rounded(grad_x, grad_x_ptr.dtype.element_ty, FAST)
        tl.store(grad_x_ptr + offset + element, stored, mask=None if EVEN else mask)


@triton.jit
def _fold_kernel(
    sums_ptr,  # (2, num_rows, C) f32
    grad_weight_ptr,  # (C,)
    grad_bias_ptr,  # (C,)
    num_rows,
    num_channels,  # C
    FAST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums over the rows: the first half's are the bias's gradient, the second's the weight's."""
    row = tl.arange(0, BLOCK_R)[:, None]
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = channel < num_channels
    grad_bias = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    grad_weight = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    half = tl.cast(num_channels, tl.int64) * num_rows
    for first in range(0, num_rows, BLOCK_R):
        pointer = sums_ptr + tl.cast(first + row, tl.int64) * num_channels + channel[None, :]
        tile_mask = (first + row < num_rows) & mask[None, :]
        grad_bias += tl.load(pointer, mask=tile_mask, other=0.0)
        grad_weight += tl.load(pointer + half, mask=tile_mask, other=0.0)
    stored = rounded(tl.sum(grad_weight, 0), grad_weight_ptr.dtype.element_ty, FAST)
    tl.store(grad_weight_ptr + channel, stored, mask=mask)
    stored = rounded(tl.sum(grad_bias, 0), grad_bias_ptr.dtype.element_ty, FAST)
    tl.store(grad_bias_ptr + channel, stored, mask=mask)


class _Layout(NamedTuple):
    """How a program walks a group: strides in elements, and its blocks as the kernels' keyword arguments."""

    stride_channel: int
    stride_position: int
    GROUP_CHANNELS: int
    EVEN: bool
    BLOCK_C: int
    BLOCK_S: int
    num_warps: int


def _walkable(like: Tensor) -> Tensor:
    """The tensor where it is contiguous or channels_last, else an empty contiguous one to work in."""
    if like.is_contiguous() or like.movedim(1, -1).is_contiguous():
        return like
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _layout(x: Tensor, num_groups: int, tile: tuple[int, int, int]) -> _Layout:
    num_channels, num_positions = x.shape[1], math.prod(x.shape[2:])
    group_channels = num_channels // num_groups
    elements, per_thread, width = tile
    whole_row = triton.next_power_of_2(num_positions)
    if x.is_contiguous() and num_positions > 1:
        strides = num_positions, 1
        widest = min(triton.next_power_of_2(group_channels), elements // min(whole_row, width))
        # The fewest idle threads, and of equals the largest.
        block_c = min((1 << i for i in range(widest.bit_length())), key=lambda block: (-group_channels % block, -block))
    else:
        strides = 1, num_channels
        block_c = min(triton.next_power_of_2(group_channels), elements)
    block_s = min(whole_row, elements // block_c)
    is_even = group_channels % block_c == 0 and num_positions % block_s == 0
    num_warps = max(1, block_c * block_s // per_thread // 32)
    return _Layout(*strides, group_channels, is_even, block_c, block_s, num_warps)


def _is_one_programs(x: Tensor, num_groups: int) -> bool:
    """Whether a program has a group alone, or x is cut into tiles."""
    group_size = x.numel() // (x.shape[0] * num_groups)
    return group_size <= (_LARGEST_GROUP if x.is_contiguous() else _LARGEST_GROUP_CHANNELS_LAST)


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y like x, mean (N, G) f32, 1 / standard deviation (N, G) f32).

    x (N, C, *), weight and bias (C,), each f32, bf16 or f16. x and y contiguous or channels_last are used in place, any
    others copied. Arguments are checked by `dmd2_fast.group_norm_silu`.
    """
    out = torch.empty_like(x)
    y = _walkable(out)
    mean = torch.empty((x.shape[0], num_groups), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    arguments = (laid_out_like(x, y), weight.contiguous(), bias.contiguous(), y, mean, rstd)
    if out.numel() == 0:
        mean.fill_(torch.nan)
        rstd.fill_(torch.nan)
    elif _is_one_programs(y, num_groups):
        launch(
            _group_forward_kernel,
            mean.numel(),
            x,
            *arguments,
            num_groups,
            math.prod(x.shape[2:]),
            eps=eps,
            FAST=IS_COMPILED,
            **_layout(y, num_groups, _FORWARD)._asdict(),
        )
    else:
        _norm_tiles.forward(*arguments, eps)
    return out if y is out else out.copy_(y), mean, rstd


def group_norm_silu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients like x, weight and bias; grad (N, C, *) of any dtype and strides, the others as forward had them."""
    out = torch.empty_like(x)
    grad_x = _walkable(out)
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
    num_samples, num_channels = x.shape[:2]
    num_groups = mean.shape[1]
    saved = (laid_out_like(grad, grad_x), laid_out_like(x, grad_x), weight.contiguous(), bias.contiguous(), mean, rstd)
    if out.numel() == 0:
        sums = mean.new_empty((2, 0, num_channels))
    elif _is_one_programs(grad_x, num_groups):
        sums = mean.new_empty((2, num_samples, num_channels))
        launch(
            _group_backward_kernel,
            mean.numel(),
            x,
            *saved,
            grad_x,
            sums,
            num_samples,
            num_groups,
            math.prod(x.shape[2:]),
            FAST=IS_COMPILED,
            **_layout(grad_x, num_groups, _BACKWARD)._asdict(),
        )
    else:
        sums = _norm_tiles.backward(*saved, grad_x)
    launch(
        _fold_kernel,
        triton.cdiv(num_channels, _FOLD_CHANNELS),
        x,
        sums,
        grad_weight,
        grad_bias,
        sums.shape[1],
        num_channels,
        FAST=IS_COMPILED,
        BLOCK_R=_FOLD_ROWS,
        BLOCK_C=_FOLD_CHANNELS,
    )
    return out if grad_x is out else out.copy_(grad_x), grad_weight, grad_bias
