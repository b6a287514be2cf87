"""The operators in a trainer of your own: distribution matching on a ring of eight Gaussians, in seconds on a CPU.

    python examples/ring.py [--iterations 1500]

Nothing of dmd2_fast but the operators is used. The teacher is exact (a mixture's posterior mean has a closed form), the
fake score and the one-step generator are small MLPs; five updates of the fake score for each of the generator.
"""

import argparse
import math

import torch
from torch import Tensor, nn

from dmd2_fast import NoiseKey, add_noise, denoising_loss, dmd_loss, philox_normal, philox_uniform

MODES, STD, BATCH, RATIO = 8, 0.1, 256, 5
TIME, NOISE, INPUT = 64, 65, 66  # streams that are free for users
ANGLES = torch.arange(MODES) * (2 * math.pi / MODES)
CENTRES = torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)


def mlp(inputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))


class Denoiser(nn.Module):
    """x0 from x_t = x0 + sigma eps, preconditioned for data of unit size."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(3)

    def forward(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        norm = (1 + sigma**2).sqrt()[:, None]
        inputs = torch.cat([x_t / norm, sigma.log()[:, None] / 4], dim=1)
        return x_t / norm**2 + sigma[:, None] / norm * self.net(inputs)


def teacher(x_t: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | x_t] of the mixture: each mode's posterior mean, weighted by how likely x_t came from it."""
    variance = STD**2 + sigma[:, None, None] ** 2
    offset = x_t[:, None] - CENTRES
    weight = (-0.5 * (offset**2 / variance).sum(-1)).softmax(1)[..., None]
    return (weight * (CENTRES + STD**2 / variance * offset)).sum(1)


def scores(samples: Tensor) -> tuple[float, int]:
    """(fraction of samples within three deviations of a mode, modes that hold at least a third of their share)."""
    distance, mode = torch.cdist(samples, CENTRES).min(1)
    counts = mode[distance < 3 * STD].bincount(minlength=MODES)
    return (distance < 3 * STD).double().mean().item(), int((counts >= len(samples) / MODES / 3).sum())


def train(iterations: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    generator, fake_score = mlp(2), Denoiser()
    optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.0, 0.99))
    fake_optimizer = torch.optim.Adam(fake_score.parameters(), lr=2e-3, betas=(0.0, 0.99))
    ids, alpha = torch.arange(BATCH), torch.ones(BATCH)
    for iteration in range(iterations):
        key = NoiseKey(seed, step=iteration)
        x = generator(philox_normal(ids, (2,), key.fork(INPUT)))
        sigma = (math.log(0.05) + math.log(100) * philox_uniform(ids, (1,), key.fork(TIME))[:, 0]).exp()
        noise = {"key": key.fork(NOISE), "sample_ids": ids}
        if iteration % RATIO == 0:
            x_t = add_noise(x.detach(), alpha, sigma, **noise)
            with torch.no_grad():
                fake, real = fake_score(x_t, sigma), teacher(x_t, sigma)
            loss = dmd_loss(x, x_t, fake, real, alpha=alpha, sigma=sigma, prediction_type="sample")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        x_t = add_noise(x.detach(), alpha, sigma, **noise)
        weight = sigma**-2 + 1
        loss = denoising_loss(
            fake_score(x_t, sigma), x.detach(), alpha, sigma, prediction_type="sample", sample_weight=weight
        )
        fake_optimizer.zero_grad()
        loss.backward()
        fake_optimizer.step()
    return generator


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Distil a ring of Gaussians into a one-step generator.")
    parser.add_argument("--iterations", type=int, default=1500)
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1))
    for iterations in (0, parser.parse_args().iterations):
        close, modes = scores(train(iterations)(noise).detach())
        print(f"{iterations} iterations: {close:.0%} of the samples at a mode, {modes} of {MODES} modes")
