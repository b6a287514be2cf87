"""The commands of `make train`, as a user runs them, on a tiny network: what they leave, and if the table is true."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file, safe_open
from tiny import ROOT, tiny_config, tiny_denoiser

from dmd2_fast.data import read_all
from dmd2_fast.errors import UserError
from dmd2_fast.evaluation import sample_teacher
from dmd2_fast.export import FewStepGenerator, cycling_labels, load_generator, save_generator
from dmd2_fast.grids import save_grid
from dmd2_fast.metrics import Reference
from dmd2_fast.networks import denoiser_settings
from dmd2_fast.random import NoiseKey
from dmd2_fast.rollout import sample
from dmd2_fast.runs import read_metrics
from dmd2_fast.sampling import sample_run

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def call(*command, **options):
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder after prepare, teacher and `deepspeed train.py`, with the output of the last."""
    folder = tmp_path_factory.mktemp("run")
    settings = tiny_config(folder, run={"sample_interval": 3, "log_interval": 2, "num_samples": 400})
    settings["dmd2_fast"]["teacher"]["training"]["iterations"] = 30
    config = folder / "config.json"
    config.write_text(json.dumps(settings))
    scripts = os.path.dirname(sys.executable)
    for command in (
        [f"{scripts}/dmd2-fast", "prepare", "--digits", "--config", str(config)],
        [f"{scripts}/dmd2-fast", "teacher", "--config", str(config)],
        [f"{scripts}/deepspeed", "--master_port", "29611", str(ROOT / "train.py"), "--config", str(config)],
    ):
        result = call(*command)
        assert result.returncode == 0, result.stdout + result.stderr
    return folder, config, result.stdout


def test_everything_is_there(finished):
    folder, _, output = finished
    run = folder / "run"
    expected = "report.html samples.png metrics.jsonl summary.json config.json generator.safetensors"
    assert {*expected.split(), "samples.safetensors"} <= {path.name for path in run.iterdir()}
    assert [path.name for path in sorted((run / "grids").iterdir())] == ["iteration-000003.png", "iteration-000006.png"]
    assert (run / "checkpoints" / "latest").read_text().strip() == "iteration-000006"
    assert "generator" in output and "undistilled" in output and "floor" in output
    assert "global batch 8 = 8 a forward x 1 accumulated x 1 rank(s)" in output and "operators on " in output
    assert not list(run.rglob("*.tmp"))


def test_summary_has_the_promised_rows(finished):
    summary = json.loads((finished[0] / "run" / "summary.json").read_text())
    rows = [(row["network"], row["evaluations"]) for row in summary["rows"]]
    teacher = [("teacher", 35), ("teacher", 8), ("teacher", 4), ("teacher", 1)]
    assert rows == [*teacher, ("undistilled", 4), ("generator", 4)]
    for row in summary["rows"]:
        keys = {"network", "evaluations", "fd", "fd_pixels", "accuracy", "precision", "recall", "seconds"}
        assert keys <= set(row)
        assert row["seconds"] > 0 and 0 <= row["recall"] <= 1
    assert summary["seed"] == 0 and 0 < summary["floor"] < 1


def test_figures_are_those_of_the_saved_samples(finished):
    """fd_pixels recomputed from samples.safetensors with numpy and scipy's matrix square root."""
    folder = finished[0]
    samples = load_file(folder / "run" / "samples.safetensors")
    images, labels = samples["images"], samples["labels"]
    assert images.shape == (400, 1, 8, 8) and images.dtype == torch.float32 and images.abs().max() <= 1
    assert torch.equal(labels.bincount(), torch.full((10,), 40)) and samples["seed"].tolist() == [0]
    a = images.flatten(1).double().numpy()
    b = read_all(folder / "data", "test")[0].flatten(1).double().numpy()
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T) + 1e-12 * np.eye(64)).real
    fd = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    row = json.loads((folder / "run" / "summary.json").read_text())["rows"][-1]
    assert row["network"] == "generator" and row["fd_pixels"] == pytest.approx(fd, rel=1e-3)
    reference = Reference(*read_all(folder / "data", "train"), *read_all(folder / "data", "test"), folder / "other")
    assert reference.evaluate(images, labels)["fd"] == pytest.approx(row["fd"], rel=1e-6)


def test_generator_file_gives_the_saved_samples_again(finished):
    folder = finished[0]
    generator = load_generator(folder / "run" / "generator.safetensors")
    saved = load_file(folder / "run" / "samples.safetensors")
    assert generator.steps == (5, 1.6, 0.6, 0.2)
    torch.testing.assert_close(generator.sample(saved["labels"], seed=0), saved["images"], rtol=0, atol=1e-4)
    other = generator.sample(saved["labels"][:10], seed=1)
    assert (other - saved["images"][:10]).abs().max() > 0.1
    torch.testing.assert_close(generator.sample(saved["labels"][:7], seed=0), saved["images"][:7], rtol=0, atol=1e-4)


def test_metrics_are_logged_with_scores_and_time_shares(finished):
    records = read_metrics(finished[0] / "run" / "metrics.jsonl")
    assert [record["iteration"] for record in records] == [2, 3, 4, 6]
    found = ["generator/dmd" in record for record in records]
    assert found == [True, False, False, True], "the generator steps at iterations 0 and 5"
    assert records[0]["generator/dmd"] == 0, "fake score and teacher start as the same network"
    assert "eval/fd" in records[1] and "eval/recall" in records[3] and "eval/fd" not in records[0]
    for record in records:
        assert record["fake_score/denoising"] > 0 and record["seconds/fake_score"] > 0
        assert record["skipped/generator"] == record["skipped/fake_score"] == 0


def test_a_second_call_reuses_what_is_done(finished):
    folder, config, _ = finished
    run = folder / "run"
    before = {name: (run / name).stat().st_mtime_ns for name in ("generator.safetensors", "metrics.jsonl")}
    # Another number of ranks could not resume it, but nothing is left to train.
    state = run / "checkpoints" / "iteration-000006" / "trainer.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "world_size": 2}))
    result = call(sys.executable, str(ROOT / "train.py"), "--config", str(config))
    assert result.returncode == 0, result.stderr
    assert "already" in result.stdout and "generator" in result.stdout
    assert before == {name: (run / name).stat().st_mtime_ns for name in before}


def test_sample_run_writes_pictures_and_tensors(finished, tmp_path):
    run = finished[0] / "run"
    sample_run(run, 12, 3, tmp_path / "a.png")
    sample_run(run, 12, 3, tmp_path / "a.safetensors")
    saved = load_file(tmp_path / "a.safetensors")
    assert saved["images"].shape == (12, 1, 8, 8) and saved["labels"].tolist() == [*range(10), 0, 1]
    with pytest.raises(UserError, match="png"):
        sample_run(run, 12, 3, tmp_path / "a.gif")


# ---------------------------------------------------------------------------------------------------- export, grids


def test_exported_generator_samples_as_the_original(tmp_path):
    """Steps and schedule travel with the weights: nothing else is needed to sample right."""
    denoiser, steps, labels = tiny_denoiser(), (3.0, 0.4), cycling_labels(7, 10)
    save_generator(tmp_path / "g.safetensors", dict(denoiser.named_parameters()), denoiser, steps)
    again = load_generator(tmp_path / "g.safetensors")
    key = NoiseKey(4, step=2**32 - 1)
    expected = sample(denoiser, torch.tensor(steps), {"class_labels": labels}, torch.arange(7), (1, 8, 8), key)
    torch.testing.assert_close(again.sample(labels, seed=4), expected.clamp(-1, 1))
    assert torch.equal(FewStepGenerator(denoiser, steps).sample(labels[:0]), torch.empty(0, 1, 8, 8))
    with safe_open(tmp_path / "g.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["dmd2_fast"])
    assert metadata["steps"] == [3.0, 0.4] and metadata["schedule"]["kind"] == "karras"


def test_bad_generator_files(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_generator(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="cannot be read"):
        load_generator(tmp_path / "bad.safetensors")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="is no generator"):
        load_generator(tmp_path / "foreign.safetensors")
    settings = denoiser_settings(tiny_denoiser())
    settings["network"]["config"]["block_out_channels"] = [2**20, 2**20]  # 40 TB of convolutions, were they made
    metadata = {"dmd2_fast": json.dumps({**settings, "steps": [5.0]})}
    save_file({"conv_in.weight": torch.zeros(16, 4, 3, 3)}, tmp_path / "boast.safetensors", metadata)
    with pytest.raises(UserError, match=r"does not fit the network: conv_in.bias is missing"):
        load_generator(tmp_path / "boast.safetensors")
    weights, settings = tiny_denoiser().network.unet.state_dict(), denoiser_settings(tiny_denoiser())
    for steps in (["a"], "5", [], [100.0], None):
        save_file(weights, tmp_path / "g.safetensors", {"dmd2_fast": json.dumps({**settings, "steps": steps})})
        with pytest.raises(UserError, match=r"steps|is no generator"):
            load_generator(tmp_path / "g.safetensors")


@pytest.mark.parametrize(
    ("schedule", "prediction_type"),
    [("karras", "sample"), ("ddpm", "epsilon"), ("ddpm", "v_prediction"), ("rectified_flow", "flow")],
)
def test_teacher_samples_do_not_depend_on_batches(schedule, prediction_type):
    denoiser = tiny_denoiser(0, schedule, prediction_type)
    labels = cycling_labels(520, 10)
    whole = sample_teacher(denoiser, labels, 4, heun=False, seed=3)
    torch.testing.assert_close(sample_teacher(denoiser, labels[:5], 4, heun=False, seed=3), whole[:5])
    assert whole.shape == (520, 1, 8, 8) and whole.std(0).min() > 0.01
    finer = sample_teacher(denoiser, labels[:5], 35, heun=True, seed=3)
    assert torch.isfinite(finer).all() and not torch.equal(finer, whole[:5])


def test_grid_pixels(tmp_path):
    from PIL import Image

    images = torch.tensor([-1.0, 0.0, 1.0]).reshape(3, 1, 1, 1).expand(3, 1, 8, 8)
    save_grid(tmp_path / "grid.png", images, columns=2)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels.shape == (65, 65), "two by two tiles of 8 x 8, four times enlarged, one pixel apart"
    assert (pixels[:32, :32] == 0).all() and (pixels[:32, 33:] == 128).all() and (pixels[33:, :32] == 255).all()
    save_grid(tmp_path / "rgb.png", torch.zeros(2, 3, 40, 40), columns=2)
    assert np.asarray(Image.open(tmp_path / "rgb.png")).shape == (40, 81, 3)
