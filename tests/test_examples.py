"""The examples run, and do what they say."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image
from pipelines import make_pipeline
from tiny import ROOT, on_one_core


def run(name: str, *arguments: str | Path) -> list[str]:
    """The lines that an example prints."""
    command = [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]
    done = subprocess.run(on_one_core(command), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_ring_finds_the_modes():
    before, after = (re.findall(r"\d+", line) for line in run("ring.py", "--iterations", "2000"))
    assert before == ["0", "0", "0", "8"]
    assert after[0] == "2000" and int(after[1]) > 40 and int(after[2]) == 8, after


def test_plain_loop_learns_the_digits():
    """The teacher samples badly in one step; eighty updates of the fake score halve the distance."""
    lines = run("plain_loop.py", "--iterations", "80", "--teacher-iterations", "150")
    before, after = (float(line.split()[-1]) for line in lines)
    assert lines[0].startswith("before") and lines[1].startswith("after") and len(lines) == 2
    assert after < before / 2, lines


def test_the_distance_of_plain_loop():
    """Of two Gaussians with the same axes: |m1 - m2|^2 + sum (s1 - s2)^2."""
    spec = importlib.util.spec_from_file_location("example", ROOT / "examples" / "plain_loop.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    frechet = example.frechet
    x = torch.randn(20000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    assert frechet(x, x) < 1e-6
    assert abs(frechet(3 * x + 1, x) - (4 * 2**2 + 4 * 1)) < 0.4


def test_diffusers_inference(tmp_path):
    """Without a folder, and with one: other operators, the same images, and they are written."""
    for arguments, swapped in (
        ((), 25),
        ((make_pipeline(tmp_path / "sd15", "sd15", sample_size=8), "--steps", "2"), 37),
    ):
        lines = run("diffusers_inference.py", *arguments, "--output", tmp_path / "images")
        assert re.fullmatch(r"diffusers: \d+\.\d{3} s", lines[0])
        assert re.fullmatch(rf"dmd2_fast: \d+\.\d{{3}} s, with {swapped} operators swapped and 0 kept", lines[1])
        difference = float(lines[2].removeprefix("largest difference of a pixel: "))
        assert 0 < difference < 1e-3
        low, high = Image.open(tmp_path / "images" / "000.png").convert("L").getextrema()
        assert high > low
