"""A teacher's noise-image pairs and the regression on them: the samplers, the files, the loss, and what it is for."""

from __future__ import annotations

import itertools
import shutil
import sys
import tarfile
import types

import pytest
import torch
from latents import text_section, write_latents
from one_rank import group_of_one, make_trainer
from pipelines import make_pipeline
from plain_loop import plain_run, prepare, relative, worst_loss, write_config
from safetensors.torch import load
from test_text_unet import diffusers_arguments

import dmd2_fast.pairs as pairs_module
from dmd2_fast.cli import main
from dmd2_fast.data import read_all
from dmd2_fast.engine import full_state_dict
from dmd2_fast.errors import ConfigError, DataError
from dmd2_fast.networks import load_denoiser
from dmd2_fast.pairs import PAIRS_STEP, PairsOptions, make_pairs
from dmd2_fast.preflight import check_inputs
from dmd2_fast.random import NoiseKey, Stream, philox_normal
from dmd2_fast.regression import make_measure
from dmd2_fast.runs import read_metrics
from dmd2_fast.sampling import encode_prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, a random teacher of classes, and 44 pairs of it."""
    folder = tmp_path_factory.mktemp("regression")
    prepare(folder)
    config = write_config(folder, "pairs", 1, **regression(folder, weight=1.0))[1]
    make_pairs(config, PairsOptions(44, num_steps=5))
    return folder


@pytest.fixture(scope="module")
def rank():
    with group_of_one() as rank:
        yield rank


def regression(folder, **settings):
    return {"regression": {"path": str(folder / "digit-pairs"), **settings}}


def read_pairs(folder):
    """Every field of the pairs, (N, ...), as tarfile and safetensors read them."""
    samples = []
    for shard in sorted(folder.glob("train-*.tar")):
        with tarfile.open(shard) as tar:
            samples += [load(tar.extractfile(member).read()) for member in tar]
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def unit_noise(num, shape):
    return philox_normal(torch.arange(num), shape, NoiseKey(0, step=PAIRS_STEP, stream=Stream.GENERATOR_INPUT))


def test_pairs_of_classes_are_heun_s(folder):
    """Karras et al. 2022, algorithm 1, written out."""
    found, teacher = read_pairs(folder / "digit-pairs"), load_denoiser(str(folder / "teacher"))
    labels = read_all(folder / "data")[1]
    assert torch.equal(found["class_labels"], labels[:44]) and torch.equal(found["noise"], unit_noise(44, (1, 8, 8)))
    i = torch.arange(5, dtype=torch.float64)
    sigmas = [*((80 ** (1 / 7) + i / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7).tolist(), 0.0]
    x = 80 * found["noise"]
    with torch.no_grad():

        def slope(x, sigma):
            return (x - teacher(x, torch.full((44,), sigma), {"class_labels": labels[:44]})[0]) / sigma

        for sigma, after in itertools.pairwise(sigmas):
            d = slope(x, sigma)
            ahead = x + (after - sigma) * d
            x = ahead if after == 0 else x + (after - sigma) / 2 * (d + slope(ahead, after))
    torch.testing.assert_close(found["latents"], x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_pairs_of_text_are_ddim_s(tmp_path, kind):
    """Diffusers' UNet under guidance, DDIM written out, from prompts that the data have; more pairs than data."""
    from diffusers import DDPMScheduler, UNet2DConditionModel

    pipeline = make_pipeline(tmp_path / "pipeline", kind)
    write_latents(tmp_path / "latents", pipeline, kind, 3)
    config = write_config(tmp_path, "c", 1, **text_section(tmp_path, pipeline, kind), **regression(tmp_path))[1]
    make_pairs(config, PairsOptions(5, num_steps=3, guidance_scale=3.0, batch_size=2))
    found = read_pairs(tmp_path / "digit-pairs")
    condition = {name: value[[0, 1, 2, 0, 1]] for name, value in read_pairs(tmp_path / "latents").items()}
    del condition["latents"]
    for name, value in condition.items():
        assert torch.equal(found[name], value)
    empty = {**encode_prompts(pipeline, kind, [""] * 5, (32, 32), "cpu")}
    if kind == "sdxl":
        empty |= {name: torch.zeros_like(empty[name]) for name in ("prompt_embeds", "pooled_prompt_embeds")}
    unet = UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet")
    abar = DDPMScheduler.from_pretrained(pipeline, subfolder="scheduler").alphas_cumprod
    times = load_denoiser(config.model).schedule.sampling_times(3).tolist()
    assert times[0] == 999 and len(times) == 3
    x = unit_noise(5, (4, 16, 16))
    with torch.no_grad():
        for t, after in zip(times, [*times[1:], None], strict=True):
            cond, uncond = (unet(x, t, **diffusers_arguments(part)).sample for part in (condition, empty))
            eps = uncond + 3 * (cond - uncond)
            x0 = (x - (1 - abar[t]).sqrt() * eps) / abar[t].sqrt()
            x = x0 if after is None else abar[after].sqrt() * x0 + (1 - abar[after]).sqrt() * eps
    assert float((found["latents"] - x).abs().max()) < 1e-5 * float(x.abs().max())
    config = write_config(
        tmp_path,
        "r",
        1,
        **text_section(tmp_path, pipeline, kind, sample_interval=0),
        **regression(tmp_path, weight=1.0),
    )[1]
    check_inputs(config)


def test_interrupted_pairs_go_on(folder, tmp_path, monkeypatch, capsys):
    """Shards that are there are kept; the rest, in other batches, come out as in one go."""
    shutil.copytree(folder / "data", tmp_path / "data")
    shutil.copytree(folder / "teacher", tmp_path / "teacher")
    path = write_config(tmp_path, "c", 1, **regression(tmp_path))[0]
    out = tmp_path / "digit-pairs"
    monkeypatch.setattr(pairs_module, "PAIRS_PER_SHARD", 8)
    command = ["pairs", "--config", str(path), "--num", "20", "--steps", "5"]
    assert main(command) == 0
    assert "20 pairs, 5 steps" in capsys.readouterr().out
    whole = read_pairs(out)
    for name, value in read_pairs(folder / "digit-pairs").items():
        torch.testing.assert_close(whole[name], value[:20], rtol=0, atol=1e-4)
    kept = (out / "train-000001.tar").stat().st_mtime_ns
    (out / "train-000002.tar").unlink()
    (out / "dataset.json").unlink()
    assert main([*command, "--batch-size", "3"]) == 0
    for name, value in read_pairs(out).items():
        torch.testing.assert_close(value, whole[name], rtol=0, atol=1e-5)
    assert (out / "train-000001.tar").stat().st_mtime_ns == kept
    assert {path.name for path in out.iterdir() if path.suffix != ".tar"} == {
        "pairs.json", "dataset.json", "unconditional.safetensors",
    }  # fmt: skip
    capsys.readouterr()
    assert main([*command[:-1], "6"]) == 2
    assert "made with num_steps 5" in capsys.readouterr().err
    shutil.rmtree(out)
    out.mkdir()
    (out / "file").touch()
    assert main(command) == 2
    assert "something else than pairs" in capsys.readouterr().err


def test_run_is_the_plain_loop_s(folder, rank):
    """Two iterations of warm-up, then weight .5 beside DMD and GAN, two micro-batches an update."""
    section = {
        **regression(folder, weight=0.5, warmup_iterations=2),
        "generator": {"ema": 0.9}, "fake_score": {"ttur_ratio": 2}, "run": {"iterations": 6, "folder": ""},
    }  # fmt: skip
    trainer = make_trainer(folder, "equal", rank, {"train_micro_batch_size_per_gpu": 4}, **section)
    assert trainer.config.gradient_accumulation_steps == 2
    assert trainer.train()
    trainer.close()
    fields = read_pairs(folder / "digit-pairs")
    expected = plain_run(
        trainer.config, 6, pairs=(fields["noise"], fields["latents"], {"class_labels": fields["class_labels"]})
    )
    lines = read_metrics(trainer.run.metrics)
    assert expected.updates == {"generator": [0, 1, 2, 4], "fake_score": [2, 3, 4, 5]}
    assert trainer.generator_updates == 4
    assert "fake_score/loss" not in lines[0] and "generator/dmd" not in lines[1] and "generator/dmd" in lines[2]
    assert worst_loss(lines, expected.losses) < 1e-4
    for engine, name in ((trainer.engines.generator, "generator"), (trainer.engines.fake_score, "fake_score")):
        assert relative(full_state_dict(engine), expected.weights[name]) < 1e-5
    assert relative(trainer.ema.full_state_dict(), expected.weights["ema"]) < 1e-5


def test_warm_up_improves_the_start(folder, rank):
    """A one-step generator begins as the teacher in one step; warmed up, it is nearer to the teacher's samples."""
    section = {
        **regression(folder, warmup_iterations=30),
        "generator": {"steps": [80.0], "ema": None, "optimizer": {"params": {"lr": 5e-3}}},
        "run": {"iterations": 30},
    }  # fmt: skip
    trainer = make_trainer(folder, "warm", rank, **section)
    start = load_denoiser(trainer.config.model)
    assert trainer.train()
    trainer.close()
    warmed = load_denoiser(trainer.config.model)
    warmed.load_state_dict(full_state_dict(trainer.engines.generator))
    pairs = read_pairs(folder / "digit-pairs")
    x, sigma, condition = 80 * pairs["noise"], torch.full((44,), 80.0), {"class_labels": pairs["class_labels"]}
    with torch.no_grad():
        before, after = (
            float((denoiser(x, sigma, condition)[0] - pairs["latents"]).pow(2).mean()) for denoiser in (start, warmed)
        )
    assert after < 0.7 * before
    assert "fake_score/loss" not in read_metrics(trainer.run.metrics)[-1], "nothing else was trained"


def test_lpips(folder, monkeypatch, tmp_path):
    """Refused where it is not installed; else it sees images of three channels, decoded with a gradient."""
    from diffusers import AutoencoderKL

    config = write_config(folder, "lpips", 1, **regression(folder, weight=1.0, loss="lpips"))[1]
    monkeypatch.setitem(sys.modules, "lpips", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install lpips"):
        make_measure(config, "cpu")
    with pytest.raises(ConfigError, match="pip install lpips"):
        check_inputs(config)

    class Distance(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()

        def forward(self, samples, targets):
            assert samples.shape[1] == targets.shape[1] == 3
            return (samples - targets).abs().mean((1, 2, 3), keepdim=True)

    monkeypatch.undo()
    stand_in = types.ModuleType("lpips")
    stand_in.LPIPS, stand_in.__spec__ = Distance, types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "lpips", stand_in)
    a, b = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(make_measure(config, "cpu")(a, b), (a - b).abs().mean())
    pipeline = make_pipeline(tmp_path / "pipeline")
    section = text_section(tmp_path, pipeline, "sdxl", sample_interval=0)
    config = write_config(tmp_path, "text", 1, **section, **regression(tmp_path, weight=1.0, loss="lpips"))[1]
    a, b = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 4, 8, 8)
    loss = make_measure(config, "cpu")(a, b)
    vae = AutoencoderKL.from_pretrained(pipeline, subfolder="vae")
    expected = (vae.decode(a / 0.13025).sample - vae.decode(b / 0.13025).sample).abs().mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, a)[0] for value in (loss, expected)))


def test_bad_settings(folder, tmp_path):
    with pytest.raises(ConfigError, match="no pairs to learn from"):
        write_config(tmp_path, "c", 1, regression={"weight": 1.0})
    prepare(tmp_path)
    config = write_config(tmp_path, "c", 1, regression={"weight": 1.0, "path": str(tmp_path / "none")})[1]
    with pytest.raises(ConfigError, match=r"regression\.path.*dmd2-fast pairs"):
        check_inputs(config)
    with pytest.raises(ConfigError, match="path is null"):
        make_pairs(write_config(tmp_path, "c", 1)[1], PairsOptions(4))
    (tmp_path / "file").touch()
    config = write_config(tmp_path, "c", 1, regression={"weight": 1.0, "path": str(tmp_path / "file" / "pairs")})[1]
    with pytest.raises(DataError, match="cannot be made"):
        make_pairs(config, PairsOptions(4))
    shutil.copytree(folder / "digit-pairs", tmp_path / "digit-pairs")
    prepare(tmp_path / "other")
    section = {**regression(tmp_path, weight=1.0)}
    check_inputs(write_config(tmp_path, "c", 1, **section)[1])
    description = tmp_path / "digit-pairs" / "dataset.json"
    description.write_text(description.read_text().replace("8", "16"))
    with pytest.raises(ConfigError, match=r"regression\.path.*\(1, 16, 16\)"):
        check_inputs(write_config(tmp_path, "c", 1, **section)[1])
