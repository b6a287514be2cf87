"""`dmd2-fast export` against plain diffusers: what is reloaded samples as rollout.sample does, from the same noise."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from pipelines import CAPTIONS, make_pipeline
from test_text_unet import text_condition
from tiny import NETWORK, tiny_denoiser

from dmd2_fast.cli import main
from dmd2_fast.config import LoRAConfig, ModelConfig
from dmd2_fast.errors import UserError
from dmd2_fast.export import SAMPLING_STEP, load_generator, save_generator
from dmd2_fast.export_folder import export_run
from dmd2_fast.lcm import find_setting, lcm_timesteps
from dmd2_fast.networks import load_denoiser, save_denoiser
from dmd2_fast.pipeline import LatentCodec
from dmd2_fast.random import NoiseKey, Stream, philox_normal
from dmd2_fast.rollout import sample
from dmd2_fast.sampling import encode_prompts

FOUR, ONE, UNEVEN = (999, 749, 499, 249), (399,), (999, 500, 100)
SEED, PROMPTS = 5, list(CAPTIONS[:2])


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """kind, prediction type -> pipeline folder."""
    found = {}
    for kind in ("sdxl", "sd15"):
        folder = make_pipeline(tmp_path_factory.mktemp(kind), kind)
        found[kind, "epsilon"] = folder
        found[kind, "v_prediction"] = shutil.copytree(folder, tmp_path_factory.mktemp(kind) / "v")
        path = found[kind, "v_prediction"] / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "v_prediction"}))
    return found


def finished_run(folder, model: ModelConfig, steps, weights=None):
    """A run folder whose generator is the teacher with other weights: noise added, or adapters."""
    denoiser = load_denoiser(model)
    if weights is None:
        generator = torch.Generator().manual_seed(1)
        weights = {
            name: value.detach() + 0.02 * torch.randn(value.shape, generator=generator)
            for name, value in denoiser.named_parameters()
        }
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_generator(folder / "generator.safetensors", weights, denoiser, steps, model=model, iteration=7, ema=0.9)
    return folder


def our_samples(run, model: ModelConfig, size: int = 32):
    """(latents, images in [0, 1]) of rollout.sample and the VAE."""
    generator = load_generator(run / "generator.safetensors")
    condition = encode_prompts(model.path, model.kind, PROMPTS, (size, size), "cpu")
    key, ids = NoiseKey(SEED, step=SAMPLING_STEP), torch.arange(2)
    steps = generator.denoiser.schedule.steps(generator.steps)
    latents = sample(generator.denoiser, steps, condition, ids, (4, size // 2, size // 2), key)
    torch.testing.assert_close(generator.sample(condition, seed=SEED), latents)
    return latents, (LatentCodec.load(model.path).decode(latents) / 2 + 0.5).clamp(0, 1)


def diffusers_samples(pipeline, monkeypatch, options, size: int = 32):
    """The same of a diffusers pipeline, our noise in place of its own."""
    shape, key, ids = (4, size // 2, size // 2), NoiseKey(SEED, step=SAMPLING_STEP), torch.arange(2)
    found = []
    for output in ("latent", "pt"):
        draws = [philox_normal(ids, shape, key.fork(Stream.ROLLOUT_STEP + i)) for i in range(8)]
        draw = iter(draws).__next__
        monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, draw=draw, **__: draw())
        latents = philox_normal(ids, shape, key.fork(Stream.GENERATOR_INPUT))
        pipeline.set_progress_bar_config(disable=True)
        found.append(pipeline(PROMPTS, latents=latents, output_type=output, **options).images)
    return found


def card_code(folder):
    """What README.md of an export does: (the pipeline it makes, the arguments of its call)."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    *lines, call = code.replace("path/to/this/folder", str(folder)).strip().splitlines()
    names, seen = {}, {}
    exec("\n".join(lines), names)
    pipeline = names["pipeline"]

    class Recorder:
        images = (None,)

        def __call__(self, prompt, **options):
            seen.update(options)
            return self

    exec(call, {"pipeline": Recorder()})
    return pipeline, seen


def assert_same(found, expected):
    for value, other in zip(found, expected, strict=True):
        scale = max(1.0, float(other.abs().max()))
        assert float((value - other).abs().max()) < 1e-5 * scale
    assert expected[1].std(0).max() > 1e-3, "two prompts and noises give two images"


@pytest.mark.parametrize(
    ("kind", "prediction_type", "steps"),
    [
        ("sdxl", "epsilon", FOUR), ("sdxl", "v_prediction", ONE), ("sdxl", "epsilon", UNEVEN),
        ("sd15", "v_prediction", FOUR),
    ],
)  # fmt: skip
def test_diffusers_samples_as_we_do(pipelines, tmp_path, monkeypatch, kind, prediction_type, steps):
    """A whole pipeline by from_pretrained, and by the README's code the UNet in its teacher's pipeline."""
    import diffusers

    model = ModelConfig(str(pipelines[kind, prediction_type]), kind)
    run = finished_run(tmp_path / "run", model, steps)
    expected = our_samples(run, model)
    export_run(run, "diffusers", tmp_path / "full", full=True)
    class_ = {"sdxl": diffusers.StableDiffusionXLPipeline, "sd15": diffusers.StableDiffusionPipeline}[kind]
    pipeline = class_.from_pretrained(tmp_path / "full")
    baked = steps != UNEVEN
    options = {"num_inference_steps": len(steps)} if baked else {"timesteps": list(steps)}
    found = diffusers_samples(pipeline, monkeypatch, {**options, "guidance_scale": 0})
    assert pipeline.scheduler.timesteps.tolist() == list(steps)
    assert_same(found, expected)
    export_run(run, "diffusers", tmp_path / "unet")
    pipeline, arguments = card_code(tmp_path / "unet")
    assert arguments == {**options, "guidance_scale": 0}
    assert_same(diffusers_samples(pipeline, monkeypatch, arguments), expected)
    assert {path.name for path in (tmp_path / "unet").iterdir()} == {"unet", "scheduler", "README.md", "generator.json"}
    for folder in ("unet", "full"):
        again = load_generator(tmp_path / folder)
        assert again.steps == steps
        original = load_generator(run / "generator.safetensors").denoiser.state_dict()
        assert all(torch.equal(value, original[name]) for name, value in again.denoiser.state_dict().items())


def test_timesteps_without_the_export(pipelines):
    """Why the steps are written into the configuration: LCMScheduler's own four are others."""
    from diffusers import LCMScheduler

    scheduler = LCMScheduler()
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 759, 499, 259]
    assert find_setting(FOUR) == (1000, 4) and find_setting(ONE) == (400, 1) and find_setting(UNEVEN) is None
    for num_timesteps, original, num in ((1000, 50, 4), (1000, 232, 50), (777, 30, 7), (400, 1, 1)):
        scheduler = LCMScheduler(num_train_timesteps=num_timesteps, original_inference_steps=original)
        scheduler.set_timesteps(num)
        assert tuple(scheduler.timesteps.tolist()) == lcm_timesteps(num_timesteps, original, num)


@pytest.mark.parametrize("kind", ["sdxl", "sd15"])
def test_adapter_in_diffusers(pipelines, tmp_path, monkeypatch, kind):
    """The adapter alone, into its teacher's pipeline at another size, as the README does; and merged, as a UNet."""
    from dmd2_fast.networks.lora import AdaptedDenoiser, SharedBase

    lora = LoRAConfig(rank=4, alpha=2, targets=("to_q", "to_k", "to_out.0", "conv1"))
    model = ModelConfig(str(pipelines[kind, "epsilon"]), kind, sample_size=24, lora=lora)
    base = SharedBase(load_denoiser(model).requires_grad_(False), lora)
    base.inject()
    adapted = AdaptedDenoiser(base, "generator")
    generator = torch.Generator().manual_seed(3)
    for parameter in adapted.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    run = finished_run(tmp_path / "run", model, FOUR, dict(adapted.named_parameters()))
    with torch.no_grad():
        x, t, condition = torch.randn(3, 4, 24, 24), torch.tensor([1, 250, 999]), text_condition(kind)
        merged = load_generator(run / "generator.safetensors").denoiser(x, t, condition)[0]
        torch.testing.assert_close(merged, adapted(x, t, condition)[0], rtol=1e-5, atol=1e-5)
        assert (merged - load_denoiser(model)(x, t, condition)[0]).abs().max() > 0.01
    expected = our_samples(run, model, 48)
    export_run(run, "lora", tmp_path / "lora")
    pipeline, arguments = card_code(tmp_path / "lora")
    assert arguments == {"num_inference_steps": 4, "guidance_scale": 0, "height": 48, "width": 48}
    assert_same(diffusers_samples(pipeline, monkeypatch, arguments, 48), expected)
    again = load_generator(tmp_path / "lora")
    torch.testing.assert_close(again.denoiser(x, t, condition)[0], merged)
    export_run(run, "diffusers", tmp_path / "unet")
    pipeline, arguments = card_code(tmp_path / "unet")
    assert_same(diffusers_samples(pipeline, monkeypatch, arguments, 48), expected)


def test_classes_export_is_a_teacher(tmp_path):
    from diffusers import UNet2DModel

    save_denoiser(tiny_denoiser(), tmp_path / "teacher")
    run = finished_run(tmp_path / "run", ModelConfig(str(tmp_path / "teacher")), (5.0, 0.5))
    export_run(run, "diffusers", tmp_path / "out")
    original, labels = load_generator(run / "generator.safetensors"), torch.arange(5)
    assert torch.equal(load_generator(tmp_path / "out").sample(labels), original.sample(labels))
    unet = UNet2DModel.from_pretrained(tmp_path / "out", subfolder="unet").state_dict()
    assert all(torch.equal(value, unet[name]) for name, value in original.denoiser.network.unet.state_dict().items())
    assert load_denoiser(str(tmp_path / "out")).network.image_shape == (1, 8, 8)
    assert unet["conv_in.weight"].shape[0] == NETWORK["block_out_channels"][0]
    assert "5, 0.5" in (tmp_path / "out" / "README.md").read_text()


def test_half_precision_and_file_modes(pipelines, tmp_path):
    from safetensors.torch import load_file

    model = ModelConfig(str(pipelines["sd15", "epsilon"]), "sd15")
    run = finished_run(tmp_path / "run", model, FOUR)
    export_run(run, "diffusers", tmp_path / "out", dtype="bfloat16")
    weights = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    exact = load_file(run / "generator.safetensors")
    assert weights.keys() == exact.keys()
    assert all(torch.equal(value, exact[name].bfloat16()) for name, value in weights.items())
    modes = {path.stat().st_mode for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert len(modes) == 1, "readable by whoever may read the README"


# ------------------------------------------------------------------------------------------------------- bad input


def test_bad_exports_leave_nothing(pipelines, tmp_path, capsys):
    model = ModelConfig(str(pipelines["sdxl", "epsilon"]), "sdxl")
    run = finished_run(tmp_path / "run", model, FOUR)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_text("{}")
    zero = finished_run(tmp_path / "zero", model, (999, 0))
    hub = finished_run(tmp_path / "hub", model, FOUR)
    moved = ModelConfig("someone/somewhere", "sdxl")
    save_generator(
        hub / "generator.safetensors", dict(load_denoiser(model).named_parameters()), load_denoiser(model), FOUR,
        model=moved,
    )  # fmt: skip
    before = sorted(tmp_path.iterdir())
    new = str(tmp_path / "new")
    for arguments, message in (
        ([str(tmp_path / "nowhere"), "--out", new], "does not exist"),
        ([str(tmp_path / "taken"), "--out", new], "has no config.json"),
        ([str(tmp_path / "unfinished"), "--out", new], "generator.safetensors yet"),
        ([str(run), "--out", str(tmp_path / "taken")], "exists already"),
        ([str(run), "--out", str(tmp_path / "no" / "new")], "there is no folder"),
        (["--out", new], "expected one folder"),
        ([str(run), "--run", str(run), "--out", new], "expected one folder"),
        ([str(zero), "--out", new], "timestep 0"),
        ([str(hub), "--full", "--out", new], "there is no folder 'someone/somewhere'"),
    ):
        assert main(["export", "--format", "diffusers", *arguments]) == 2
        assert message in capsys.readouterr().err
        assert sorted(tmp_path.iterdir()) == before
    assert main(["export", str(run), "--format", "lora", "--out", new]) == 2
    assert "has no adapter" in capsys.readouterr().err
    save_denoiser(tiny_denoiser(), tmp_path / "teacher")
    digits = finished_run(tmp_path / "digits", ModelConfig(str(tmp_path / "teacher")), (5.0,))
    with pytest.raises(UserError, match="--full makes a pipeline"):
        export_run(digits, "diffusers", new, full=True)
    with pytest.raises(UserError, match="cannot be read"), (digits / "generator.safetensors").open("r+b") as file:
        file.truncate(4000)
        export_run(digits, "diffusers", new)
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "teacher", digits])
