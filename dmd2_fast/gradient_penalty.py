"""R1, the penalty of the GAN head's gradient on real samples: E |grad D|^2, the mean over samples and heads.

Exact: by a double backward, which needs plain modules between input and logits. Approximate (Self-Forcing, arXiv
2506.08009; APT without the division): E ((D(z) - D(z + s n)) / s)^2 with n ~ N(0, I), which tends to the exact one as
s -> 0. z is a noised sample, or the features that the head reads of it: then through the head alone. Both are taken at
the sample's own t and condition; FastGen's form, (D(x_t) - D(x0 + s n))^2 at t, is for comparisons with its runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .algorithm import Algorithm
from .data.batch import Batch
from .fake_score import FeaturePenalty
from .noised import Noised
from .ops.r1 import r1_penalty, r1_perturb
from .random import NoiseKey, Stream

Heads = Callable[[tuple[Tensor, ...]], Tensor]
"""Features, a tensor (N, *) a level, to logits (N, levels)."""


@dataclass
class Penalised:
    """Noised real samples on their way to the head, with what R1 does to them where it is due."""

    rows: Noised
    """followed by their perturbed copies, where R1 compares the two"""
    penalty: Callable[[Tensor, Tensor], Tensor] | None = None
    """(real logits, perturbed logits) to R1 in the samples"""
    feature_penalty: FeaturePenalty | None = None
    """R1 in the features, through the head alone"""
    double_backward: bool = False
    """whether the gradient of the logits in the samples will have a graph itself"""


def penalised(algorithm: Algorithm, real: Noised, batch: Batch, key: NoiseKey) -> Penalised:
    """What R1 asks of this iteration's noised real samples."""
    kind, std = algorithm.r1_kind, algorithm.r1_std
    if kind == "none" or key.step % algorithm.r1_interval:
        return Penalised(real)
    noise = {"key": key.fork(Stream.R1), "sample_ids": batch.sample_ids}
    if kind == "fastgen_compat":  # real data perturbed before noising, at t all the same, and no division
        assert batch.x0 is not None  # which the configuration's check has seen to
        perturbed = r1_perturb(batch.x0.to(real.x_t.dtype), std, **noise)[len(batch) :]
        return Penalised(real.twice(torch.cat([real.x_t, perturbed])), lambda one, other: r1_penalty(one, other, 1.0))
    if algorithm.r1_input == "features":
        if kind == "exact":
            return Penalised(real, feature_penalty=exact_feature_penalty)
        return Penalised(real, feature_penalty=partial(approximate_feature_penalty, std=std, **noise))
    if kind == "exact":
        x_t = real.x_t.requires_grad_()
        return Penalised(real, lambda logits, _: exact_penalty(logits, x_t), double_backward=True)
    size = perturbation_size(real.x_t, std)
    both = r1_perturb(real.x_t, size, **noise)
    return Penalised(real.twice(both), lambda one, other: r1_penalty(one, other, size))


def exact_penalty(logits: Tensor, x: Tensor) -> Tensor:
    """mean over samples and heads of |d logit / d x|^2, (), with a graph: logits (N, heads) made from x (N, *)."""
    terms = []
    for head in logits.unbind(1):
        (gradient,) = torch.autograd.grad(head.sum(), x, create_graph=True)
        terms.append(gradient.float().square().flatten(1).sum(1).mean())
    return torch.stack(terms).mean()


def exact_feature_penalty(heads: Heads, features: tuple[Tensor, ...]) -> Tensor:
    """The same in the features (N, *) of each level, through the heads alone; each head reads its own level."""
    features = tuple(f if f.requires_grad else f.detach().requires_grad_() for f in features)
    gradients = torch.autograd.grad(heads(features).sum(), features, create_graph=True)
    return torch.stack([g.float().square().flatten(1).sum(1).mean() for g in gradients]).mean()


def approximate_feature_penalty(
    heads: Heads, features: tuple[Tensor, ...], *, std: float, key: NoiseKey, sample_ids: Tensor
) -> Tensor:
    """The finite difference in the features of each level; `std` is a share of each sample's RMS there."""
    n = len(sample_ids)
    sizes = [perturbation_size(feature, std) for feature in features]
    both = [r1_perturb(f, s, key=key, sample_ids=sample_ids) for f, s in zip(features, sizes, strict=True)]
    logits = heads(tuple(both))
    terms = [r1_penalty(logits[:n, i], logits[n:, i], size) for i, size in enumerate(sizes)]
    return torch.stack(terms).mean()


def perturbation_size(x: Tensor, std: float) -> Tensor:
    """`std` times the root mean square of each sample of x (N, *): (N,) f32, without a graph."""
    return std * x.detach().float().flatten(1).square().mean(1).sqrt()
