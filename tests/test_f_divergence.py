"""f-distill's weights against the paper's table in float64, over ranks, and in the generator's loss."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import SHAPE, random_batch, tiny_networks

from dmd2_fast.distillation import Algorithm, generate, generator_loss
from dmd2_fast.f_divergence import Divergence
from dmd2_fast.random import NoiseKey, philox_normal, philox_uniform

KEY = NoiseKey(5, step=3)
H = {  # of a density ratio p_real / p_fake
    "kl": lambda r: r,
    "js": lambda r: 1 - 1 / (1 + r),
    "softened_rkl": lambda r: 1 / (1 + r),
    "neyman": lambda r: 1 / max(r, 1e-8),
    "squared_hellinger": math.sqrt,
    "jeffreys": lambda r: 1 + r,
}
SETTINGS = {"steps": (5.0, 2.0, 0.8, 0.3), "generator_weight": 0.3, "discriminator_weight": 0.2, "passes": "shared"}


def ratio(logits):
    """One sample's r from its heads' logits."""
    mean = sum(logits) / len(logits)
    return min(max(math.exp(min(max(mean, -10.0), 10.0)), 0.1), 20.0)


def normalised(h):
    return [value / (sum(h) / len(h) + 1e-6) for value in h]


@pytest.mark.parametrize("name", H)
def test_weights_without_a_histogram(name):
    """Two heads, ratios inside and beyond both clips."""
    logits = torch.tensor([[0.5, -0.3], [9.0, 4.0], [-30.0, 2.0], [0.1, 0.1], [-1.0, -2.0], [25.0, 25.0]])
    expected = normalised([H[name](ratio(row)) for row in logits.double().tolist()])
    got = Divergence(name).weights(logits, torch.rand(6))
    torch.testing.assert_close(got.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-7)
    assert got.mean() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("name", ["kl", "js"])
def test_running_means_of_three_updates(name):
    """Bins of a third each, moved before they divide; one stays empty, and keeps its mean."""
    divergence, bins = Divergence(name, num_bins=3, decay=0.8), [1.0, 1.0, 1.0]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        logits, u = torch.randn(8, 1, generator=generator), torch.rand(8, generator=generator) * 0.65
        u[0] = 1 / 3  # belongs to the second
        index = [min(int(value * 3), 2) for value in u.tolist()]
        r = [ratio(row) for row in logits.double().tolist()]
        for b in range(3):
            inside = [value for value, i in zip(r, index, strict=True) if i == b]
            if inside:
                bins[b] = 0.8 * bins[b] + 0.2 * sum(inside) / len(inside)
        expected = normalised([H[name](value / (bins[i] + 1e-6)) for value, i in zip(r, index, strict=True)])
        got = divergence.weights(logits, u)
        torch.testing.assert_close(got.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(divergence.bins.double(), torch.tensor(bins, dtype=torch.float64), rtol=1e-6, atol=0)
    assert divergence.bins[2] == 1.0, "nothing fell into it"


def test_ranks_together_are_one_batch():
    """Two ranks, as threads, see a half each: with their sums added up they get the weights and bins of the whole."""
    logits, u = torch.randn(8, 2, generator=torch.Generator().manual_seed(1)), torch.linspace(0.05, 1, 8)
    whole = Divergence("jeffreys", num_bins=4, decay=0.5)
    expected, meet, sent = whole.weights(logits, u), threading.Barrier(2, timeout=30), {}

    def run(rank):
        def all_sum(value):
            sent[rank] = value
            meet.wait()
            total = sent[0] + sent[1]
            meet.wait()
            return total

        divergence, half = Divergence("jeffreys", 4, 0.5, all_sum), slice(4 * rank, 4 * rank + 4)
        return divergence.weights(logits[half], u[half]), divergence.bins

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, range(2)))
    torch.testing.assert_close(torch.cat([weights for weights, _ in found]), expected)
    assert all(bins.allclose(whole.bins) for _, bins in found)


def test_a_bin_is_not_spoiled_by_logits_that_are_not_finite():
    divergence = Divergence("kl", num_bins=2)
    weights = divergence.weights(torch.tensor([[float("nan")], [0.5]]), torch.tensor([0.2, 0.8]))
    assert weights.isnan().all(), "what is not finite surfaces in the loss"
    assert divergence.bins[0] == 1.0 and divergence.bins.isfinite().all()


def test_reverse_kl_is_dmd2_to_the_bit():
    batch, results = random_batch(6), []
    for settings in ({}, {"divergence": "reverse_kl", "ratio_bins": 10}):
        algorithm = Algorithm(**SETTINGS, **settings)
        networks = tiny_networks(algorithm)
        networks.fake_score.requires_grad_(False)
        loss, _, _ = generator_loss(networks, algorithm, batch, KEY, divergence=Divergence.of(algorithm))
        loss.backward()
        results.append([loss.detach(), *[p.grad for p in networks.generator.parameters()]])
    assert Divergence.of(algorithm) is None
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results, strict=True))


@pytest.mark.parametrize("features", ["fake_score", "teacher"])
@pytest.mark.parametrize("generator_weight", [0.3, 0.0])
def test_the_loss_weighs_each_sample_by_its_own_ratio(features, generator_weight):
    """The DMD term with h from the logits at its own x_t, written down call by call; h has no gradient."""
    algorithm = Algorithm(
        **{**SETTINGS, "generator_weight": generator_weight, "features": features}, divergence="kl", ratio_bins=2
    )
    networks, batch = tiny_networks(algorithm), random_batch(6)
    networks.fake_score.requires_grad_(False)
    parameters = list(networks.generator.parameters())
    loss, x, metrics = generator_loss(networks, algorithm, batch, KEY)
    got = torch.autograd.grad(loss, parameters)

    sample = generate(networks, algorithm, batch, KEY)
    torch.testing.assert_close(x, sample.detach())
    u = philox_uniform(batch.sample_ids, (1,), KEY.fork(2))[:, 0]
    sigma = networks.schedule.time(u, (0.02, 0.98))
    x_t = sample + sigma.reshape(-1, 1, 1, 1) * philox_normal(batch.sample_ids, SHAPE, KEY.fork(3), torch.float32)
    source = networks.teacher if features == "teacher" else networks.fake_score.denoiser
    logits = networks.fake_score.heads(source.encode(x_t, sigma, batch.condition))
    r = [ratio(row) for row in logits.double().tolist()]
    index = [min(int(value * 2), 1) for value in u.tolist()]
    bins = [1.0, 1.0]
    for b in range(2):
        inside = [value for value, i in zip(r, index, strict=True) if i == b]
        bins[b] = 0.9 + 0.1 * sum(inside) / len(inside) if inside else 1.0
    h = torch.tensor(normalised([value / (bins[i] + 1e-6) for value, i in zip(r, index, strict=True)]))
    with torch.no_grad():
        real = networks.teacher.predict(x_t, sigma, batch.condition)
        fake = networks.fake_score.denoiser.predict(x_t, sigma, batch.condition)
        grad = (fake - real) / ((sample - real).abs().mean((1, 2, 3), keepdim=True) + 1e-6) * h.reshape(-1, 1, 1, 1)
    dmd = 0.5 * (sample - (sample - grad).detach()).square().mean()
    gan = torch.nn.functional.softplus(-logits).mean()
    torch.testing.assert_close(metrics["generator/dmd"], dmd.detach(), rtol=1e-4, atol=1e-6)
    assert ("generator/gan" in metrics) == (generator_weight > 0)
    expected = torch.autograd.grad(dmd + generator_weight * gan, parameters)
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm() + 1e-7
    assert not h.allclose(torch.ones(6), atol=1e-3)
