"""compat.dmd2 against the paper's formulas, written out here in float64 on real schedulers' tables."""

import re

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler
from oracles import DTYPES, assert_twice, random_tensor

from dmd2_fast.compat import dmd2

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULERS = {
    "sd": DDPMScheduler(**SD),
    "ddim": DDIMScheduler(**SD, rescale_betas_zero_snr=False),
    "linear": DDPMScheduler(beta_schedule="linear"),
    "cosine": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
}
TIMESTEPS = torch.tensor([0, 20, 999])
SHAPE = (3, 4, 5, 7)
TYPES = ("epsilon", "v_prediction")


def factors(table, timesteps, dtype):
    """sqrt(abar), sqrt(1 - abar) as columns."""
    abar = table.to(dtype)[timesteps][:, None, None, None]
    return abar.sqrt(), (1 - abar).sqrt()


def x0_of(x_t, prediction, table, timesteps, prediction_type):
    alpha, sigma = factors(table, timesteps, x_t.dtype)
    if prediction_type == "v_prediction":  # v = alpha eps - sigma x0, x_t = alpha x0 + sigma eps
        return alpha * x_t - sigma * prediction
    return (x_t - sigma * prediction) / alpha


def tensors(dtype, num, shape=SHAPE):
    return [random_tensor(shape, dtype, seed) for seed in range(num)]


def in_f64_and_its_own(function, inputs):
    """function(*inputs) in the inputs' dtype, by plain PyTorch, and in float64."""
    return function(*inputs), function(*(value.double() for value in inputs))


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_x0_from_noise(dtype, name, prediction_type):
    table = SCHEDULERS[name].alphas_cumprod
    sample, output = (value.requires_grad_() for value in tensors(dtype, 2))

    def plain(x, p):
        return x0_of(x, p, table, TIMESTEPS, prediction_type)

    if name == "cosine":  # abar is 2e-9 at the end: what is left of x0 there is above f16's range
        sample, output = (1e-3 * value.detach() for value in (sample, output))
        sample, output = sample.requires_grad_(), output.requires_grad_()
    ours = dmd2.get_x0_from_noise(sample, output, table, TIMESTEPS, prediction_type=prediction_type)
    own, exact = in_f64_and_its_own(plain, (sample, output))
    assert ours.dtype == dtype
    for i in range(len(TIMESTEPS)):  # each timestep by itself: x0 at 999 is the largest
        assert_twice(ours[i].detach(), own[i].detach(), exact[i].detach(), f"timestep {TIMESTEPS[i]}")
    for value, grad in zip((sample, output), torch.autograd.grad(ours.sum(), (sample, output)), strict=True):
        (expected,) = torch.autograd.grad(exact.sum(), value, retain_graph=True)
        torch.testing.assert_close(grad, expected)


def test_x0_is_an_f32_rounding_away_from_float64():
    """What the original's casts to float64 are for."""
    table = SCHEDULERS["sd"].alphas_cumprod
    timesteps = torch.tensor([20, 500, 999])
    sample, output = tensors(torch.float32, 2)
    exact = x0_of(sample.double(), output.double(), table, timesteps, "epsilon")
    alpha, sigma = factors(table, timesteps, torch.float64)
    # Roundings of sigma, its product, the difference, alpha and the quotient.
    limit = 2.0**-24 * 3 * ((sigma * output / alpha).abs() + exact.abs())
    for given in (table, table.double()):
        ours = dmd2.get_x0_from_noise(sample, output, given, timesteps)
        assert ours.dtype == torch.float32
        assert ((ours - exact).abs() <= limit).all()
    both = dmd2.get_x0_from_noise(sample.double(), output.double(), table.double(), timesteps)
    torch.testing.assert_close(both, exact, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_noise(dtype, name):
    scheduler = SCHEDULERS[name]
    latents, noise = tensors(dtype, 2)
    latents.requires_grad_()
    alpha, sigma = factors(scheduler.alphas_cumprod, TIMESTEPS, torch.float64)
    exact = (alpha * latents.double() + sigma * noise.double()).detach()
    ours = dmd2.add_noise(scheduler, latents, noise, TIMESTEPS.int())
    assert torch.equal(ours, dmd2.add_noise(scheduler.alphas_cumprod, latents, noise, TIMESTEPS))
    diffusers = scheduler.add_noise(latents, noise, TIMESTEPS)
    assert ours.dtype == diffusers.dtype == dtype
    assert_twice(ours.detach(), diffusers.detach(), exact)
    (grad,) = torch.autograd.grad(ours.sum(), latents)
    torch.testing.assert_close(grad, alpha.expand(SHAPE).to(dtype))


def guided(fake, real, uncond, x_t, table, prediction_type, scale):
    """x0 of the fake score, and of the teacher with guidance between its two x0."""
    cond, base = (x0_of(x_t, p, table, TIMESTEPS, prediction_type) for p in (real, uncond))
    return x0_of(x_t, fake, table, TIMESTEPS, prediction_type), base + scale * (cond - base)


def gradient_of(latents, x_t, fake, real, uncond, table, prediction_type, scale):
    """(p_real - p_fake) / mean|p_real| per sample, p = latents - x0, with the epsilon."""
    fake_x0, real_x0 = guided(fake, real, uncond, x_t, table, prediction_type, scale)
    p_real, p_fake = latents - real_x0, latents - fake_x0
    return (p_real - p_fake) / (p_real.abs().mean((1, 2, 3), keepdim=True) + 1e-6)


@pytest.mark.parametrize("form", ["one batch", "two tensors", "no guidance"])
@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("name", ["sd", "linear"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_distribution_matching(dtype, name, prediction_type, form):
    table = SCHEDULERS[name].alphas_cumprod
    latents, x_t, fake, real, uncond = tensors(dtype, 5)
    latents.requires_grad_()
    scale, given, options = 8.0, real, {"prediction_type": prediction_type}
    if form == "one batch":
        given = torch.cat([uncond, real])
    elif form == "two tensors":
        options["pred_real_noise_uncond"] = uncond
    else:
        scale = 1.0
    loss, gradient = dmd2.distribution_matching_loss(latents, x_t, fake, given, table, TIMESTEPS, scale, **options)

    def expected(*values):
        return gradient_of(*values, table, prediction_type, scale).detach()

    own, exact = in_f64_and_its_own(expected, (latents, x_t, fake, real, uncond))
    assert gradient.dtype == dtype and not gradient.requires_grad
    assert_twice(gradient, own, exact, "gradient", num_roundings=2)  # the difference is kept in this dtype
    assert loss.dtype == torch.float32
    target = latents.double() - exact
    torch.testing.assert_close(loss.double(), 0.5 * F.mse_loss(latents.double(), target), rtol=1e-5, atol=0)
    (grad,) = torch.autograd.grad(loss, latents)
    assert_twice(grad, own / own.numel(), exact / exact.numel(), "autograd", num_roundings=2)


def test_gradient_in_f16_is_not_subnormal():
    """gradient / numel of 65,536 elements is below f16's normal range: the gradient itself must not pass through it."""
    table, shape = SCHEDULERS["sd"].alphas_cumprod, (1, 4, 128, 128)
    values = tensors(torch.float16, 4, shape)
    _, gradient = dmd2.distribution_matching_loss(*values, table, torch.tensor([20]))
    latents, x_t, fake, real = (value.double() for value in values)
    alpha, sigma = factors(table, torch.tensor([20]), torch.float64)
    exact = sigma / alpha * (real - fake) / (latents - (x_t - sigma * real) / alpha).abs().mean()
    torch.testing.assert_close(gradient.double(), exact, rtol=2e-3, atol=1e-6)


def test_the_loss_keeps_the_latents_graph_and_their_hooks():
    table, seen = SCHEDULERS["sd"].alphas_cumprod, []
    weight = torch.tensor(2.0, requires_grad=True)
    base, x_t, fake, real = tensors(torch.float32, 4)
    latents = weight * base
    latents.register_hook(lambda grad: seen.append(grad))
    loss, gradient = dmd2.distribution_matching_loss(latents, x_t, fake, real, table, TIMESTEPS)
    assert not seen  # the gradient that is returned is no backward of the trainer's
    loss.backward()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], gradient / gradient.numel())
    torch.testing.assert_close(weight.grad, (gradient * base).mean())
    with torch.no_grad():
        plain = dmd2.distribution_matching_loss(latents, x_t, fake, real, table, TIMESTEPS)
    assert torch.equal(plain[0], loss) and torch.equal(plain[1], gradient)
    assert not plain[0].requires_grad

    def step(latents):
        return dmd2.distribution_matching_loss(2 * latents, x_t, fake, real, table, TIMESTEPS)

    leaf = base.clone().requires_grad_()
    loss, again = torch.compile(step, backend="aot_eager")(leaf)
    loss.backward()
    assert torch.equal(again, gradient)
    torch.testing.assert_close(leaf.grad, 2 * gradient / gradient.numel())


def test_where_it_differs_from_the_original():
    table = SCHEDULERS["sd"].alphas_cumprod
    latents, x_t, fake, _ = tensors(torch.float32, 4)
    # A teacher that returns the latents themselves: mean|p_real| is 0, the original divides by it.
    alpha, sigma = factors(table, TIMESTEPS, torch.float64)
    real = ((x_t - alpha * latents) / sigma).float()
    loss, gradient = dmd2.distribution_matching_loss(latents, x_t, fake, real, table, TIMESTEPS)
    assert loss.isfinite() and gradient.isfinite().all()
    fake[1, 0, 0, 0] = torch.inf
    loss, gradient = dmd2.distribution_matching_loss(latents, x_t, fake, real, table, TIMESTEPS)
    assert not loss.isfinite() and not gradient[1].isfinite().all() and gradient[0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gan_losses(dtype):
    fake, real = (4 * random_tensor((5, 1), dtype, seed) for seed in (1, 2))
    fake.requires_grad_(), real.requires_grad_()
    ours = dmd2.gen_cls_loss(fake)
    exact = -torch.sigmoid(fake.double()).log().mean()
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(ours, fake)
    torch.testing.assert_close(grad, -(1 - torch.sigmoid(fake.double())).to(dtype) / 5)

    ours = dmd2.guidance_cls_loss(pred_realism_on_fake=fake, pred_realism_on_real=real)
    exact = -(1 - torch.sigmoid(fake.double())).log().mean() - torch.sigmoid(real.double()).log().mean()
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=0)
    grads = torch.autograd.grad(ours, (fake, real))
    torch.testing.assert_close(grads[0], torch.sigmoid(fake.double()).to(dtype) / 5)
    torch.testing.assert_close(grads[1], -(1 - torch.sigmoid(real.double())).to(dtype) / 5)


TABLE = SCHEDULERS["sd"].alphas_cumprod
X = torch.zeros(SHAPE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: dmd2.get_x0_from_noise(X, X, TABLE, torch.tensor([0, 1, 1000])),
            "timesteps: got values from 0 to 1000",
        ),
        (lambda: dmd2.get_x0_from_noise(X, X, TABLE, torch.tensor([0, -1, 5])), "timesteps: got values from -1 to 5"),
        (lambda: dmd2.get_x0_from_noise(X, X, TABLE, torch.tensor([1])), "timesteps: got shape (1,), expected (3,)"),
        (lambda: dmd2.get_x0_from_noise(X, X, TABLE, torch.rand(3)), "timesteps: got torch.float32"),
        (lambda: dmd2.get_x0_from_noise(X, X, TABLE, 999), "timesteps: got int"),
        (lambda: dmd2.get_x0_from_noise(X, X[:2], TABLE, TIMESTEPS), "model_output: got shape (2, 4, 5, 7)"),
        (lambda: dmd2.get_x0_from_noise(X, X, TABLE.bfloat16(), TIMESTEPS), "alphas_cumprod: got torch.bfloat16"),
        (lambda: dmd2.get_x0_from_noise(X, X, TABLE[:, None], TIMESTEPS), "alphas_cumprod: got (1000, 1)"),
        (lambda: dmd2.get_x0_from_noise(X, X, TABLE.tolist(), TIMESTEPS), "alphas_cumprod: got list"),
        (lambda: dmd2.get_x0_from_noise(X, X, TABLE.to("meta"), TIMESTEPS), "alphas_cumprod: got a tensor on meta"),
        (lambda: dmd2.get_x0_from_noise(X, X, TABLE, TIMESTEPS, prediction_type="x"), "prediction_type: got 'x'"),
        (lambda: dmd2.add_noise(object(), X, X, TIMESTEPS), "scheduler: got object"),
        (lambda: dmd2.add_noise(TABLE, X, X[..., :3], TIMESTEPS), "noise: got shape (3, 4, 5, 3)"),
        (
            lambda: dmd2.distribution_matching_loss(X, X[:2], X, X, TABLE, TIMESTEPS),
            "noisy_latents: got shape (2, 4, 5, 7), expected that of latents",
        ),
        (
            lambda: dmd2.distribution_matching_loss(X, X, X[:2], X, TABLE, TIMESTEPS),
            "pred_fake_noise: got shape (2, 4, 5, 7)",
        ),
        (
            lambda: dmd2.distribution_matching_loss(X, X, X, torch.cat([X, X, X]), TABLE, TIMESTEPS),
            "pred_real_noise: got shape (9, 4, 5, 7)",
        ),
        (
            lambda: dmd2.distribution_matching_loss(X, X, X, X, TABLE, TIMESTEPS, pred_real_noise_uncond=X[:1]),
            "pred_real_noise_uncond: got shape (1, 4, 5, 7)",
        ),
        (
            lambda: dmd2.distribution_matching_loss(
                X, X, X, torch.cat([X, X]), TABLE, TIMESTEPS, pred_real_noise_uncond=X
            ),
            "pred_real_noise: got [uncond; cond] and pred_real_noise_uncond too",
        ),
        (lambda: dmd2.distribution_matching_loss(X, X, X, X, TABLE, TIMESTEPS, 8.0), "guidance_scale: got 8.0"),
        (lambda: dmd2.gen_cls_loss([1.0]), "pred_realism_on_fake: got list"),
        (
            lambda: dmd2.guidance_cls_loss(pred_realism_on_fake=[1.0], pred_realism_on_real=X),
            "pred_realism_on_fake: got list",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
