"""The operators in FastGen: one loss of a DMD2-like step through FastGen's own names, before the swap and after it.

    python examples/fastgen_swap.py

Prints what was swapped, what was left alone and why, and how far the losses and gradients are from FastGen's own. A
trainer needs the one line `apply()`, before or after its imports of FastGen. Exits with 2 where there is no FastGen.
"""

import sys
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dmd2_fast.compat.fastgen import FastGenNotFoundError, apply, undo


def images(seed: int) -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def step(common_loss: Any, schedule: Any) -> list[Tensor]:
    """Generator's and fake score's losses, and their gradients in the samples, a prediction and the logits."""
    x, real, eps = images(0).requires_grad_(), images(1), images(2)
    t = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)

    x_t = schedule.forward_process(x.detach(), eps, t)
    teacher_x0 = schedule.eps_to_x0(x_t, 0.9 * eps, t)  # stands for a network, as does all that is made up below
    fake_eps = (0.8 * eps).requires_grad_()
    fake_x0 = schedule.eps_to_x0(x_t, fake_eps, t)
    logits = x.mean((2, 3)) * 10
    generator_loss = common_loss.variational_score_distillation_loss(x, teacher_x0, fake_x0)
    generator_loss = generator_loss + common_loss.gan_loss_generator(logits)

    eps_again = schedule.x0_to_eps(x_t, fake_x0, t)
    fake_loss = common_loss.denoising_score_matching_loss("eps", eps_again, eps=eps)
    fake_loss = fake_loss + common_loss.gan_loss_discriminator(real.mean((2, 3)), logits)
    gradients = torch.autograd.grad(generator_loss + fake_loss, [x, fake_eps])
    return [generator_loss.detach(), fake_loss.detach(), *gradients]


def main() -> int:
    try:
        print(apply())
    except FastGenNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    common_loss = import_module("fastgen.methods.common_loss")
    schedule = import_module("fastgen.networks.noise_schedule").get_noise_schedule("rf")
    ours = step(common_loss, schedule)
    undo()
    theirs = step(common_loss, schedule)
    difference = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True))
    print(f"largest relative difference from FastGen's own, losses and gradients: {difference:.2g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
