"""The online fake score with its GAN head: one module, so that one engine trains both."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .denoiser import Condition, Denoiser
from .heads import GANHeads

FeaturePenalty = Callable[[GANHeads, tuple[Tensor, ...]], Tensor]
"""(heads, features (N, *) of each level) to a scalar with a graph."""


class FakeScore(nn.Module):
    """`forward(x_t, t, condition, ...)` -> (prediction of the first `decode_rows` rows or None, logits (rows, levels)
    or None, penalty or None).

    The head reads rows `logit_rows` of the own features, or `features` of the teacher when given. `penalty` is applied
    to the last `penalty_rows` of what the head reads, or `logit_penalty` to the logits: here, because a gradient of
    what an engine returns sets off the hooks by which DeepSpeed notices its backward. Without a denoiser (LADD: a head
    and no score), or without x_t, only `features` count.
    """

    def __init__(self, denoiser: Denoiser | None, heads: GANHeads | None, levels: tuple[str, ...] = ()):
        super().__init__()
        self.denoiser = denoiser
        self.heads = heads
        self.levels = levels

    def forward(
        self,
        x_t: Tensor | None,
        t: Tensor | None,
        condition: Condition,
        *,
        decode_rows: int | None = None,
        decode_grad: bool = True,
        logit_rows: slice = slice(None),
        features: tuple[Tensor, ...] | None = None,
        logits: bool = True,
        penalty: FeaturePenalty | None = None,
        penalty_rows: int = 0,
        logit_penalty: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        prediction: Tensor | None = None
        own: tuple[Tensor, ...] = ()
        if self.denoiser is not None and x_t is not None:
            prediction, own = self.denoiser(
                x_t, t, condition, decode_rows=decode_rows, decode_grad=decode_grad,
                levels=self.levels if logits else (),
            )  # fmt: skip
        if self.heads is None or not logits:
            return prediction, None, None
        source = features if features is not None else tuple(feature[logit_rows] for feature in own)
        penalised = None
        if penalty is not None:
            penalised = penalty(self.heads, tuple(feature[-penalty_rows:] for feature in source))
        judged = self.heads(source)
        if logit_penalty is not None:
            penalised = logit_penalty(judged)
        return prediction, judged, penalised
