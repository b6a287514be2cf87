"""DMD2 in a plain PyTorch loop: a one-step generator of handwritten digits, from a teacher that is trained here too.

    python examples/plain_loop.py [--iterations 200]

The operators are the only part of dmd2_fast that is used. Generator, fake score and teacher are one small UNet each, on
the 1,797 images of 8x8 pixels that scikit-learn ships, under a DDPM schedule with v predictions. The fake score carries
the GAN head on its middle features, and has two updates for each of the generator's.
"""

import argparse
import copy

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from dmd2_fast import (
    add_noise,
    denoising_loss,
    dmd_loss,
    gan_discriminator_loss,
    gan_generator_loss,
    group_norm_silu,
    predict_x0,
)

BATCH, RATIO, TYPE = 64, 2, "v_prediction"
GAN_WEIGHT, HEAD_WEIGHT = 0.03, 0.03
START, T_RANGE = 999, (20, 500)  # above, x_t of an 8x8 image says little more than its class
BETAS = torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64)
ALPHAS_CUMPROD = (1 - BETAS).cumprod(0)
ALPHA, SIGMA = ALPHAS_CUMPROD.sqrt().float(), (1 - ALPHAS_CUMPROD).sqrt().float()


class Block(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + time))); a normalisation and its SiLU are one operator."""

    def __init__(self, inputs: int, outputs: int, time: int = 64) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(8, n) for n in (inputs, outputs)])
        self.convs = nn.ModuleList([nn.Conv2d(n, outputs, 3, padding=1) for n in (inputs, outputs)])
        self.time = nn.Linear(time, outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.part(0, x) + self.time(time)[:, :, None, None]
        return self.skip(x) + self.part(1, h)

    def part(self, i: int, x: Tensor) -> Tensor:
        norm = self.norms[i]
        return self.convs[i](group_norm_silu(x, norm.weight, norm.bias, norm.num_groups))


class UNet(nn.Module):
    """(N, 1, 8, 8), timesteps (N,) -> v (N, 1, 8, 8), middle features (N, 48, 4, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(64, 64), nn.SiLU())
        self.first, self.last = nn.Conv2d(1, 24, 3, padding=1), nn.Conv2d(24, 1, 3, padding=1)
        self.encoder, self.down = Block(24, 24), nn.Conv2d(24, 48, 3, stride=2, padding=1)
        self.middle = nn.ModuleList([Block(48, 48), Block(48, 48)])
        self.decoder = Block(72, 24)

    def encode(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        angles = t[:, None] * torch.logspace(0, -4, 32)
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        skip = self.encoder(self.first(x), time)
        return self.middle[0](self.down(skip), time), skip, time

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        features, skip, time = self.encode(x, t)
        h = nn.functional.interpolate(self.middle[1](features, time), scale_factor=2.0)
        return self.last(self.decoder(torch.cat([h, skip], dim=1), time)), features


def draw(data: Tensor) -> Tensor:
    return data[torch.randint(len(data), (BATCH,))]


def noised(x: Tensor, low: int = 0, high: int = 1000) -> tuple[Tensor, Tensor]:
    """x at random timesteps, and these."""
    t = torch.randint(low, high, (len(x),))
    return add_noise(x, ALPHA[t], SIGMA[t], torch.randn_like(x)), t


def score_loss(network: UNet, x: Tensor) -> Tensor:
    """The denoising loss of a network on samples x."""
    t, noise = torch.randint(1000, (len(x),)), torch.randn_like(x)
    x_t = add_noise(x, ALPHA[t], SIGMA[t], noise)
    return denoising_loss(network(x_t, t)[0], x, ALPHA[t], SIGMA[t], noise, prediction_type=TYPE)


def generate(generator: UNet, noise: Tensor) -> Tensor:
    """One step: x0 from pure noise at timestep 999."""
    t = torch.full((len(noise),), START)
    return predict_x0(noise, generator(noise, t)[0], ALPHA[t], SIGMA[t], prediction_type=TYPE)


def generator_loss(x: Tensor, fake_score: UNet, head: nn.Module, teacher: UNet) -> Tensor:
    """Distribution matching, and the adversarial loss at timesteps of its own."""
    x_t, t = noised(x.detach(), *T_RANGE)
    with torch.no_grad():
        fake, real = fake_score(x_t, t)[0], teacher(x_t, t)[0]
    loss = dmd_loss(x, x_t, fake, real, alpha=ALPHA[t], sigma=SIGMA[t], prediction_type=TYPE)
    return loss + GAN_WEIGHT * gan_generator_loss(head(fake_score.encode(*noised(x))[0]))


def fake_score_loss(x: Tensor, real: Tensor, fake_score: UNet, head: nn.Module) -> Tensor:
    """The denoising loss on the generator's samples, and the discriminator's on these and on real ones."""
    real_logits, fake_logits = head(fake_score.encode(*noised(torch.cat([real, x])))[0]).chunk(2)
    return score_loss(fake_score, x) + HEAD_WEIGHT * gan_discriminator_loss(real_logits, fake_logits)


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def train_teacher(data: Tensor, iterations: int) -> UNet:
    teacher = UNet()
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=2e-3)
    for _ in range(iterations):
        update(optimizer, score_loss(teacher, draw(data)))
    return teacher.requires_grad_(False)


def distil(teacher: UNet, data: Tensor, iterations: int) -> UNet:
    generator, fake_score = (copy.deepcopy(teacher).requires_grad_() for _ in range(2))
    head = nn.Sequential(nn.Conv2d(48, 48, 4), nn.GroupNorm(6, 48), nn.SiLU(), nn.Conv2d(48, 1, 1))
    optimizer = torch.optim.AdamW(generator.parameters(), lr=1e-3, betas=(0.0, 0.99))
    fake_optimizer = torch.optim.AdamW([*fake_score.parameters(), *head.parameters()], lr=1e-3, betas=(0.0, 0.99))
    for iteration in range(iterations):
        x = generate(generator, torch.randn(BATCH, 1, 8, 8))
        if iteration % RATIO == 0:
            update(optimizer, generator_loss(x, fake_score, head, teacher))
        update(fake_optimizer, fake_score_loss(x.detach(), draw(data), fake_score, head))
    return generator


def frechet(samples: Tensor, data: Tensor) -> float:
    """Frechet distance of two Gaussians fitted to the pixels."""
    samples, data = samples.flatten(1).double(), data.flatten(1).double()
    difference, covariances = samples.mean(0) - data.mean(0), (samples.T.cov(), data.T.cov())
    roots = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt()
    return float(difference @ difference + covariances[0].trace() + covariances[1].trace() - 2 * roots.sum())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Distil a diffusion model of digits into a one-step generator.")
    parser.add_argument("--iterations", type=int, default=200, help="updates of the fake score (default: %(default)s)")
    parser.add_argument("--teacher-iterations", type=int, default=500)
    args = parser.parse_args()
    torch.manual_seed(0)
    data = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1
    teacher = train_teacher(data, args.teacher_iterations)
    noise = torch.randn(1797, 1, 8, 8)
    for name, generator in (("before", teacher), ("after", distil(teacher, data, args.iterations))):
        with torch.no_grad():
            print(f"{name}: Frechet distance of one-step samples {frechet(generate(generator, noise), data):.2f}")
