"""DeepSpeed ZeRO-3 around one frozen base and two adapters: what `Engines` is, with one copy of the base's weights.

Three engines as ever. The base's has no optimizer and is the teacher's; its hooks are registered before the adapters
are put into its layers, and so never see them. Each adapter's engine owns the adapter (and the GAN heads) and runs the
base through its bare module. `run.gather: network` gathers the base once for all three networks of a pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .config import Config
from .denoiser import Denoiser
from .distillation import FakeScore, Networks
from .engine import Engines, WholeNetwork, frozen, make_engine
from .heads import GANHeads
from .networks.lora import AdaptedDenoiser, SharedBase


class LoRAEngines(Engines):
    """Generator and fake score on `base`, which they share with the teacher; adapters drawn from the run's seed."""

    def __init__(self, config: Config, base: Denoiser, heads: GANHeads | None, levels: tuple[str, ...]):
        assert config.model.lora is not None
        self.schedule, self.prediction_type = base.schedule, base.prediction_type
        self.unconditional = base.unconditional
        self.whole = {}  # no network of its own is gathered: the base is
        self.whole_base = WholeNetwork(base) if config.run.gather == "network" else None
        self.base_parameters = dict(base.named_parameters())
        self.base = SharedBase(base, config.model.lora)
        self.teacher = make_engine(config, base.requires_grad_(False).eval(), None)
        torch.manual_seed(config.run.seed)  # alike on all ranks
        self.base.inject(None if self.whole_base is None else self.whole_base.module)
        generator = AdaptedDenoiser(self.base, "generator")
        fake_score = FakeScore(AdaptedDenoiser(self.base, "fake_score"), heads, levels)
        self.generator = make_engine(config, generator, config.generator)
        self.fake_score = make_engine(config, fake_score, config.fake_score)

    @contextlib.contextmanager
    def _gathered(self) -> Iterator[None]:
        """The base as `run.gather` wants it for the passes inside, and their backward. Collective."""
        if self.whole_base is None:
            yield
            # What only a backward through the base took up has no step of the base's engine that would let it go.
            self.teacher.optimizer.release_backward_leftovers()
            return
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
    def bare(self, engine: Any) -> Iterator[nn.Module]:
        with self._gathered():
            yield engine.module

    @contextlib.contextmanager
    def for_generator(self) -> Iterator[tuple[Networks, nn.Module]]:
        with frozen(self.fake_score.module), self._gathered():
            networks = self._networks(self.generator, self.fake_score.module, self.teacher_network)
            yield networks, self.generator.module

    @contextlib.contextmanager
    def for_regression(self) -> Iterator[Networks]:
        with self._gathered():
            yield self._networks(self.generator, None, None)

    @contextlib.contextmanager
    def for_samples(self) -> Iterator[Networks]:
        with self._gathered():
            yield self._networks(self.generator.module, self.fake_score, None)

    @contextlib.contextmanager
    def for_fake_score(self, teacher_features: bool) -> Iterator[Networks]:
        with self._gathered():
            yield self._networks(None, self.fake_score, self.teacher_network if teacher_features else None)
