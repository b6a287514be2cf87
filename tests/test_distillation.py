"""The losses of one step against the paper's formulas, and who gets a gradient and who must not."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from tiny import SHAPE, random_batch, split_batch, tiny_networks

from dmd2_fast.distillation import Algorithm, fake_score_loss, generate, generator_loss
from dmd2_fast.random import NoiseKey, philox_normal, philox_uniform

KEY = NoiseKey(11, step=2)
KARRAS = (5.0, 2.0, 0.8, 0.3)
KARRAS_TABLE = torch.tensor(
    [(0.002 ** (1 / 7) + i / 999 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7 for i in range(1000)]
)
MATRIX = [
    {"passes": passes, "features": features, "guidance_scale": scale, "rollout_index": index}
    for passes, features, scale, index in [
        ("shared", "fake_score", 1.0, "sample"),
        ("shared", "teacher", 1.0, "batch"),
        ("shared", "teacher", 3.0, "sample"),
        ("independent", "fake_score", 3.0, "batch"),
        ("independent", "teacher", 3.0, "batch"),
        ("independent", "teacher", 1.0, "sample"),
    ]
]
IDS = ["-".join(map(str, case.values())) for case in MATRIX]


def algorithm(**settings) -> Algorithm:
    return Algorithm(**{"steps": KARRAS, "generator_weight": 0.3, "discriminator_weight": 0.2, **settings})


def drawn(batch, stream, low=0.0, high=1.0, key=KEY):
    """sigma (N,) and noise (N, ...) of a pair of streams, from DESIGN's table of streams and the Karras table."""
    u = philox_uniform(batch.sample_ids, (1,), key.fork(stream))[:, 0]
    first, last = round(low * 1000), round(high * 1000)
    index = (first + (u * (last - first)).long()).clamp(max=last - 1)
    return KARRAS_TABLE[index], philox_normal(batch.sample_ids, SHAPE, key.fork(stream + 1), torch.float32)


def noised(x, sigma, n):
    return x + sigma.reshape(-1, 1, 1, 1) * n


def head_logits(networks, features, x_t, sigma, condition):
    source = networks.teacher if features == "teacher" else networks.fake_score.denoiser
    return networks.fake_score.heads(source.encode(x_t, sigma, condition))


def teacher_x0(networks, x_t, sigma, condition, scale):
    cond = networks.teacher.predict(x_t, sigma, condition)
    if scale == 1.0:
        return cond
    uncond = networks.teacher.predict(x_t, sigma, {"class_labels": torch.full((len(x_t),), 10)})
    return uncond + scale * (cond - uncond)


def gradients(loss, parameters):
    return torch.autograd.grad(loss, parameters, allow_unused=True)


@pytest.mark.parametrize("case", MATRIX, ids=IDS)
def test_generator_loss_and_gradient(case):
    """The DMD surrogate and the GAN loss written down separately, one network call at a time, without any sharing."""
    settings, batch = algorithm(**case), random_batch(6)
    networks = tiny_networks(settings)
    parameters = list(networks.generator.parameters())
    networks.fake_score.requires_grad_(False)
    loss, x, metrics = generator_loss(networks, settings, batch, KEY)
    got = gradients(loss, parameters)

    sample = generate(networks, settings, batch, KEY)
    torch.testing.assert_close(x, sample.detach())
    sigma, n = drawn(batch, 2, 0.02, 0.98)
    x_t = noised(sample, sigma, n)
    with torch.no_grad():
        real = teacher_x0(networks, x_t, sigma, batch.condition, settings.guidance_scale)
        fake = networks.fake_score.denoiser.predict(x_t, sigma, batch.condition)
        p_real, p_fake = sample - real, sample - fake
        grad = (p_real - p_fake) / (p_real.abs().mean((1, 2, 3), keepdim=True) + 1e-6)
    dmd = 0.5 * F.mse_loss(sample, (sample - grad).detach())
    if case["passes"] == "independent":
        sigma, n = drawn(batch, 6)
        x_t = noised(sample, sigma, n)
    gan = F.softplus(-head_logits(networks, case["features"], x_t, sigma, batch.condition)).mean()
    expected = dmd + 0.3 * gan
    torch.testing.assert_close(metrics["generator/dmd"], dmd.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(metrics["generator/gan"], gan.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-4, atol=1e-6)
    for mine, reference in zip(got, gradients(expected, parameters), strict=True):
        assert (mine - reference).norm() <= 1e-4 * reference.norm() + 1e-7


@pytest.mark.parametrize("r1", ["none", "approximate"])
@pytest.mark.parametrize("case", MATRIX, ids=IDS)
def test_fake_score_loss_and_gradient(case, r1):
    settings, batch = algorithm(**case, r1_kind=r1, r1_weight=0.7), random_batch(6)
    networks = tiny_networks(settings)
    x = torch.randn(6, *SHAPE)
    parameters = list(networks.fake_score.parameters())
    loss, metrics = fake_score_loss(networks, settings, batch, x, KEY)
    got = gradients(loss, parameters)

    sigma, n = drawn(batch, 4)
    x_t = noised(x, sigma, n)
    prediction = networks.fake_score.denoiser.predict(x_t, sigma, batch.condition)
    weight = sigma**-2 + networks.schedule.sigma_data**-2
    denoising = (weight.reshape(-1, 1, 1, 1) * (prediction - x) ** 2).mean()
    if case["passes"] == "independent":
        sigma, n = drawn(batch, 6)
        x_t = noised(x, sigma, n)
    fake_logits = head_logits(networks, case["features"], x_t, sigma, batch.condition)
    sigma, n = drawn(batch, 8)
    real_t = noised(batch.x0, sigma, n)
    real_logits = head_logits(networks, case["features"], real_t, sigma, batch.condition)
    gan = F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()
    expected = denoising + 0.2 * gan
    if r1 == "approximate":
        std = 0.1 * real_t.square().mean((1, 2, 3)).sqrt()
        shift = std.reshape(-1, 1, 1, 1) * philox_normal(batch.sample_ids, SHAPE, KEY.fork(10), torch.float32)
        perturbed = head_logits(networks, case["features"], real_t + shift, sigma, batch.condition)
        penalty = (((real_logits - perturbed) / std[:, None]) ** 2).mean()
        torch.testing.assert_close(metrics["fake_score/r1"], penalty.detach(), rtol=1e-3, atol=1e-5)
        expected = expected + 0.2 * 0.7 * penalty
    torch.testing.assert_close(metrics["fake_score/denoising"], denoising.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-4, atol=1e-6)
    for mine, reference in zip(got, gradients(expected, parameters), strict=True):
        if reference is None:
            assert mine is None or not mine.any()
        else:
            assert (mine - reference).norm() <= 2e-3 * reference.norm() + 1e-6


@pytest.mark.parametrize("case", MATRIX, ids=IDS)
def test_generator_step_touches_the_generator_alone(case):
    """Every generator parameter gets a gradient through dmd_loss and through the frozen score; nothing else any."""
    settings, batch = algorithm(**case), random_batch(4)
    for weights in ({"dmd_weight": 0.0}, {"generator_weight": 0.0}):
        settings = Algorithm(**{**settings.__dict__, **weights})
        networks = tiny_networks(settings)
        networks.fake_score.requires_grad_(False)
        loss, _, _ = generator_loss(networks, settings, batch, KEY)
        loss.backward()
        for name, parameter in networks.generator.named_parameters():
            assert parameter.grad is not None and parameter.grad.any(), f"{name} got no gradient with {weights}"
        others = itertools.chain(networks.fake_score.named_parameters(), networks.teacher.named_parameters())
        assert [name for name, parameter in others if parameter.grad is not None] == []
        settings = algorithm(**case)


@pytest.mark.parametrize("features", ["fake_score", "teacher"])
@pytest.mark.parametrize("passes", ["shared", "independent"])
def test_who_learns_from_the_adversarial_loss(features, passes):
    """The paper's source trains the fake score's encoder too; the teacher's features train the head alone."""
    settings = algorithm(features=features, passes=passes, r1_kind="approximate")
    batch, x = random_batch(4), torch.randn(4, *SHAPE)

    def trained(networks, without):
        """Gradient of the fake score with the adversarial part minus without it, by name."""
        networks.fake_score.zero_grad()
        fake_score_loss(networks, settings, batch, x, KEY)[0].backward()
        whole = {k: p.grad.clone() for k, p in networks.fake_score.named_parameters() if p.grad is not None}
        for name, gradient in without.items():
            whole[name] -= gradient
        return {name for name, value in whole.items() if value.norm() > 1e-6}

    networks = tiny_networks(settings)
    alone = Algorithm(**{**settings.__dict__, "discriminator_weight": 0.0})
    fake_score_loss(networks, alone, batch, x, KEY)[0].backward()
    denoising = {k: p.grad.clone() for k, p in networks.fake_score.named_parameters() if p.grad is not None}
    assert not any(name.startswith("heads") for name in denoising)
    found = trained(networks, denoising)
    names = [name for name, _ in networks.fake_score.named_parameters()]
    heads = {name for name in names if name.startswith("heads")}
    decoder = {name for name in names if any(part in name for part in (".up_blocks.", ".conv_out.", ".conv_norm_out."))}
    encoder = set(names) - heads - decoder
    assert heads <= found
    assert not found & decoder, "the adversarial loss must not reach the decoder"
    assert encoder <= found if features == "fake_score" else not found & encoder
    assert all(p.grad is None for p in networks.teacher.parameters())
    assert all(p.grad is None for p in networks.generator.parameters()), "x gets no gradient from the fake score"


def test_teachers_features_are_used_when_asked_for():
    settings = algorithm(features="teacher")
    batch, x = random_batch(4), torch.randn(4, *SHAPE)
    networks = tiny_networks(settings)
    before = fake_score_loss(networks, settings, batch, x, KEY)[1]["logits/real"]
    with torch.no_grad():
        networks.fake_score.denoiser.network.unet.conv_in.weight.mul_(3)
    after = fake_score_loss(networks, settings, batch, x, KEY)[1]["logits/real"]
    assert torch.equal(before, after)


@pytest.mark.parametrize("case", MATRIX[:4], ids=IDS[:4])
def test_losses_do_not_depend_on_the_split(case):
    """1 x 8, 2 x 4 and 4 x 2: the mean of the parts' losses and gradients is that of the whole."""
    settings, batch = algorithm(**case, r1_kind="approximate"), random_batch(8)
    results = []
    for parts in (1, 2, 4):
        networks = tiny_networks(settings)
        networks.fake_score.requires_grad_(False)
        total, xs = 0.0, []
        for part in split_batch(batch, parts):
            loss, x, _ = generator_loss(networks, settings, part, KEY)
            (loss / parts).backward()
            total += loss.item() / parts
            xs.append(x)
        networks.fake_score.requires_grad_(True)
        for part, x in zip(split_batch(batch, parts), xs, strict=True):
            loss, _ = fake_score_loss(networks, settings, part, x, KEY)
            (loss / parts).backward()
            total += loss.item() / parts
        everything = itertools.chain(networks.generator.parameters(), networks.fake_score.parameters())
        results.append((total, torch.cat([p.grad.flatten() for p in everything if p.grad is not None])))
    for total, gradient in results[1:]:
        assert total == pytest.approx(results[0][0], rel=1e-5)
        assert (gradient - results[0][1]).norm() <= 1e-5 * results[0][1].norm()


def test_every_draw_changes_with_the_iteration_and_none_with_a_second_call():
    settings, batch = algorithm(), random_batch(4)
    networks = tiny_networks(settings)
    networks.fake_score.requires_grad_(False)
    first, again, other = (generator_loss(networks, settings, batch, key)[0] for key in (KEY, KEY, KEY.at(3)))
    assert torch.equal(first, again) and first != other


def test_lazy_r1_runs_every_interval_with_its_weight():
    batch, x = random_batch(4), torch.randn(4, *SHAPE)
    lazy = algorithm(r1_kind="approximate", r1_interval=3)
    networks = tiny_networks(lazy)
    seen = [i for i in range(7) if "fake_score/r1" in fake_score_loss(networks, lazy, batch, x, KEY.at(i))[1]]
    assert seen == [0, 3, 6]
    loss, metrics = fake_score_loss(networks, lazy, batch, x, KEY.at(3))
    expected = metrics["fake_score/denoising"] + 0.2 * (metrics["fake_score/gan"] + 3 * metrics["fake_score/r1"])
    torch.testing.assert_close(loss.detach(), expected)


def test_without_adversarial_part_there_is_no_head():
    settings = algorithm(discriminator_weight=0.0, generator_weight=0.0)
    networks, batch = tiny_networks(settings), random_batch(4)
    assert networks.fake_score.heads is None
    networks.fake_score.requires_grad_(False)
    loss, x, metrics = generator_loss(networks, settings, batch, KEY)
    assert set(metrics) == {"generator/dmd", "generator/loss"} and torch.isfinite(loss)
    networks.fake_score.requires_grad_(True)
    assert set(fake_score_loss(networks, settings, batch, x, KEY)[1]) == {"fake_score/denoising", "fake_score/loss"}


@pytest.mark.parametrize(("schedule", "prediction_type", "steps"), [
    ("ddpm", "epsilon", (999.0, 749.0, 499.0, 249.0)), ("ddpm", "v_prediction", (399.0,)),
    ("rectified_flow", "flow", (1.0, 0.5)),
])  # fmt: skip
def test_other_schedules_and_predictions(schedule, prediction_type, steps):
    """DDPM at 999/749/499/249 and flow: dmd_loss's value from x0 predictions formed here in float64."""
    settings = algorithm(steps=steps, discriminator_weight=0.0, generator_weight=0.0)
    networks, batch = tiny_networks(settings, schedule, prediction_type), random_batch(4)
    networks.fake_score.requires_grad_(False)
    loss, x, _ = generator_loss(networks, settings, batch, KEY)
    u = philox_uniform(batch.sample_ids, (1,), KEY.fork(2))[:, 0]
    n = philox_normal(batch.sample_ids, SHAPE, KEY.fork(3), torch.float32)
    if schedule == "ddpm":
        abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
        t = (20 + (u * 960).long()).clamp(max=979)
        alpha, sigma = abar[t].sqrt(), (1 - abar[t]).sqrt()
    else:
        t = 0.02 + 0.96 * u
        alpha, sigma = 1 - t.double(), t.double()
    alpha, sigma = alpha.reshape(-1, 1, 1, 1), sigma.reshape(-1, 1, 1, 1)
    x_t = alpha * x + sigma * n
    with torch.no_grad():
        x0 = []
        for net in (networks.teacher, networks.fake_score.denoiser):
            p = net.predict(x_t.float(), t, batch.condition).double()
            x0.append({
                "epsilon": lambda p=p: (x_t - sigma * p) / alpha,
                "v_prediction": lambda p=p: alpha * x_t - sigma * p,
                "flow": lambda p=p: x_t - sigma * p,
            }[prediction_type]())  # fmt: skip
        real, fake = x0
        grad = (fake - real) / ((x - real).abs().mean((1, 2, 3), keepdim=True) + 1e-6)
    assert loss.item() == pytest.approx(0.5 * grad.square().mean().item(), rel=2e-3)
