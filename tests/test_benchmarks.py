"""The benchmarks' arithmetic, tables and charts on made-up results, and that the contestants of a case do the same."""

import json
from functools import partial
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from benchmarks import cases, compare, harness, plot, tables

MACHINE = {"device": "made-up CPU", "threads": 1, "torch": "2.99", "triton": None, "dmd2_fast": "0.1"}
SECONDS = {"ours": 2e-4, "reference": 1e-3, "compiled": 5e-4, "dmd2": 4e-3, "fastgen": 1e-4}


def record(contestant: str, direction: str = "both", **changes) -> dict:
    """A measurement of 1 MB, whose limit takes 50 us."""
    seconds = SECONDS[contestant] / (1 if direction == "both" else 2)
    values = {
        "operator": "dmd_loss", "size": "4x4", "dtype": "f32", "direction": direction, "contestant": contestant,
        "backend": "cpp", "GB/s": 1e6 / seconds / 1e9, "limit_seconds": 5e-5, "share_of_limit": 5e-5 / seconds,
        "seconds": seconds,
    }  # fmt: skip
    return values | MACHINE | changes


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_summary():
    records = [record(name, direction) for direction in ("forward", "both") for name in SECONDS]
    records.append(record("ours", operator="alone"))
    header, _, forward, both, alone, *_, last = tables.summary(records).splitlines()
    assert cells(header)[5:] == [
        "ours", "GB/s", "of limit", "vs reference", "vs torch.compile", "vs DMD2 eager", "vs FastGen eager",
    ]  # fmt: skip
    ratios = ["5.00", "2.50", "20.00", "0.50"]
    assert cells(forward) == ["dmd_loss", "4x4", "f32", "forward", "cpp", "100 us", "10.0", "50%", *ratios]
    assert cells(both) == ["dmd_loss", "4x4", "f32", "both", "cpp", "200 us", "5.0", "25%", *ratios]
    assert cells(alone)[-4:] == [""] * 4
    assert last == "made-up CPU, threads 1, torch 2.99, triton none, dmd2_fast 0.1"


@pytest.mark.parametrize(
    "seconds, text",
    [(2e-7, "0.200 us"), (1.2345e-5, "12.3 us"), (1.5e-4, "150 us"), (1e-3, "1.00 ms"), (2.5, "2500 ms")],
)
def test_duration(seconds, text):
    assert harness.duration(seconds) == text


def test_ratio_is_the_median_over_rounds():
    """One disturbed round, or a machine that slows down for all, changes nothing."""
    assert harness.ratio([4.0, 8.0, 400.0], [2.0, 4.0, 4.0]) == 2.0


def test_interleaved_takes_turns(monkeypatch):
    """Every function once a round, each first in turn, its time divided by its calls."""
    now, log = [0.0], []

    def advance(name: str, seconds: float) -> None:
        log.append(name)
        now[0] += seconds

    monkeypatch.setattr(harness, "clock", lambda: now[0])
    functions = {"fast": partial(advance, "fast", 1.0), "slow": partial(advance, "slow", 10.0)}
    times = harness.interleaved(functions, seconds=0.0, min_rounds=3, turn=5.0, now=lambda: now[0])
    assert times == {"fast": [1.0] * 3, "slow": [10.0] * 3}
    rounds = log[-3 * 6 :]
    assert rounds == ["fast"] * 5 + ["slow"] * 2 + ["fast"] * 10 + ["slow"]


def comparison(**changes) -> dict:
    values = {
        "operator": "dmd_loss", "size": "4x4", "dtype": "f32", "direction": "both", "backend": "cpp", "rounds": 15,
        "bytes": 1 << 20, "seconds": {"ours": 1e-4, "dmd2": 2e-3, "compiled": 3e-4, "limit": 5e-5},
        "ratios": {"dmd2": 20.5, "fastgen": 19.5, "compiled": 3.0, "best_compiled": 3.0}, "compiled": "defaults",
        "times_the_limit": 2.0,
    }  # fmt: skip
    return values | MACHINE | changes


def test_comparison_states_its_bars():
    cache = 32 << 20
    line = compare.line(comparison(), cache)
    assert line[6:10] == ["20.50 (>= 20)", "19.50 (>= 20) NOT MET", "3.00 (>= 2.4)", "2.00 (<= 2.3)"]
    # What does not fit into the cache has the stricter bar.
    assert compare.line(comparison(bytes=1 << 28), cache)[9] == "2.00 (<= 1.4) NOT MET"
    assert compare.line(comparison(scaling=1.65), cache)[10] == "1.65 (>= 1.7) NOT MET"
    assert compare.line(comparison(operator="philox_normal", times_the_limit=None), cache)[9] == ""


@pytest.fixture
def results(tmp_path):
    """A file as pytest-benchmark writes it, with an operator's five contestants and a benchmark of another kind."""
    entries = [
        {"stats": {"min": r.pop("seconds"), "median": 1.0}, "extra_info": r}
        for r in (record(name, direction) for direction in ("forward", "both") for name in SECONDS)
    ]
    entries.append({"stats": {"min": 1.0}, "extra_info": {"seconds": {}}})
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"machine_info": {}, "benchmarks": entries}))
    return path


def test_charts_of_benchmarks(results, tmp_path):
    records = plot.read(results)
    assert len(records) == 10
    expected = {"reference": 5.0, "compiled": 2.5, "dmd2": 20.0, "fastgen": 0.5}
    assert plot.slowdowns(records) == {"dmd_loss\n4x4": pytest.approx(expected)}
    png, svg = plot.draw_all(records, tmp_path / "charts")
    assert (png.name, svg.name) == ("operators-f32-1.png", "operators-f32-1.svg")
    with Image.open(png) as image:
        assert image.size[0] > 800
        assert len(set(image.convert("RGB").get_flattened_data())) > 4
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    assert "made-up CPU" in svg.read_text()  # matplotlib leaves each text in a comment


def test_charts_of_a_comparison(tmp_path):
    path = tmp_path / "compare.json"
    entries = [comparison(), comparison(operator="add_noise", direction="forward")]
    path.write_text(json.dumps({"compare": entries}))
    ratios = pytest.approx({"compiled": 3.0, "dmd2": 20.5, "fastgen": 19.5})
    assert plot.slowdowns(plot.read(path)) == {"dmd_loss\n4x4": ratios, "add_noise\n4x4, forward": ratios}


def test_a_file_without_results_is_refused(tmp_path):
    path = tmp_path / "empty.json"
    path.write_text('{"benchmarks": []}')
    with pytest.raises(ValueError, match=r"empty\.json: no results"):
        plot.read(path)


# --- the cases --------------------------------------------------------------------------------------------------------

SMALL = {
    cases.predict_x0: 2, cases.dmd_loss: 2, cases.denoising_loss: 2, cases.gan_generator_loss: 3,
    cases.gan_discriminator_loss: 3, cases.gan_head_loss: 3, cases.r1_penalty: 3, cases.group_norm_silu: (2, 64, 6, 5),
}  # fmt: skip
DRAWING = (cases.philox_normal, cases.philox_uniform, cases.add_noise, cases.renoise, cases.r1_perturb)


def contestants(case: cases.Case) -> dict:
    """The forward passes that can be called without compiling anything."""
    return {"ours": case.ours, **case.eager, "clean": partial(case.clean, *case.clean_arguments)}


@pytest.mark.parametrize("build", SMALL, ids=lambda build: build.__name__)
def test_contestants_compute_the_same(build):
    case = build(SMALL[build], torch.float32, "cpu")
    outputs = {name: function() for name, function in contestants(case).items()}
    weight = torch.randn_like(outputs["ours"])
    grads = {name: torch.autograd.grad(out, case.leaves, weight) for name, out in outputs.items()}
    for name in outputs:
        torch.testing.assert_close(outputs[name], outputs["ours"], rtol=1e-4, atol=1e-4, msg=name)
        for grad, ours in zip(grads[name], grads["ours"], strict=True):
            torch.testing.assert_close(grad, ours, rtol=1e-3, atol=1e-4 * float(ours.abs().max()), msg=name)


@pytest.mark.parametrize("build", DRAWING, ids=lambda build: build.__name__)
def test_contestants_draw_the_same_distribution(build):
    """Moments of 131,072 elements or more; coefficients and batch are the same, the random numbers are not."""
    case = build(2, torch.float32, "cpu")
    outputs = {name: function().detach() for name, function in contestants(case).items()}
    for name, out in outputs.items():
        assert out.shape == outputs["ours"].shape, name
        for sample, ours in zip(out.flatten(1), outputs["ours"].flatten(1), strict=True):
            error = 6 * float(ours.std()) / ours.numel() ** 0.5
            assert abs(float(sample.mean() - ours.mean())) < 2 * error, name
            assert abs(float(sample.std() - ours.std())) < 2 * error, name


@pytest.mark.parametrize("direction, tensors", [("forward", 6), ("backward", 2), ("both", 8)])
def test_bytes_of_the_guided_loss(direction, tensors):
    """Five inputs read and the difference written; the difference read and the gradient written."""
    assert cases.dmd_loss(2, torch.bfloat16, "cpu").num_bytes(direction) == tensors * 2 * 4 * 128 * 128 * 2
