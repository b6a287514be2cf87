"""group_norm_silu's compiled code for sm_80 and sm_90: values against float64, bytes moved, no races."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import oracles
import ptxsim
import pytest
import test_norm
import torch
from oracles import DTYPES, random_tensor
from simulated import assert_clean, simulated

from dmd2_fast import group_norm_silu
from dmd2_fast.kernels import _norm_tiles, norm
from dmd2_fast.kernels._launch import launch as run

ONE_PROGRAM = ["_group_forward_kernel", "_group_backward_kernel", "_fold_kernel"]
TILES = [
    *("_tile_statistics_kernel", "_group_statistics_kernel", "_tile_forward_kernel"),
    *("_tile_sums_kernel", "_group_sums_kernel", "_tile_backward_kernel", "_fold_kernel"),
]


@pytest.fixture(params=[80, 90])
def arch(request):
    return request.param


@contextlib.contextmanager
def launching(arch: int, kernels: list[str], **options: object) -> Iterator[ptxsim.SimDevice]:
    """The operators inside run in the simulator; they are to launch these kernels, in order."""
    with simulated(arch, **options) as device:
        yield device
    assert [launch.name for launch in device.launches] == kernels
    assert_clean(device, len(kernels))


# Odd sizes beside such as wide accesses divide.
SHAPES = (((2, 12, 7, 3), 3), ((12, 6, 1, 1), 2), ((1, 80, 4, 8), 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "num_groups"), SHAPES)
def test_values_and_gradients(arch, shape, num_groups, layout, dtype):
    with launching(arch, ONE_PROGRAM, race="report", mufu="noisy"):
        test_norm.check(test_norm.inputs_of(shape, dtype, layout), num_groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "num_groups"), [((2, 6, 19, 33), 2), ((1, 64, 16, 32), 4)])
def test_groups_cut_into_tiles(arch, shape, num_groups, layout, dtype, monkeypatch):
    test_norm.cut_into_tiles(monkeypatch)
    with launching(arch, TILES, race="report", mufu="noisy"):
        test_norm.check(test_norm.inputs_of(shape, dtype, layout), num_groups)


@pytest.mark.parametrize("kernels", [ONE_PROGRAM, TILES])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large_mean(arch, layout, kernels, monkeypatch):
    if kernels is TILES:
        test_norm.cut_into_tiles(monkeypatch)
    inputs = test_norm.inputs_of((2, 12, 9, 9), torch.float32, layout, 1e4)
    with launching(arch, kernels[: kernels.index("_tile_sums_kernel") if kernels is TILES else 1]):
        ours = group_norm_silu(*inputs, 3)
    exact = oracles.group_norm_silu(*[t.double() for t in inputs], 3)
    assert (ours.double() - exact).abs().max() < 1e-6 * 1e4  # a rounding of the mean, and no more


def test_bytes_moved(arch):
    """(B, 1280, 32, 32) bf16: forward one read and one write, backward two reads and one write, of any size."""
    inputs = [t.requires_grad_() for t in test_norm.inputs_of((2, 1280, 32, 32), torch.bfloat16)]
    size = inputs[0].numel() * 2
    with launching(arch, ONE_PROGRAM, ctas=4) as device:
        y = group_norm_silu(*inputs, 32)
        torch.autograd.grad(y, inputs, torch.ones_like(y))
    forward, backward, fold = (launch.result for launch in device.launches)
    assert forward.dram["x_ptr"] == (size, 0)
    assert forward.dram["y_ptr"] == (0, size)
    assert backward.dram["x_ptr"] == backward.dram["grad_ptr"] == (size, 0)
    assert backward.dram["grad_x_ptr"] == (0, size)
    moved = [result.dram_read + result.dram_write for result in (forward, backward, fold)]
    assert moved[0] <= 2.01 * size
    assert moved[1] <= 3.01 * size
    assert moved[2] <= 0.01 * size
    assert forward.roofline(arch)["bound"] == backward.roofline(arch)["bound"] == "mem"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_than_2_to_31_elements(layout):
    """The last group and the last tile of tensors that 32-bit offsets do not reach; no more is ever in memory."""
    num_samples = 2**31 // 4096 + 1
    shape = (num_samples, 64, 8, 8) if layout == "contiguous" else (num_samples, 8, 8, 64)
    x, grad, y, grad_x = (torch.empty(shape, dtype=torch.bfloat16) for _ in range(4))
    if layout == "channels_last":
        x, grad, y, grad_x = (t.permute(0, 3, 1, 2) for t in (x, grad, y, grad_x))
    x[-1], grad[-1] = (random_tensor((64, 8, 8), torch.bfloat16, seed) for seed in range(2))
    weight, bias = (random_tensor((64,), torch.bfloat16, seed) for seed in (2, 3))
    given = x[-1:].double().requires_grad_()
    exact = oracles.group_norm_silu(given, weight.double(), bias.double(), 2)
    (exact_grad,) = torch.autograd.grad(exact, given, grad[-1:].double())

    def assert_right(ours, expected):
        assert (ours.double() - expected).abs().max() <= 2**-8 * expected.abs().max()

    with launching(80, ["_group_forward_kernel", "_group_backward_kernel"], ctas=[2 * num_samples - 1]):
        ours, mean, rstd = norm.group_norm_silu(x, weight, bias, 2, 1e-5)
        assert_right(ours[-1, 32:], exact[0, 32:].detach())
        sums = torch.empty(2, num_samples, 64)
        layout_of_groups = norm._layout(x, 2, norm._BACKWARD)._asdict()
        arguments = (grad, x, weight, bias, mean, rstd)
        run(
            norm._group_backward_kernel,
            2 * num_samples,
            x,
            *arguments,
            grad_x,
            sums,
            num_samples,
            2,
            64,
            FAST=True,
            **layout_of_groups,
        )
        assert_right(grad_x[-1, 32:], exact_grad[0, 32:])
    mean[-1], rstd[-1] = (t[0] for t in _statistics(x[-1:]))
    tiles = {"GROUP_CHANNELS": 32, "FAST": True, **_norm_tiles.tiles_of(x).arguments}
    # These kernels take the tiles from the last one on.
    with launching(80, ["_tile_forward_kernel"], ctas=[0]):
        arguments = (x, weight, bias, mean, rstd, y)
        run(_norm_tiles._tile_forward_kernel, _norm_tiles.tiles_of(x).num_programs, x, *arguments, 2, **tiles)
        assert_right(y[-1], exact[0])


def _statistics(x):
    groups = x.double().unflatten(1, (2, 32)).flatten(2)
    return groups.mean(2).float(), (groups.var(2, correction=0) + 1e-5).rsqrt().float()
