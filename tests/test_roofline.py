"""`python -m benchmarks.roofline` without a GPU; tests/compiled checks its figures against those of another tool."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent


def roofline(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    without = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.roofline", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**without, **env}, capture_output=True, text=True, timeout=240)


def test_r1_perturb_moves_three_tensors_and_is_limited_by_memory():
    done = roofline("--only", "r1_perturb", "--target", "sm_90", "--markdown")
    assert done.returncode == 0, done.stderr
    header, line, *lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    assert set("".join(line)) == {"-"}
    rows = [dict(zip(header, cells, strict=True)) for cells in lines]
    assert {(row["kernel"], row["dtype"], row["target"]) for row in rows} == {
        ("r1_perturb", dtype, "sm_90") for dtype in ("bfloat16", "float32")
    }
    for row in rows:
        size = {"bfloat16": 2, "float32": 4}[row["dtype"]]
        assert float(row["bytes / element"]) == pytest.approx(3 * size, abs=0.01)
        # H100: 3.35 TB/s by its data sheet.
        assert float(row["memory ps / element"]) == pytest.approx(3 * size / 3.35, abs=0.01)
        assert "LD128" in row["accesses"] and "ST128" in row["accesses"]
        assert row["limit ratio"] == "1.00"
        assert 0 < float(row["its share of memory time"]) < 1


def test_the_interpreter_is_refused():
    done = roofline(TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "nothing would be compiled" in done.stderr
