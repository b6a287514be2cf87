"""f-distill's weights: any f-divergence as the DMD gradient times a function of the density ratio (arXiv 2502.15681).

    r = clip(exp(clip(D(x_t), -10, 10)), .1, 20)              p_real / p_fake at the DMD loss's own noised sample
    m[b] <- decay m[b] + (1 - decay) mean(r of bin b)         optional, over all ranks; r <- r / (m[b] + 1e-6)
    h = WEIGHTS[divergence](r);  h <- h / (mean(h) + 1e-6)    the mean over a micro-batch of all ranks

A bin is an equal share of the times that the DMD loss draws: they are monotone in the uniform number that draws them.
Reverse KL has h = 1 and is DMD2 itself: it never comes here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .algorithm import Algorithm

MAX_LOGIT = 10.0
RATIO_RANGE = (0.1, 20.0)
EPS = 1e-6

WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "kl": lambda r: r,
    "js": lambda r: 1 - 1 / (1 + r),
    "softened_rkl": lambda r: 1 / (1 + r),
    "neyman": lambda r: 1 / r.clamp(min=1e-8),
    "squared_hellinger": torch.sqrt,
    "jeffreys": lambda r: 1 + r,
}
"""h(r) by divergence, without reverse KL's 1."""


def density_ratio(logits: Tensor) -> Tensor:
    """r (N,) f32 from logits (N, heads)."""
    return logits.float().mean(1).clamp(-MAX_LOGIT, MAX_LOGIT).exp().clamp(*RATIO_RANGE)


class Divergence:
    """The weights of one divergence; `bins` (num_bins,) f32 is all the state there is, alike on all ranks.

    `all_sum` adds a tensor over the ranks; every rank must call `weights` equally often.
    """

    def __init__(
        self,
        name: str,
        num_bins: int = 0,
        decay: float = 0.9,
        all_sum: Callable[[Tensor], Tensor] = lambda value: value,
    ):
        if name not in WEIGHTS:
            raise ValueError(f"divergence {name!r} has no weights; expected one of {', '.join(WEIGHTS)}")
        self.function, self.decay, self.all_sum = WEIGHTS[name], decay, all_sum
        self.bins = torch.ones(num_bins)

    @classmethod
    def of(cls, algorithm: Algorithm, all_sum: Callable[[Tensor], Tensor] = lambda value: value) -> Divergence | None:
        """What these settings ask for; None for reverse KL."""
        if algorithm.divergence == "reverse_kl":
            return None
        return cls(algorithm.divergence, algorithm.ratio_bins, algorithm.ratio_decay, all_sum)

    @torch.no_grad()
    def weights(self, logits: Tensor, u: Tensor) -> Tensor:
        """h (N,) f32, mean 1 over all ranks, from logits (N, heads) of samples whose times `u` (N,) in (0, 1] drew."""
        ratio = density_ratio(logits)
        if self.bins.numel():
            ratio = self._normalised(ratio, u)
        h = self.function(ratio)
        total, count = self.all_sum(torch.stack([h.sum(), torch.ones_like(h).sum()]))
        return h / (total / count + EPS)

    def _normalised(self, ratio: Tensor, u: Tensor) -> Tensor:
        """The ratio over its running mean at its noise level, which it first enters."""
        bins = self.bins.to(ratio.device)
        index = (u * len(bins)).long().clamp(max=len(bins) - 1)
        empty = torch.zeros_like(bins)
        sums, counts = self.all_sum(
            torch.stack([empty.index_add(0, index, ratio), empty.index_add(0, index, torch.ones_like(ratio))])
        )
        moved = torch.lerp(sums / counts, bins, self.decay)
        # An empty bin has no mean; one that is not finite belongs to a step that will be skipped.
        self.bins = torch.where(moved.isfinite(), moved, bins)
        return ratio / (self.bins[index] + EPS)
