"""DeepSpeed's ZeRO around one frozen base and two adapters: what `Engines` is, with one copy of the base's weights.

Three engines as ever. The base's has no optimizer and is the teacher's; ZeRO-3's hooks on it are registered before the
adapters are put into its layers, and so never see them. Each adapter's engine owns the adapter (and the GAN heads) and
runs the base through its bare module. `run.gather: network` gathers the base once for all three networks of a pass. At
stages 1 and 2 the base is whole on every rank, and needs no engine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .algorithm import Algorithm
from .config import Config
from .denoiser import Denoiser
from .distillation import Networks
from .engine import Engines, frozen, how_to_gather, make_engine, traces_of
from .fake_score import FakeScore
from .heads import GANHeads
from .networks.lora import ADAPTERS, AdaptedDenoiser, SharedBase
from .shards import WholeNetwork


class LoRAEngines(Engines):
    """Generator and fake score on `base`, which they share with the teacher; adapters drawn from the run's seed."""

    def __init__(self, config: Config, base: Denoiser, heads: GANHeads | None, algorithm: Algorithm):
        assert config.model.lora is not None
        self.schedule, self.prediction_type = base.schedule, base.prediction_type
        self.unconditional = base.unconditional
        self.gather = how_to_gather(config)
        self.whole = {}  # no network of its own is gathered: the base is
        self.whole_base = None if self.gather == "module" else WholeNetwork(base)
        self.base_parameters = dict(base.named_parameters())
        kept = ADAPTERS if algorithm.keeps_fake_score else ADAPTERS[:1]
        self.base = SharedBase(base, config.model.lora, kept)
        self.teacher = make_engine(config, base.requires_grad_(False).eval(), None)
        torch.manual_seed(config.run.seed)  # alike on all ranks
        self.base.inject(None if self.whole_base is None else self.whole_base.module)
        generator = AdaptedDenoiser(self.base, "generator")
        fake = AdaptedDenoiser(self.base, "fake_score") if algorithm.keeps_fake_score else None
        fake_score = FakeScore(fake, heads, algorithm.own_levels)
        self.generator = make_engine(config, generator, config.generator)
        self.fake_score = make_engine(config, fake_score, config.fake_score)
        self.traces = traces_of(config, self.generator, self.fake_score, self.teacher)

    @contextlib.contextmanager
    def _passes(self, kind: str, whole: bool) -> Iterator[None]:
        """Passes of one kind through the base, and their backward: with its weights gathered whole, or by hooks.

        Collective.
        """
        if not whole:
            with self.traced(self.teacher, kind):
                yield
        elif self.base.module is not self.base.denoiser:  # gathered already, around these passes
            yield
        else:
            assert self.whole_base is not None
            with self.whole_base.gathered(self.base_parameters) as module:
                self.base.module = module
                try:
                    yield
                finally:
                    self.base.module = self.base.denoiser

    def teacher_network(self, *arguments: Any, **options: Any) -> Any:
        """The base without an adapter."""
        return self.base(None, *arguments, **options)

    @contextlib.contextmanager
    def bare(self, engine: Any, decode: bool = True) -> Iterator[nn.Module]:
        kind = "decode" if decode else "encode"
        own = contextlib.nullcontext() if engine is self.teacher else self.traced(engine, kind)
        with self._passes(kind, self.gather != "module"), own:
            yield engine.module

    @contextlib.contextmanager
    def for_generator(self) -> Iterator[tuple[Networks, Callable[..., Any]]]:
        with (
            frozen(self.fake_score.module),
            self._passes("generator", self.gather == "network"),
            self.traced(self.fake_score, "decode"),
            self._rollout() as rollout,
        ):
            yield self._networks(self.generator, self.fake_score.module, self.teacher_network), rollout

    @contextlib.contextmanager
    def for_regression(self) -> Iterator[Networks]:
        with self._passes("generator", self.gather == "network"):
            yield self._networks(self.generator, None, None)

    @contextlib.contextmanager
    def for_fake_score(self, teacher_features: bool) -> Iterator[Networks]:
        with self._passes("fake_score", self.gather == "network"):
            yield self._networks(None, self.fake_score, self.teacher_network if teacher_features else None)
