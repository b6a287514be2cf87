"""compat.diffusers: fused schedulers against diffusers' own and float64, optimised UNets in place and back."""

from __future__ import annotations

import copy
import json
import pickle

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from oracles import DTYPES, assert_twice, random_tensor
from pipelines import make_pipeline
from test_swap import CONFIGS, arguments, assert_twice_plain, build, cast, results

from dmd2_fast.compat import diffusers as compat
from dmd2_fast.compat.diffusers import fuse_scheduler, optimize_unet, optimized_unet, restore_unet
from dmd2_fast.errors import UserError
from dmd2_fast.networks.swap import swapped_operators

SHAPE = (2, 4, 8, 6)


def inputs(num: int, dtype=torch.float32) -> list[torch.Tensor]:
    return [random_tensor(SHAPE, dtype, seed) for seed in range(num)]


# --- add_noise --------------------------------------------------------------------------------------------------------


def formula(scheduler, x, noise, timesteps):
    abar = scheduler.alphas_cumprod.double()[timesteps][:, None, None, None]
    return abar.sqrt() * x.double() + (1 - abar).sqrt() * noise.double()


def noising_schedulers() -> list[type]:
    """diffusers' schedulers with an alphas_cumprod and an add_noise, made with their defaults."""
    kinds = {value for name, value in vars(diffusers).items() if name.endswith("Scheduler") and isinstance(value, type)}
    names = set(diffusers._import_structure["schedulers"])
    kinds |= {getattr(diffusers, name) for name in names if name.endswith("Scheduler") and "Flax" not in name}
    found = []
    for kind in sorted(kinds, key=lambda kind: kind.__name__):
        if issubclass(kind, SchedulerMixin) and hasattr(kind, "add_noise"):
            try:
                scheduler = kind()
            except (ImportError, TypeError, ValueError):
                continue
            if isinstance(getattr(scheduler, "alphas_cumprod", None), torch.Tensor):
                found.append(scheduler)
    return found


@pytest.mark.filterwarnings("ignore")
def test_every_scheduler_is_fused_or_refused():
    """By its values: the table names those whose add_noise is DDPM's, whatever the state, and no other."""
    x, noise = inputs(2)
    timesteps, fused = torch.tensor([7, 950]), set()
    for scheduler in noising_schedulers():
        scheduler.set_timesteps(5)
        try:
            own = scheduler.add_noise(x, noise, timesteps)
            agrees = torch.allclose(own.double(), formula(scheduler, x, noise, timesteps), atol=1e-5)
        except (IndexError, RuntimeError, TypeError, ValueError):
            agrees = False  # only for timesteps that it will sample at
        if agrees:
            fused.add(type(scheduler))
            ours = fuse_scheduler(scheduler)
            assert type(ours) is not type(scheduler) and isinstance(ours, type(scheduler))
            torch.testing.assert_close(ours.add_noise(x, noise, timesteps), own)
        else:
            with pytest.raises(UserError, match=f"{type(scheduler).__name__} does not noise as"):
                fuse_scheduler(scheduler)
    assert fused == set(compat.DDPM_TYPE) and len(fused) == 11


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_noise(dtype):
    """At most twice diffusers' error; in 16 bits diffusers has rounded the table, and noises t = 0 with nothing."""
    scheduler, timesteps = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085), torch.tensor([0, 999])
    fused = fuse_scheduler(scheduler)
    x, noise = inputs(2, dtype)
    x.requires_grad_()
    exact = formula(scheduler, x, noise, timesteps).detach()
    ours, own = fused.add_noise(x, noise, timesteps), scheduler.add_noise(x, noise, timesteps)
    assert ours.dtype == own.dtype
    assert_twice(ours.detach(), own.detach(), exact)
    (grad,) = torch.autograd.grad(ours.sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(own.sum(), x)[0])
    if dtype == torch.bfloat16:
        assert torch.equal(own[0], x[0]) and not torch.equal(ours[0], x[0])


def test_add_noise_takes_what_diffusers_takes():
    scheduler = DDPMScheduler()
    fused = fuse_scheduler(scheduler)
    x, noise = inputs(2)
    for timesteps in (torch.tensor([500]), torch.tensor(500), torch.tensor([[3], [500]]), torch.tensor([3, 500]).int()):
        torch.testing.assert_close(fused.add_noise(x, noise, timesteps), scheduler.add_noise(x, noise, timesteps))
    timesteps = torch.tensor([3, 500])
    broadcast = fused.add_noise(x[:1], noise[:1], timesteps)
    assert torch.equal(broadcast, scheduler.add_noise(x[:1], noise[:1], timesteps)) and len(broadcast) == 2
    mixed = fused.add_noise(x.bfloat16(), noise, timesteps)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, scheduler.add_noise(x.bfloat16(), noise, timesteps))
    one = noise[:1].requires_grad_()  # one noise for all, with a gradient
    (grad,) = torch.autograd.grad(fused.add_noise(x, one, timesteps).sum(), one)
    assert grad.shape == one.shape
    noise.requires_grad_()
    (grad,) = torch.autograd.grad(fused.add_noise(x, noise, timesteps).sum(), noise)
    torch.testing.assert_close(grad[:, 0, 0, 0], (1 - scheduler.alphas_cumprod[timesteps]).sqrt())
    with pytest.raises(ValueError, match="timesteps: got values from 1 to 1000"):
        fused.add_noise(x, noise.detach(), torch.tensor([1, 1000]))


# --- the LCM step -----------------------------------------------------------------------------------------------------


def lcm_formula(scheduler, x_t, p, timestep, following, noise):
    """(previous, denoised) in float64: x0 of the prediction, boundary scalings (LCM, arXiv 2310.04378), noise again."""
    abar = scheduler.alphas_cumprod.double()
    alpha, sigma = abar[timestep].sqrt(), (1 - abar[timestep]).sqrt()
    x_t, p = x_t.double(), p.double()
    x0 = {"epsilon": (x_t - sigma * p) / alpha, "sample": p, "v_prediction": alpha * x_t - sigma * p}
    scaled, sigma_data = timestep * scheduler.config.timestep_scaling, 0.5
    c_skip = sigma_data**2 / (scaled**2 + sigma_data**2)
    c_out = scaled / (scaled**2 + sigma_data**2) ** 0.5
    denoised = c_skip * x_t + c_out * x0[scheduler.config.prediction_type]
    if following is None:
        return denoised, denoised
    return abar[following].sqrt() * denoised + (1 - abar[following]).sqrt() * noise.double(), denoised


@pytest.mark.parametrize("scaling", [10.0, 1e-3, 1e6])  # the default, one that mixes x_t in, the one of our exports
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lcm_step(dtype, prediction_type, scaling):
    """Four steps of a chain, each against float64 from the same input, and diffusers' own beside it."""
    scheduler = LCMScheduler(prediction_type=prediction_type, timestep_scaling=scaling)
    fused = fuse_scheduler(scheduler)
    generators = [torch.Generator().manual_seed(3) for _ in range(3)]
    scheduler.set_timesteps(4), fused.set_timesteps(4)
    times = scheduler.timesteps.tolist()
    sample, output = inputs(2, dtype)
    for index, timestep in enumerate(scheduler.timesteps):
        following = times[index + 1] if index < 3 else None
        noise = torch.randn(SHAPE, generator=generators[2], dtype=dtype) if index < 3 else None
        exact = lcm_formula(scheduler, sample, output, times[index], following, noise)
        own = scheduler.step(output, timestep, sample, generator=generators[0], return_dict=False)
        given = timestep if index % 2 else int(timestep)
        ours = fused.step(output, given, sample, generator=generators[1], return_dict=index == 1)
        ours = (ours.prev_sample, ours.denoised) if index == 1 else ours
        assert fused.step_index == scheduler.step_index == index + 1
        for name, a, b, c in zip(("previous", "denoised"), ours, own, exact, strict=True):
            assert a.dtype == b.dtype
            assert_twice(a, b, c, f"{name} of step {index}")
        sample, output = own[0] / own[0].abs().max(), output.flip(0)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_lcm_step_with_other_settings():
    """Starting inside the steps, a step of 0, one that is the last by count, several generators: as diffusers."""
    for timesteps, begin in (
        ({"num_inference_steps": 2}, None),
        ({"timesteps": [999, 499, 0]}, None),
        ({"timesteps": [999, 749, 499, 249]}, 2),
        ({"num_inference_steps": 1}, None),
        ({"num_inference_steps": 4, "strength": 0.5}, None),
        ({"timesteps": [999, 749, 499, 249], "strength": 0.5}, None),  # diffusers noises after the last one
    ):
        both = LCMScheduler(), fuse_scheduler(LCMScheduler())
        for scheduler in both:
            scheduler.set_timesteps(**timesteps)
            if begin is not None:
                scheduler.set_begin_index(begin)
        sample, output = inputs(2)
        chains = []
        for scheduler in both:
            x, generator = sample, [torch.Generator().manual_seed(seed) for seed in (1, 2)]
            for timestep in scheduler.timesteps[begin or 0 :]:
                x = scheduler.step(output, timestep, x, generator).prev_sample
            chains.append(x)
        torch.testing.assert_close(chains[1], chains[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"clip_sample": True}, {"thresholding": True, "sample_max_value": 2.0}, {"rescale_betas_zero_snr": True}],
    ids=["clip", "threshold", "zero-snr"],
)
def test_lcm_step_falls_back_to_diffusers(options):
    both = LCMScheduler(**options), fuse_scheduler(LCMScheduler(**options))
    sample, output = inputs(2)
    for scheduler in both:
        scheduler.set_timesteps(2)
    for timestep in both[0].timesteps:
        first, ours = (s.step(output, timestep, sample, torch.Generator().manual_seed(0)) for s in both)
        torch.testing.assert_close(ours.denoised, first.denoised, equal_nan=True)
        torch.testing.assert_close(ours.prev_sample, first.prev_sample, equal_nan=True)


def test_lcm_step_takes_what_diffusers_takes():
    fused = fuse_scheduler(LCMScheduler())
    sample, output = inputs(2)
    with pytest.raises(ValueError, match="set_timesteps"):
        fused.step(output, 999, sample)
    fused.set_timesteps(1)
    assert fused.step(output, fused.timesteps[0], sample.bfloat16()).prev_sample.dtype == torch.float32


def test_lcm_step_is_differentiable():
    both = LCMScheduler(), fuse_scheduler(LCMScheduler())
    values, grads = [value.requires_grad_() for value in inputs(2)], []
    for scheduler in both:
        scheduler.set_timesteps(3)
        previous = scheduler.step(values[1], scheduler.timesteps[0], values[0], torch.Generator()).prev_sample
        grads.append(torch.autograd.grad(previous.square().sum(), values))
    for ours, own in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-4)


# --- a scheduler among others -----------------------------------------------------------------------------------------


def test_the_given_scheduler_stays_and_copies_are_fused():
    scheduler = LCMScheduler(timestep_scaling=7.0)
    fused = fuse_scheduler(scheduler)
    assert type(scheduler) is LCMScheduler and fuse_scheduler(fused) is fused
    fused.set_timesteps(2)
    assert scheduler.num_inference_steps is None and fused.num_inference_steps == 2
    assert type(fused) is type(fuse_scheduler(LCMScheduler()))
    assert fused.compatibles == scheduler.compatibles and len(fused) == 1000 and fused.init_noise_sigma == 1.0
    for copied in (copy.copy(fused), copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(copied) is type(fused) and copied is not fused and copied.config == fused.config
        assert torch.equal(copied.timesteps, fused.timesteps)
    again = type(fused).from_config(fused.config)
    assert type(again) is type(fused) and again.config.timestep_scaling == 7.0
    plain = LCMScheduler.from_config(fused.config)
    assert type(plain) is LCMScheduler and plain.config.timestep_scaling == 7.0

    class OwnStep(LCMScheduler):
        def step(self, *args, **kwargs):
            return "own"

    assert fuse_scheduler(OwnStep()).step() == "own"

    class OwnNoise(DDPMScheduler):
        def add_noise(self, *args):
            return "own"

    with pytest.raises(UserError, match="OwnNoise does not noise as"):
        fuse_scheduler(OwnNoise())
    with pytest.raises(UserError, match="EulerDiscreteScheduler does not noise as"):
        fuse_scheduler(EulerDiscreteScheduler())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_pipeline(tmp_path_factory.mktemp("pipeline"), "sd15", sample_size=8)


def sample(pipeline, **options):
    generator = torch.Generator().manual_seed(0)
    return pipeline("a red cat", generator=generator, output_type="pt", guidance_scale=2.0, **options).images


@pytest.mark.filterwarnings("ignore")
def test_inside_a_pipeline(folder, tmp_path, monkeypatch):
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    own = sample(pipeline, num_inference_steps=3)
    pipeline.scheduler = fuse_scheduler(pipeline.scheduler)
    with optimized_unet(pipeline.unet) as done:
        assert not done.kept and len(done.swapped) == 23 + 14
        ours = sample(pipeline, num_inference_steps=3)
    assert not torch.equal(ours, own) and (ours - own).abs().max() < 1e-3

    # From an image: diffusers' own call of add_noise.
    image = StableDiffusionImg2ImgPipeline.from_pipe(pipeline, requires_safety_checker=False)
    image.set_progress_bar_config(disable=True)
    assert type(image.scheduler) is type(pipeline.scheduler)
    given = {"image": own, "strength": 0.7, "num_inference_steps": 3}
    ours = sample(image, **given)
    image.scheduler = LCMScheduler.from_config(image.scheduler.config)
    torch.testing.assert_close(ours, sample(image, **given), rtol=0, atol=1e-3)

    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["diffusers", "LCMScheduler"]
    written = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert written["_class_name"] == "LCMScheduler" and written["beta_start"] == 0.00085
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is LCMScheduler
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path, scheduler=pipeline.scheduler)
    assert loaded.scheduler is pipeline.scheduler

    # The fused step is what ran: without it nothing does.
    monkeypatch.setattr(compat, "predict_x0", None)
    with pytest.raises(TypeError, match="NoneType"):
        sample(loaded, num_inference_steps=1)


def test_ddim_keeps_its_own_step():
    scheduler = DDIMScheduler()
    fused = fuse_scheduler(scheduler)
    scheduler.set_timesteps(3), fused.set_timesteps(3)
    x, p = inputs(2)
    time = scheduler.timesteps[0]
    assert torch.equal(fused.step(p, time, x).prev_sample, scheduler.step(p, time, x).prev_sample)


# --- UNets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", ["sdxl", "sd15", "unet2d"])
def test_optimize_and_restore(name, dtype):
    """Outputs and all gradients by the twice-PyTorch rule; afterwards the identical objects, and the same bits."""
    unet = build(name).to(dtype)
    x, given = arguments(name)
    x, given = x.to(dtype), cast(given, dtype)
    exact = results(copy.deepcopy(unet), x, given, torch.float64)
    plain = results(unet, x, given, dtype)
    state, parameters = {key: value.clone() for key, value in unet.state_dict().items()}, dict(unet.named_parameters())
    classes = {path: type(module) for path, module in unet.named_modules()}
    processors = {path: getattr(module, "processor", None) for path, module in unet.named_modules()}

    done = optimize_unet(unet)
    assert len(done.swapped) == sum(CONFIGS[name][2].values()) and not done.kept
    assert swapped_operators(unet) == CONFIGS[name][2]
    assert_twice_plain(results(unet, x, given, dtype), plain, exact)
    assert optimize_unet(unet) == ([], {})
    assert list(unet.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in unet.state_dict().items())
    assert all(value is parameters[path] for path, value in unet.named_parameters())

    restore_unet(unet)
    assert {path: type(module) for path, module in unet.named_modules()} == classes
    assert all(getattr(module, "processor", None) is processors[path] for path, module in unet.named_modules())
    for path, value in results(unet, x, given, dtype).items():
        assert torch.equal(value, plain[path]), path


class OwnProcessor(AttnProcessor2_0):
    """As an IP-Adapter's: another class, and no business of ours."""


def test_what_is_kept_is_reported():
    unet = build("sd15")
    x, given = arguments("sd15")
    path = "mid_block.attentions.0.transformer_blocks.0.attn2"
    own = OwnProcessor()
    unet.get_submodule(path).set_processor(own)
    unet.mid_block.resnets[1].nonlinearity = torch.nn.GELU()
    with torch.no_grad():
        plain = unet(x, **given).sample
    with optimized_unet(unet) as (swapped, kept):
        assert kept == {path: "OwnProcessor", "mid_block.resnets.1": "ResnetBlock2D"}
        assert len(swapped) == sum(CONFIGS["sd15"][2].values()) - 1 - 2
        assert not {place for place, _ in swapped} & {path, "mid_block.resnets.1.norm1"}
        assert unet.get_submodule(path).processor is own
        with torch.no_grad():
            torch.testing.assert_close(unet(x, **given).sample, plain, rtol=1e-4, atol=1e-4)
    assert unet.get_submodule(path).processor is own and not swapped_operators(unet)

    optimize_unet(unet)
    with pytest.raises(RuntimeError, match="inside"), optimized_unet(unet):
        raise RuntimeError("inside")
    assert swapped_operators(unet)  # was optimised before the block
    restore_unet(unet)
    with pytest.raises(RuntimeError, match="inside"), optimized_unet(unet):
        raise RuntimeError("inside")
    assert not swapped_operators(unet)


def test_lora_layers_are_used_by_the_swapped_attention():
    from peft import LoraConfig

    unet = build("sd15")
    unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    x, given = arguments("sd15")
    with torch.no_grad():
        plain = unet(x, **given).sample
        with optimized_unet(unet) as done:
            assert not done.kept
            torch.testing.assert_close(unet(x, **given).sample, plain, rtol=1e-4, atol=1e-4)
            unet.disable_adapters()
            assert (unet(x, **given).sample - plain).abs().max() > 1e-2


def test_errors_of_optimize_unet(folder):
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    with pytest.raises(UserError, match=r"got StableDiffusionPipeline, expected a UNet: pass its \.unet"):
        optimize_unet(pipeline)
    with pytest.raises(UserError, match="got str, expected a UNet"):
        optimize_unet("unet")
