"""benchmarks/roofline.py against an independent analysis of the same kernels, and the kernels against their bars."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

sass_roofline = pytest.importorskip("sass_roofline")
sys.path.append(str(Path(__file__).resolve().parents[2]))  # for `pytest` where `python -m pytest` would have it

from benchmarks import roofline, sass  # noqa: E402
from benchmarks.roofline_cases import CASES, Case  # noqa: E402

ARCHES = (80, 90)
# The other analysis' names of the units it keeps apart as ours does.
UNITS = {
    "memory": "mem",
    "issue": "issue",
    "ALU": "alu",
    "special functions": "xu",
    "load/store": "lsu",
    "L1": "l1bytes",
}


def other_analysis(launch: roofline.Launch, case: Case, arch: int) -> dict:
    """The shared tool's result; it compiles the kernel again, from its signature."""
    source, metadata, elements = launch.kernel.src, launch.kernel.metadata, math.prod(case.shape)
    names = source.fn.arg_names
    # Given to it, as the trip counts are: which blocks the last program alone runs. Both cut the code alike.
    blocks, _ = sass.disassemble(launch.kernel.asm["cubin"], metadata.name)
    rare = sorted(sass.last_program_only(blocks))
    spec = sass_roofline.Spec(
        launch.name,
        source.fn,
        dict(source.signature),
        {names[index]: value for (index,), value in source.constants.items()},
        elements / launch.programs,
        launch.bytes / elements,
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
        divisible=[names[index] for (index,), attributes in source.attrs.items() if attributes],
        trips=roofline.trips_of(launch, case),
        cold="none",
        cold_blocks=rare,
    )
    result = sass_roofline.analyse(spec, arch)
    sizes = {index: len(block.instructions) for index, block in enumerate(blocks)}
    assert all(sizes[block["i"]] == block["n"] for block in result["blocks"])
    return result


def assert_agrees(launch: roofline.Launch, arch: int, case: Case, dtype: torch.dtype) -> roofline.Row:
    row, other = roofline.row_of(launch, arch, case, dtype), other_analysis(launch, case, arch)
    assert not [warning for warning in other["warnings"] if "trip counts given" in warning]
    assert row.limit_ratio == pytest.approx(other["limit_ratio"], rel=0.02)
    assert row.instructions == pytest.approx(other["inst_per_element"], rel=0.02)
    for unit, name in UNITS.items():
        assert row.times[unit] == pytest.approx(other["times_ps"][name], rel=0.02), unit
    assert row.times["FP64"] == pytest.approx(other["times_ps"].get("fp64", 0.0), rel=0.02)
    multiplied_or_added = max(row.times["FMA"], row.times["integer multiply"])
    assert multiplied_or_added == pytest.approx(other["times_ps"]["fma"], rel=0.02)
    assert (row.registers, row.shared_bytes) == (other["regs"], other["smem"])
    assert row.spilled_bytes == other["spill_bytes"]
    return row


def launches_of(case: Case, dtype: torch.dtype, arch: int) -> list[roofline.Launch]:
    if not (launches := roofline.launches_of(case, dtype, arch)):
        pytest.skip(f"{case.name} has no Triton kernel")
    return launches


ALL = [
    pytest.param(case, dtype, arch, id=f"{case.name}-{'x'.join(map(str, case.shape))}-{str(dtype)[6:]}-sm_{arch}")
    for case, arch in itertools.product(CASES, ARCHES)
    for dtype in case.dtypes
]


@pytest.mark.parametrize(("case", "dtype", "arch"), ALL)
def test_every_kernel(case, dtype, arch):
    for launch in launches_of(case, dtype, arch):
        assert_agrees(launch, arch, case, dtype)


@triton.jit
def _repeated_logarithm(x_ptr, out_ptr, repeats, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    for _ in range(repeats):
        for _ in tl.static_range(50):  # too many for ptxas to unroll the outer loop
            x = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    tl.store(out_ptr + offsets, x)


def logarithm_case(*trips: int) -> Case:
    def call(x):
        _repeated_logarithm[(x.numel() // 1024,)](x, torch.empty_like(x), 2, BLOCK=1024)

    return Case("logarithm", (2**20,), call, {"repeated_logarithm": lambda _: trips})


@pytest.mark.parametrize("arch", ARCHES)
def test_a_loop_of_logarithms_is_limited_by_special_functions(arch):
    """100 logarithms an element at 16 a clock a multiprocessor, against 8 bytes."""
    case = logarithm_case(2)
    (launch,) = roofline.launches_of(case, torch.float32, arch)
    row = assert_agrees(launch, arch, case, torch.float32)
    gpu = roofline.GPUS[arch]
    assert row.next_resource == "special functions"
    assert row.times["special functions"] == pytest.approx(1e12 * 100 / 16 / gpu.multiprocessors / gpu.clock, rel=1e-6)
    assert row.limit_ratio == pytest.approx(row.times["special functions"] / (8e12 / gpu.bandwidth))


def test_a_loop_without_a_trip_count_is_refused():
    case = logarithm_case()
    (launch,) = roofline.launches_of(case, torch.float32, 80)
    with pytest.raises(ValueError, match="has 1 loops, its case names 0"):
        roofline.row_of(launch, 80, case, torch.float32)


# What the kernels must reach: {kernel: (share of the next resource, instructions an element)}. Memory limits each.
BARS = {
    "add_noise": (0.75, 26.0),
    "r1_perturb": (0.90, 43.0),
    "dmd_loss": (0.45, math.inf),
    "denoising_loss": (0.85, math.inf),
    "group_norm_silu": (0.75, math.inf),
}


@pytest.mark.parametrize(("case", "dtype", "arch"), [c for c in ALL if c.values[0].name in BARS])
def test_at_the_limit(case, dtype, arch):
    row = roofline.row_of(launches_of(case, dtype, arch)[0], arch, case, dtype)
    share, instructions = BARS[case.name]
    assert row.limit_ratio == 1.0
    assert row.next_share <= share
    assert row.instructions <= instructions
    if case.name in ("add_noise", "r1_perturb"):
        assert row.spilled_bytes == 0
