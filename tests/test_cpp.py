"""What the C++ extension alone promises: each instruction set right by itself and close to the others, the same bits
for any number of threads, no copies of images that lie densely, and what befalls vectors' edges.
"""

import os
import subprocess
import sys
from pathlib import Path

import oracles
import philox_oracle
import pytest
import torch
from oracles import DTYPES, random_tensor

from dmd2_fast import NoiseKey, add_noise, gan_head_loss, group_norm_silu, use_backend
from dmd2_fast.dispatch import missing

pytestmark = pytest.mark.skipif(bool(missing("cpp")), reason="the C++ operators are not built")

INSTRUCTION_SETS = {"portable": 0, "avx2": 256, "avx512": 512}
COPIES = {"aten::copy_", "aten::clone", "aten::contiguous", "aten::_to_copy"}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What tests/cpp_cases.py computed on each instruction set that the machine has; the script checks it by itself."""
    folder, found = tmp_path_factory.mktemp("results"), {}
    for name, number in INSTRUCTION_SETS.items():
        script = Path(__file__).with_name("cpp_cases.py")
        env = {**os.environ, "DMD2_FAST_ISA": name}
        done = subprocess.run(
            [sys.executable, script, folder / name], capture_output=True, text=True, env=env, timeout=240
        )
        assert done.returncode == 0, f"{name}:\n{done.stderr}"
        if int(done.stdout) == number:  # else the machine lacks it, and the portable one ran
            found[name] = torch.load(folder / name)
    return found


@pytest.mark.parametrize("name", ["avx2", "avx512"])
def test_instruction_sets_agree(results, name):
    """To some roundings of the largest value of each tensor; that each is near float64, the script has asserted."""
    assert "portable" in results
    if name not in results:
        pytest.skip(f"the machine lacks {name}")
    assert results[name].keys() == results["portable"].keys()
    for label, expected in results["portable"].items():
        for i, (a, b) in enumerate(zip(results[name][label], expected, strict=True)):
            if b is not None and b.numel():
                spacing = torch.finfo(b.dtype).eps * b.abs().max()
                assert (a.double() - b.double()).abs().max() <= 32 * spacing + 1e-7, f"{label}, tensor {i}"


def test_another_instruction_set_is_refused():
    code = "import dmd2_fast, torch; dmd2_fast.philox_normal(torch.arange(2), (3,), dmd2_fast.NoiseKey(0))"
    env = {**os.environ, "DMD2_FAST_ISA": "avx1024"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode != 0
    assert "DMD2_FAST_ISA is 'avx1024': expected portable, avx2, avx512 or nothing" in done.stderr


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_group_norm_copies_nothing(layout, dtype):
    x = random_tensor((2, 12, 9, 5), dtype, 0, layout).requires_grad_()
    grad = random_tensor(x.shape, dtype, 1, layout)
    weight, bias = (random_tensor((12,), dtype, seed).requires_grad_() for seed in (2, 3))
    with use_backend("cpp"), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(group_norm_silu(x, weight, bias, 3), (x, weight, bias), grad)
    names = {event.name for event in profile.events()}
    assert any("group_norm_silu" in name for name in names)  # the profiler saw the operators at all
    assert not names & COPIES


def test_the_profiler_would_see_copies():
    x, weight = random_tensor((2, 12, 9, 5), torch.float32, 0, "strided"), torch.ones(12)
    with use_backend("cpp"), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        group_norm_silu(x, weight, weight, 3)
    assert {event.name for event in profile.events()} & COPIES


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1280, 1, 1), (2, 1280, 3, 2), (1, 640, 70, 3)])
def test_shapes_of_unets(shape, threads):
    """One position, fewer than a vector's lanes, and more rows than one run of sums."""
    inputs = [random_tensor(shape, torch.float32, 0), *(random_tensor(shape[1:2], torch.float32, i) for i in (1, 2))]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with use_backend("cpp"):
            for layout in (torch.contiguous_format, torch.channels_last):
                given = [inputs[0].to(memory_format=layout), *inputs[1:]]
                oracles.compare(lambda *t: group_norm_silu(*t, 32), lambda *t: oracles.group_norm_silu(*t, 32), given)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_variance_at_a_large_mean(layout):
    """Values 1e4 + {-1, 0, 1} are exact in f32, and so is their mean: nothing but the arithmetic can be off."""
    steps = torch.tensor([-1.0, 0.0, 1.0]).repeat(2 * 6 * 32 * 2).reshape(2, 6, 32, 6)
    x = (steps + 1e4).contiguous(memory_format=layout)
    with use_backend("cpp"):
        y = group_norm_silu(x, torch.ones(6), torch.zeros(6), 2)
    exact = oracles.group_norm_silu(x.double(), torch.ones(6).double(), torch.zeros(6).double(), 2)
    assert (y.double() - exact).abs().max() < 1e-6


def test_empty_and_degenerate_shapes():
    with use_backend("cpp"):
        for shape in ((0, 4, 3, 3), (2, 4, 0, 3), (2, 4, 3, 0)):
            x = torch.zeros(shape, requires_grad=True)
            weight = torch.ones(4, requires_grad=True)
            group_norm_silu(x, weight, torch.zeros(4), 2).sum().backward()
            assert x.grad.shape == shape
            assert not weight.grad.any()
        features = torch.zeros(0, 12, requires_grad=True)
        weight = torch.ones(12, requires_grad=True)
        loss, _ = gan_head_loss(features, weight, weight, weight, torch.zeros(1), 3, sign=1)
        loss.backward()
        assert loss.isnan()
        assert not weight.grad.any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_non_finite_values_stay_in_their_group(layout, bad):
    """Also in the gradients, where groups share vectors."""
    x = random_tensor((2, 12, 5, 5), torch.float32, 0, layout)
    x[0, 5, 2, 2] = bad
    given = [x.requires_grad_(), *(random_tensor((12,), torch.float32, i).requires_grad_() for i in (1, 2))]
    with use_backend("cpp"):
        y = group_norm_silu(*given, 3)
        grads = torch.autograd.grad(y, given, torch.ones_like(y))
    expected = [True] * 4 + [False] * 4 + [True] * 4
    for result in (y, grads[0]):
        assert result.isfinite().flatten(2).all(2).tolist() == [expected, [True] * 12]
        assert not result[0, 4:8].isfinite().any()
    assert [g.isfinite().tolist() for g in grads[1:]] == [expected, expected]


def test_more_than_2_to_31_elements():
    """The last elements of one sample have their own counters and places; nothing wraps around to the first ones."""
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 10 * 2**30:
        pytest.skip("needs 10 GiB of free memory")
    x, count, key = torch.zeros(1, 2**31 + 12, dtype=torch.bfloat16), 12, NoiseKey(7, 6, 5)
    with use_backend("cpp"):
        x_t = add_noise(x, torch.ones(1), torch.ones(1), key=key, sample_ids=torch.tensor([9]))
    for first in (0, 2**31 - count, 2**31):
        noise, tolerance = philox_oracle.noise([9], (count,), (7, 6, 5), 3e-5, first)
        error = (x_t[:, first : first + count].double() - noise).abs()
        assert (error <= noise.abs() * 2.0**-8 + tolerance).all()
