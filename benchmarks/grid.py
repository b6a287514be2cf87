"""The parameters of the bench_*.py files, in an order in which what shares a case is measured in a row."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from benchmarks.cases import CONTESTANTS, DIRECTIONS, DTYPE_NAMES

F32, BF16 = torch.float32, torch.bfloat16


def grid(dtypes=(F32, BF16), directions=DIRECTIONS, contestants=CONTESTANTS):
    """Every dtype x direction x contestant, the contestants innermost."""
    points = [
        pytest.param(*point, id=f"{DTYPE_NAMES[point[0]]}-{point[1]}-{point[2]}")
        for point in product(dtypes, directions, contestants)
    ]
    return pytest.mark.parametrize("dtype, direction, contestant", points)
