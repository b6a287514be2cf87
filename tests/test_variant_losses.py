"""The variants' losses against the formulas, one network call at a time, and who gets a gradient and who must not."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from tiny import SHAPE, random_batch, tiny_networks

from dmd2_fast.distillation import Algorithm, fake_score_loss, generate, generator_loss
from dmd2_fast.gradient_penalty import approximate_feature_penalty, exact_feature_penalty, exact_penalty
from dmd2_fast.heads import GANHeads
from dmd2_fast.networks.skip import check_layers
from dmd2_fast.ops.r1 import r1_penalty, r1_perturb
from dmd2_fast.random import NoiseKey, philox_normal, philox_uniform
from dmd2_fast.rollout import Guidance, guided
from dmd2_fast.schedules import TimeSampling

KEY = NoiseKey(11, step=4)
STEPS = (5.0, 2.0, 0.8, 0.3)
LADD = {"dmd_weight": 0.0, "features": "teacher", "levels": ("down.0", "mid")}


def algorithm(**settings) -> Algorithm:
    return Algorithm(**{"steps": STEPS, "generator_weight": 0.3, "discriminator_weight": 0.2, **settings})


def drawn(networks, batch, stream, t_range=(0.0, 1.0)):
    """sigma (N,) and noise (N, *) of a pair of streams on the Karras schedule."""
    sigma = networks.schedule.time(philox_uniform(batch.sample_ids, (1,), KEY.fork(stream))[:, 0], t_range)
    return sigma, philox_normal(batch.sample_ids, SHAPE, KEY.fork(stream + 1), torch.float32)


def noised(x, sigma, n):
    return x + sigma.reshape(-1, 1, 1, 1) * n


def column(values):
    return values.reshape(-1, 1, 1, 1)


def logits_of(networks, settings, x_t, sigma, condition):
    source = networks.teacher if settings.features == "teacher" else networks.fake_score.denoiser
    return networks.fake_score.heads(source.encode(x_t, sigma, condition, levels=settings.levels))


def assert_same_gradients(loss, expected, parameters, tolerance=1e-4):
    got = torch.autograd.grad(loss, parameters, allow_unused=True)
    for mine, theirs in zip(got, torch.autograd.grad(expected, parameters, allow_unused=True), strict=True):
        if theirs is None:
            assert mine is None or not mine.any()
        else:
            assert mine is not None and (mine - theirs).norm() <= tolerance * theirs.norm() + 1e-6


# --- GANs without distribution matching -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [LADD, {"dmd_weight": 0.0}, {"dmd_weight": 0.0, "features": "teacher"}])
def test_a_gan_without_distribution_matching(case):
    """Generator: softplus(-D) alone, over all heads; LADD: no denoising, and no fake score to run."""
    settings, batch = algorithm(**case), random_batch(6)
    networks = tiny_networks(settings)
    assert (networks.fake_score.denoiser is None) == (settings.features == "teacher")
    networks.fake_score.requires_grad_(False)
    parameters = list(networks.generator.parameters())
    loss, x, metrics = generator_loss(networks, settings, batch, KEY)
    sample = generate(networks, settings, batch, KEY)
    sigma, n = drawn(networks, batch, 6)
    gan = F.softplus(-logits_of(networks, settings, noised(sample, sigma, n), sigma, batch.condition)).mean()
    assert set(metrics) == {"generator/gan", "generator/loss"}
    torch.testing.assert_close(loss.detach(), 0.3 * gan.detach(), rtol=1e-5, atol=1e-7)
    assert_same_gradients(loss, 0.3 * gan, parameters)

    networks.fake_score.requires_grad_(True)
    parameters = list(networks.fake_score.parameters())
    loss, metrics = fake_score_loss(networks, settings, batch, x, KEY)
    fake = logits_of(networks, settings, noised(x, sigma, n), sigma, batch.condition)
    sigma, n = drawn(networks, batch, 8)
    real = logits_of(networks, settings, noised(batch.x0, sigma, n), sigma, batch.condition)
    assert fake.shape == (6, len(settings.levels))
    expected = 0.2 * (F.softplus(fake).mean() + F.softplus(-real).mean())
    if settings.keeps_fake_score:
        sigma, n = drawn(networks, batch, 4)
        prediction = networks.fake_score.denoiser.predict(noised(x, sigma, n), sigma, batch.condition)
        weight = column(sigma**-2 + networks.schedule.sigma_data**-2)
        expected = expected + (weight * (prediction - x) ** 2).mean()
    assert ("fake_score/denoising" in metrics) == settings.keeps_fake_score
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-4, atol=1e-6)
    assert_same_gradients(loss, expected, parameters)


def test_ladd_runs_no_decoder_but_the_generators():
    """What is not needed is not run: the teacher gives features alone."""
    settings, batch = algorithm(**LADD), random_batch(4)
    networks = tiny_networks(settings)
    ran = []
    networks.teacher.network.unet.conv_out.register_forward_hook(lambda *_: ran.append("decoder"))
    networks.fake_score.requires_grad_(False)
    _, x, _ = generator_loss(networks, settings, batch, KEY)
    networks.fake_score.requires_grad_(True)
    fake_score_loss(networks, settings, batch, x, KEY)
    assert ran == []


def test_each_head_has_the_width_of_its_level():
    networks = tiny_networks(algorithm(**LADD))
    network = networks.teacher.network
    shapes = [network.feature_shape(level) for level in LADD["levels"]]
    widths = [head.projection.in_channels for head in networks.fake_score.heads.heads]
    features = networks.teacher.encode(
        torch.randn(2, *SHAPE), torch.tensor([1.0, 2.0]), random_batch(2).condition, levels=LADD["levels"]
    )
    assert widths == [shape[0] for shape in shapes] and [tuple(f.shape[1:]) for f in features] == shapes


# --- the generator's input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_noised_data_is_the_generators_input(mode):
    """alpha x0 + sigma n at the drawn step, pure noise at the first, and no forward but the trained one."""
    seen = []
    for step in range(12):
        settings, batch, key = algorithm(input="noised_data", rollout_index=mode), random_batch(8), KEY.at(step)
        networks = tiny_networks(settings)
        calls, inner = [], networks.generator

        def generator(x, t, condition, calls=calls, inner=inner):
            calls.append((x, t))
            return inner(x, t, condition)

        networks.generator = generator
        generate(networks, settings, batch, key)
        ((x_in, t),) = calls
        ids = torch.zeros_like(batch.sample_ids) if mode == "batch" else batch.sample_ids
        index = (philox_uniform(ids, (1,), key.fork(11))[:, 0] * 4).long().clamp(max=3)
        sigma = torch.tensor(STEPS)[index]
        n = philox_normal(batch.sample_ids, SHAPE, key.fork(15), torch.float32)
        start = 5.0 * philox_normal(batch.sample_ids, SHAPE, key.fork(12), torch.float32)
        expected = torch.where(column(index == 0), start, batch.x0 + column(sigma) * n)
        torch.testing.assert_close(x_in, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(t, sigma)
        seen += index.tolist()
    assert set(seen) == {0, 1, 2, 3}


def test_a_mixed_input_takes_each_sample_from_one_of_the_two():
    batch, inputs = random_batch(64), {}
    for kind in ("backward_simulation", "noised_data", "mixed"):
        settings = algorithm(input=kind, rollout_index="sample", noised_data_share=0.25)
        networks = tiny_networks(settings)
        calls, inner = [], networks.generator

        def generator(x, t, condition, calls=calls, inner=inner):
            calls.append((x.detach(), t))
            return inner(x, t, condition)

        networks.generator = generator
        generate(networks, settings, batch, KEY)
        inputs[kind] = calls[-1]
    from_data = philox_uniform(batch.sample_ids, (1,), KEY.fork(14))[:, 0] <= 0.25
    expected = torch.where(column(from_data), inputs["noised_data"][0], inputs["backward_simulation"][0])
    assert torch.equal(inputs["mixed"][0], expected)
    assert torch.equal(inputs["mixed"][1], inputs["noised_data"][1])
    assert 4 < from_data.sum() < 30
    later = from_data & (inputs["mixed"][1] < 5)
    assert (inputs["noised_data"][0] - inputs["backward_simulation"][0])[later].abs().max() > 0.1


# --- where the losses draw their times --------------------------------------------------------------------------------


def test_each_loss_draws_with_its_own_sampling():
    """Times reach the networks from the sampling and range of their own loss; shared passes: real as fake."""
    samplings = {name: TimeSampling("shifted", shift=shift) for name, shift in (("dmd", 2.0), ("d", 4.0), ("gan", 8.0))}
    for passes in ("independent", "shared"):
        settings = algorithm(
            passes=passes, dmd_sampling=samplings["dmd"], denoising_sampling=samplings["d"],
            gan_sampling=samplings["gan"], denoising_t_range=(0.1, 0.9), gan_t_range=(0.2, 0.8),
        )  # fmt: skip
        networks, batch, seen = tiny_networks(settings), random_batch(4), {"generator": [], "fake_score": []}
        inner = networks.fake_score
        inner.requires_grad_(False)
        for name in seen:

            def score(x_t, t, condition, name=name, seen=seen, inner=inner, **options):
                seen[name] += t.split(4)
                return inner(x_t, t, condition, **options)

            networks.fake_score = score
            if name == "generator":
                _, x, _ = generator_loss(networks, settings, batch, KEY)
            else:
                inner.requires_grad_(True)
                fake_score_loss(networks, settings, batch, x, KEY)

        def expected(stream, name, t_range, batch=batch, networks=networks):
            u = philox_uniform(batch.sample_ids, (1,), KEY.fork(stream))[:, 0]
            return samplings[name].draw(networks.schedule, u, t_range)

        dmd, denoising = expected(2, "dmd", (0.02, 0.98)), expected(4, "d", (0.1, 0.9))
        if passes == "shared":
            wanted = {"generator": [dmd], "fake_score": [denoising, expected(8, "d", (0.1, 0.9))]}
        else:
            gan = expected(6, "gan", (0.2, 0.8))
            wanted = {"generator": [dmd, gan], "fake_score": [denoising, gan, expected(8, "gan", (0.2, 0.8))]}
        for name, times in wanted.items():
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(seen[name], times, strict=True)), (
                passes,
                name,
            )


# --- skip-layer guidance ----------------------------------------------------------------------------------------------


def without_middle(denoiser, x_t, sigma, condition):
    """The network's prediction with its middle block left out, by taking it out."""
    unet = denoiser.network.unet
    kept, unet.mid_block = unet.mid_block, None
    try:
        return denoiser.predict(x_t, sigma, condition)
    finally:
        unet.mid_block = kept


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("features", ["fake_score", "teacher"])
@pytest.mark.parametrize("passes", ["shared", "independent"])
def test_skip_layer_guidance(scale, features, passes):
    """T = uncond + w (cond - uncond) + s (cond - cond without the layer), in the generator's loss and for sampling."""
    settings = algorithm(
        guidance_scale=scale, features=features, passes=passes, skip_scale=1.5, skip_layers=("mid_block",)
    )
    networks, batch = tiny_networks(settings), random_batch(5)
    networks.fake_score.requires_grad_(False)
    loss, x, metrics = generator_loss(networks, settings, batch, KEY)
    sigma, n = drawn(networks, batch, 2, (0.02, 0.98))
    x_t = noised(x, sigma, n)
    with torch.no_grad():
        cond = networks.teacher.predict(x_t, sigma, batch.condition)
        uncond = networks.teacher.predict(x_t, sigma, {"class_labels": torch.full((5,), 10)})
        teacher = cond if scale == 1 else uncond + scale * (cond - uncond)
        teacher = teacher + 1.5 * (cond - without_middle(networks.teacher, x_t, sigma, batch.condition))
        fake = networks.fake_score.denoiser.predict(x_t, sigma, batch.condition)
        grad = (fake - teacher) / ((x - teacher).abs().mean((1, 2, 3), keepdim=True) + 1e-6)
        got = guided(networks.teacher, Guidance(scale, 1.5, ("mid_block",)))(x_t, sigma, batch.condition)
    torch.testing.assert_close(got, teacher, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(metrics["generator/dmd"], 0.5 * grad.square().mean(), rtol=1e-3, atol=1e-6)
    sigma, n = drawn(networks, batch, 2 if passes == "shared" else 6, (0.02, 0.98) if passes == "shared" else (0, 1))
    logits = logits_of(networks, settings, noised(x, sigma, n), sigma, batch.condition)
    torch.testing.assert_close(metrics["generator/gan"], F.softplus(-logits).mean().detach(), rtol=1e-4, atol=1e-6)
    assert loss.requires_grad and not networks.teacher.network.unet.mid_block._forward_hooks


def test_layers_that_cannot_be_left_out_are_refused():
    unet = tiny_networks(algorithm()).teacher.network.unet
    check_layers(unet, ("mid_block", "down_blocks.0.resnets.0"))
    for path in ("up_blocks.0", "conv_in", "nothing.here"):
        with pytest.raises(ValueError, match=f"'{path}' is no layer of this network that can be left out"):
            check_layers(unet, (path,))


# --- R1 ---------------------------------------------------------------------------------------------------------------


class Backbone(torch.nn.Module):
    """A smooth feature extractor in float64 with two levels, and heads on them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.Conv2d(8, 16, 3, 2, padding=1)
        self.heads = GANHeads(((8, 8, 8), (16, 4, 4)))
        self.double()

    def features(self, x):
        one = torch.tanh(self.first(x))
        return one, torch.tanh(self.second(one))

    def forward(self, x):
        return self.logits(self.features(x))

    def logits(self, features):
        return torch.cat(
            [head.projection(head.layers(f)).flatten(1) for head, f in zip(self.heads.heads, features, strict=True)], 1
        )


def test_exact_r1_is_the_squared_gradient():
    """Against central differences in float64, element by element, the mean over samples and both heads."""
    network = Backbone()
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    got = exact_penalty(network(x), x)
    total, h = 0.0, 1e-5
    with torch.no_grad():
        for i in range(64):
            shift = torch.zeros(64, dtype=torch.float64)
            shift[i] = h
            shift = shift.reshape(1, 1, 8, 8)
            total += ((network(x + shift) - network(x - shift)) / (2 * h)).square().sum().item()
    assert got.item() == pytest.approx(total / 4, rel=1e-6)
    gradients = torch.autograd.grad(got, list(network.parameters()), allow_unused=True)
    assert sum(g is not None and bool(g.any()) for g in gradients) > 10, "it trains the backbone and the heads"


@pytest.mark.parametrize("through", ["backbone", "head"])
def test_the_approximate_penalty_tends_to_the_exact_one(through):
    """Over many perturbations, the error of its mean falls with std^2 until the sampling error is all that is left."""
    network, num = Backbone(), 6000
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ids = torch.arange(num)
    with torch.no_grad():
        features = network.features(x)
    if through == "backbone":
        exact = exact_penalty(network(x.requires_grad_()), x).item()
    else:
        exact = exact_feature_penalty(network.logits, features).item()
    errors = []
    for std in (1.0, 0.3, 0.01):
        with torch.no_grad():
            if through == "backbone":
                many = x.detach().expand(num, 1, 8, 8)
                logits = network(r1_perturb(many, std, key=NoiseKey(0), sample_ids=ids)[num:])
                got = r1_penalty(network(x).expand(num, 2).contiguous(), logits, std).item()
            else:
                many = tuple(f.expand(num, *f.shape[1:]) for f in features)
                got = approximate_feature_penalty(network.logits, many, std=std, key=NoiseKey(0), sample_ids=ids).item()
        errors.append(abs(got / exact - 1))
    sampling = 4 * math.sqrt(2 / num)  # of the mean of squares of normals, at most
    assert errors[0] > 2 * sampling, "a large perturbation measures something else"
    assert errors[2] < sampling and errors[1] < errors[0]


@pytest.mark.parametrize("features", ["fake_score", "teacher"])
@pytest.mark.parametrize("passes", ["shared", "independent"])
@pytest.mark.parametrize(
    ("kind", "where"),
    [*itertools.product(("exact", "approximate"), ("sample", "features")), ("fastgen_compat", "sample")],
)
def test_r1_in_the_fake_scores_loss(features, passes, kind, where):
    """Every kind of penalty, at the real samples' own noise level and condition, with all gradients."""
    settings = algorithm(
        features=features, passes=passes, r1_kind=kind, r1_input=where, r1_weight=0.7, r1_std=0.1,
        levels=("down.0", "mid"),
    )  # fmt: skip
    networks, batch, x = tiny_networks(settings), random_batch(5), torch.randn(5, *SHAPE)
    parameters = [p for p in networks.fake_score.parameters() if p.requires_grad]
    loss, metrics = fake_score_loss(networks, settings, batch, x, KEY)
    base, _ = fake_score_loss(networks, Algorithm(**{**settings.__dict__, "r1_kind": "none"}), batch, x, KEY)

    sigma, n = drawn(networks, batch, 8)
    x_t = noised(batch.x0, sigma, n)
    keyed = philox_normal(batch.sample_ids, SHAPE, KEY.fork(10), torch.float32)

    def judge(x_t):
        return logits_of(networks, settings, x_t, sigma, batch.condition)

    if kind == "fastgen_compat":
        penalty = (judge(x_t) - judge(batch.x0 + 0.1 * keyed)).square().mean()
    elif where == "sample" and kind == "exact":
        x_t.requires_grad_()
        grads = [torch.autograd.grad(head.sum(), x_t, create_graph=True)[0] for head in judge(x_t).unbind(1)]
        penalty = sum(g.square().sum((1, 2, 3)).mean() for g in grads) / 2
    elif where == "sample":
        std = 0.1 * x_t.square().mean((1, 2, 3)).sqrt()
        penalty = ((judge(x_t) - judge(x_t + column(std) * keyed)) / std[:, None]).square().mean()
    else:
        source = networks.teacher if features == "teacher" else networks.fake_score.denoiser
        found = source.encode(x_t, sigma, batch.condition, levels=settings.levels)
        penalty = 0.0
        for head, feature in zip(networks.fake_score.heads.heads, found, strict=True):
            feature = feature if feature.requires_grad else feature.requires_grad_()
            if kind == "exact":
                (g,) = torch.autograd.grad(head(feature).sum(), feature, create_graph=True)
                penalty = penalty + g.square().sum((1, 2, 3)).mean() / 2
            else:
                std = 0.1 * feature.detach().square().mean((1, 2, 3)).sqrt()
                shift = philox_normal(batch.sample_ids, tuple(feature.shape[1:]), KEY.fork(10), torch.float32)
                moved = head(feature + column(std) * shift)
                penalty = penalty + ((moved - head(feature)) / std[:, None]).square().mean() / 2
    torch.testing.assert_close(metrics["fake_score/r1"], penalty.detach(), rtol=2e-3, atol=1e-5)
    assert_same_gradients(loss - base, 0.2 * 0.7 * penalty, parameters, tolerance=5e-3)


# --- who gets a gradient ----------------------------------------------------------------------------------------------

GROUPS = ("encoder", "decoder", "heads")
DECODER = (".up_blocks.", ".conv_out.", ".conv_norm_out.")


def group(name: str) -> str:
    if name.startswith("heads"):
        return "heads"
    return "decoder" if any(part in name for part in DECODER) else "encoder"


@pytest.mark.parametrize(
    ("case", "trained"),
    [
        ({"features": "fake_score"}, {"encoder", "heads"}),
        ({"features": "teacher"}, {"heads"}),
        ({"features": "fake_score", "r1_kind": "exact"}, {"encoder", "heads"}),
        ({"features": "teacher", "r1_kind": "exact"}, {"heads"}),
        ({"features": "fake_score", "r1_kind": "exact", "r1_input": "features"}, {"encoder", "heads"}),
        ({"features": "teacher", "r1_kind": "exact", "r1_input": "features"}, {"heads"}),
        ({"features": "fake_score", "r1_kind": "fastgen_compat"}, {"encoder", "heads"}),
        ({"features": "teacher", "r1_kind": "fastgen_compat"}, {"heads"}),
        (LADD, {"heads"}),
        ({"dmd_weight": 0.0}, {"encoder", "heads"}),
        ({"divergence": "js", "passes": "shared"}, {"encoder", "heads"}),
        ({"divergence": "js", "passes": "shared", "features": "teacher"}, {"heads"}),
    ],
)
def test_the_adversarial_loss_trains_these_groups_and_no_others(case, trained):
    """Group by group: a weight of a group that learns has a gradient, one of another has none but the denoising's.

    The difference of the gradients with the adversarial part ten times as heavy.
    """
    batch, x, found = random_batch(4), torch.randn(4, *SHAPE), []
    for weight in (0.2, 2.0):
        settings = algorithm(**case, discriminator_weight=weight)
        networks = tiny_networks(settings)
        fake_score_loss(networks, settings, batch, x, KEY)[0].backward()
        named = dict(networks.fake_score.named_parameters())
        found.append({name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named.items()})
        frozen = [networks.teacher, networks.generator]
        assert all(p.grad is None for network in frozen for p in network.parameters())
    change = {name: (found[1][name] - value).norm().item() for name, value in found[0].items()}
    for one in GROUPS:
        members = {name: value for name, value in change.items() if group(name) == one}
        if one in trained:
            silent = [name for name, value in members.items() if value < 1e-9]
            assert members and not silent, f"{one}: {silent}"
        else:
            assert all(value < 1e-7 for value in members.values()), one


@pytest.mark.parametrize(
    "case",
    [
        LADD,
        {"dmd_weight": 0.0},
        {"divergence": "kl", "passes": "shared"},
        {"input": "mixed", "rollout_index": "sample"},
    ],
)
def test_the_generators_loss_trains_the_generator_alone(case):
    settings, batch = algorithm(**case), random_batch(4)
    networks = tiny_networks(settings)
    networks.fake_score.requires_grad_(False)
    generator_loss(networks, settings, batch, KEY)[0].backward()
    assert all(p.grad is not None and p.grad.any() for p in networks.generator.parameters())
    others = [*networks.fake_score.parameters(), *networks.teacher.parameters()]
    assert all(p.grad is None for p in others)
