"""GroupNorm and SiLU at two of SDXL's sizes, in both layouts. `pytest benchmarks/bench_norm.py --benchmark-only`."""

import pytest
import torch

from benchmarks import cases
from benchmarks.grid import grid

LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


@grid(contestants=[name for name in cases.CONTESTANTS if name != "fastgen"])  # it has no lines of its own
@pytest.mark.parametrize("layout", LAYOUTS)
def test_group_norm_silu(measure, layout, dtype, direction, contestant):
    measure(cases.group_norm_silu, contestant, direction, (2, 320, 64, 64), dtype, layout=LAYOUTS[layout])
