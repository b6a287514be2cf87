"""What an update costs, counted on the meta device: the real losses run on networks without memory.

`count_updates` runs `generator_loss` and `fake_score_loss` of distillation.py, forward and backward, on tensors that
have shapes alone, and counts FLOPs (PyTorch's own formulas: multiply and add are two), passes (rows that go through
encoder and decoder, forward and backward) and the bytes of tensors that are alive at once. Nothing is estimated from
layer lists, so the plan cannot come to describe another training step than the one that runs.

A pass without gradient of a signature that has run before is not run again: its counts are taken from the first one.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map_only

from .config import Config
from .data.batch import Batch
from .denoiser import Denoiser
from .distillation import Algorithm, FakeScore, Networks, fake_score_loss, generate, generator_loss
from .engine import frozen
from .plan_ledger import META, Ledger, flash_on_meta
from .random import NoiseKey
from .rollout import rollout_index

PROMPT_LENGTH = 77
"""Tokens of a CLIP prompt."""


@dataclass(frozen=True)
class Pass:
    """One forward of a network, with the backward that goes through it, in rows (samples)."""

    network: str
    """generator, rollout (the generator without gradient), fake_score or teacher"""
    encoder: int
    decoder: int
    encoder_backward: int = 0
    decoder_backward: int = 0


@dataclass(frozen=True)
class Cost:
    """What one micro-batch costs."""

    flops: float = 0.0
    peak_bytes: int = 0
    """the most bytes of tensors alive at once: activations, and what the arithmetic needs beside them"""
    passes: dict[Pass, float] = field(default_factory=dict)
    """how often each pass runs"""
    gathered: dict[str, float] = field(default_factory=dict)
    """elements of weights that ZeRO-3's hooks would gather: by network, each layer before each use"""

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            max(self.peak_bytes, other.peak_bytes),
            _added(self.passes, other.passes),
            _added(self.gathered, other.gathered),
        )

    def __mul__(self, factor: float) -> Cost:
        passes = {item: n * factor for item, n in self.passes.items()}
        gathered = {name: n * factor for name, n in self.gathered.items()}
        return Cost(self.flops * factor, self.peak_bytes, passes, gathered)


def _added(one: dict[Any, float], other: dict[Any, float]) -> dict[Any, float]:
    total: dict[Any, float] = dict(one)
    for key, n in other.items():
        total[key] = total.get(key, 0.0) + n
    return {key: n for key, n in total.items() if n}


@dataclass(frozen=True)
class Counts:
    """What each part of a cycle costs for one micro-batch on one rank; random draws are averaged exactly."""

    forward_flops: float
    """F: one full forward of one sample, without an adapter"""
    generator: Cost
    """the generator's update"""
    rollout: Cost
    """the generator's samples alone, on iterations that do not update it"""
    fake_score: Cost
    """the fake score's update"""

    def cycle(self, ttur_ratio: int) -> Cost:
        """One generator update and `ttur_ratio` fake-score updates."""
        return self.generator + self.rollout * (ttur_ratio - 1) + self.fake_score * ttur_ratio


class PassCounter:
    """Counts the passes of an update and the weights they use, by hooks: rows are seen whatever the arguments were."""

    def __init__(self) -> None:
        self.passes: list[dict[str, Any]] = []
        self.gathered: Counter[str] = Counter()

    def watch_rows(self, unet: nn.Module) -> None:
        """Rows that come out of the encoder's last block and the decoder's last layer, and their gradients."""

        def watch(part: str, layer: nn.Module) -> None:
            def after(_: nn.Module, __: Any, output: Any) -> None:
                record, output = self.passes[-1], output[0] if isinstance(output, tuple) else output
                record[part] = len(output)
                if output.requires_grad:
                    output.register_hook(lambda grad: record.__setitem__(f"{part}_backward", len(grad)))

            layer.register_forward_hook(after)

        watch("encoder", unet.down_blocks[-1])
        watch("decoder", unet.conv_out)

    def watch_weights(self, network: str, module: nn.Module, threshold: int) -> None:
        """Weights of more than `threshold` elements: gathered before a layer's forward, again before its backward."""

        def watch(layer: nn.Module, size: int) -> None:
            def after(_: nn.Module, __: Any, output: Any) -> None:
                name = "rollout" if network == "generator" and not torch.is_grad_enabled() else network
                self.gathered[name] += size
                left = [size]

                def before_backward(_: Tensor) -> None:
                    self.gathered[name] += left[0]
                    left[0] = 0

                for value in tree_iter(output):
                    if isinstance(value, Tensor) and value.requires_grad:
                        value.register_hook(before_backward)

            layer.register_forward_hook(after)

        for layer in module.modules():
            size = sum(p.numel() for p in layer.parameters(recurse=False) if p.numel() > threshold)
            if size:
                watch(layer, size)

    def begin(self, network: str) -> None:
        self.passes.append({"network": network, "encoder": 0, "decoder": 0})

    def take(self) -> tuple[dict[Pass, float], dict[str, float]]:
        """Passes and gathered elements since the last time."""
        passes = [Pass(**item) for item in self.passes if item["encoder"]]  # a head alone has no rows of a network
        found, gathered = Counter(passes), self.gathered
        self.passes, self.gathered = [], Counter()
        return {item: float(n) for item, n in found.items()}, {name: float(n) for name, n in gathered.items()}


class _Watched:
    """A network as the losses call it, announced to the counters; see the module on passes that have run before."""

    def __init__(self, name: str, call: Callable[..., Any], meter: Meter):
        self.name, self.call, self.meter = name, call, meter

    def __call__(self, x_t: Tensor, t: Tensor, condition: Any, **options: Any) -> Any:
        meter = self.meter
        meter.counter.begin(self.name)
        if torch.is_grad_enabled() or any(isinstance(value, Tensor) for value in tree_iter(options)):
            return self.call(x_t, t, condition, **options)
        shapes = {name: tuple(value.shape) for name, value in condition.items()}
        signature = (id(self.call), tuple(x_t.shape), repr(sorted(shapes.items())), repr(sorted(options.items())))
        known = meter.known.get(signature)
        if known is None:
            known = meter.known[signature] = meter.run_once(lambda: self.call(x_t, t, condition, **options))
        else:
            meter.ledger.flops += known.flops
            meter.counter.passes[-1] |= known.rows
            meter.counter.gathered.update(known.gathered)
            meter.ledger.note(known.peak_bytes)
        return tree_map_only(Tensor, lambda value: torch.empty(value.shape, dtype=value.dtype, device=META), known.like)


@dataclass(frozen=True)
class _Known:
    flops: float
    peak_bytes: int
    rows: dict[str, int]
    gathered: Counter[str]
    like: Any
    """The outputs, as tensors on meta."""


class Meter:
    """The counters around runs on the meta device."""

    def __init__(self) -> None:
        self.ledger, self.counter = Ledger(), PassCounter()
        self.known: dict[Any, _Known] = {}

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        with flash_on_meta(), self.ledger:
            yield

    def run_once(self, run: Callable[[], Any]) -> _Known:
        ledger = self.ledger
        before, live, peak, gathered = ledger.flops, ledger.live, ledger.peak, self.counter.gathered.copy()
        ledger.peak = live
        output = run()
        needed, ledger.peak = ledger.peak - live, max(ledger.peak, peak)
        rows = {part: self.counter.passes[-1][part] for part in ("encoder", "decoder")}
        return _Known(ledger.flops - before, needed, rows, self.counter.gathered - gathered, output)

    def cost(self, run: Callable[[], Any]) -> Cost:
        """What `run` costs, its result dropped."""
        before, live = self.ledger.flops, self.ledger.live
        self.ledger.peak = live
        self.counter.take()
        run()
        return Cost(self.ledger.flops - before, self.ledger.peak - live, *self.counter.take())


def meta_batch(teacher: Denoiser, rows: int) -> Batch:
    """A batch without contents, of a network's shapes."""
    condition = {}
    for name, shape in teacher.network.condition_shapes.items():
        sizes = [PROMPT_LENGTH if size is None else size for size in shape]
        dtype = torch.int64 if name == "class_labels" else torch.float32
        condition[name] = torch.empty(rows, *sizes, dtype=dtype, device=META)
    ids = torch.empty(rows, dtype=torch.int64, device=META)
    return Batch(torch.empty(rows, *teacher.network.image_shape, device=META), condition, ids)


@dataclass
class MetaNetworks:
    """The networks of a run on the meta device, in the dtype they train in; see `plan_networks.build`."""

    generator: Denoiser
    fake_score: FakeScore
    teacher: Callable[..., Any]
    base: Denoiser
    """the teacher's denoiser; with LoRA, the one under all three"""
    unets: list[nn.Module]
    owners: dict[str, nn.Module]
    """the modules that DeepSpeed's engines hold: generator, fake_score, teacher; each owns the weights it lists"""
    parameters: dict[str, list[nn.Parameter]]
    """each engine's own weights"""


def count_updates(config: Config, networks: MetaNetworks, threshold: int = 0) -> Counts:
    """Run each kind of update on meta, for one micro-batch. Weights up to `threshold` elements are never gathered."""
    algorithm, meter = Algorithm.from_config(config), Meter()
    base, batch = networks.base, meta_batch(networks.base, config.micro_batch_size)
    weights = [parameter for group in networks.parameters.values() for parameter in group]
    meter.ledger.ignore([*weights, *(b for module in networks.owners.values() for b in module.buffers())])
    meter.ledger.ignore([*base.buffers(), batch.x0, batch.sample_ids, *batch.condition.values()])
    for unet in networks.unets:
        meter.counter.watch_rows(unet)
    for name, module in networks.owners.items():
        meter.counter.watch_weights(name, module, threshold)
    watched = Networks(
        _Watched("generator", networks.generator, meter), _Watched("fake_score", networks.fake_score, meter),
        _Watched("teacher", networks.teacher, meter), base.schedule, base.prediction_type, base.unconditional,
    )  # fmt: skip
    rollout = _Watched("rollout", networks.generator, meter)
    only_rollout = replace(watched, generator=rollout)

    unit = rollout if config.model.lora is None else watched.teacher  # the same network, but for its adapter

    def forward() -> None:
        with torch.no_grad():
            unit(batch.x0, batch.sample_ids, batch.condition)

    def samples(key: NoiseKey) -> None:
        with torch.no_grad():
            generate(only_rollout, algorithm, batch, key)

    def update_generator(key: NoiseKey) -> None:
        with frozen(networks.fake_score):
            generator_loss(watched, algorithm, batch, key, rollout=rollout)[0].backward()

    def update_fake_score(key: NoiseKey) -> None:
        fake_score_loss(watched, algorithm, batch, batch.x0, key)[0].backward()

    with meter.on(), _gradients_dropped(weights):
        full = meter.cost(forward).flops / config.micro_batch_size
        keys = _keys_of_indices(algorithm)
        chains = [meter.cost(partial(samples, key)) for key in keys]
        first = meter.cost(lambda: update_generator(keys[0]))
        # The k-th index has k more passes without gradient than the first, and the rest alike.
        generator = first + _difference(_mean(chains), chains[0])
        generator = replace(generator, peak_bytes=max(generator.peak_bytes, *(chain.peak_bytes for chain in chains)))
        fake_score = meter.cost(lambda: update_fake_score(NoiseKey(0, step=0)))
        interval = algorithm.r1_interval
        if algorithm.adversarial and algorithm.r1_kind != "none" and interval > 1:
            other = meter.cost(lambda: update_fake_score(NoiseKey(0, step=1)))
            fake_score = fake_score * (1 / interval) + other * (1 - 1 / interval)
    return Counts(full, generator, _mean(chains), fake_score)


def _keys_of_indices(algorithm: Algorithm) -> list[NoiseKey]:
    """A key for every trained step that "batch" can draw; any key where it is drawn for each sample."""
    num = len(algorithm.steps)
    if algorithm.rollout_index != "batch" or num == 1:
        return [NoiseKey(0)]
    found: dict[int, NoiseKey] = {}
    for step in range(10**6):
        key = NoiseKey(0, step=step)
        found.setdefault(int(rollout_index(num, "batch", torch.zeros(1, dtype=torch.int64), key)), key)
        if len(found) == num:
            break
    return [found[index] for index in range(num)]


def _mean(costs: list[Cost]) -> Cost:
    total = Cost()
    for cost in costs:
        total = total + cost * (1 / len(costs))
    return total


def _difference(cost: Cost, other: Cost) -> Cost:
    return replace(cost + other * -1.0, peak_bytes=0)


@contextlib.contextmanager
def _gradients_dropped(weights: list[nn.Parameter]) -> Iterator[None]:
    """A weight's gradient is gone as soon as it is whole, as ZeRO-3 moves it into its shards."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    handles = [weight.register_post_accumulate_grad_hook(drop) for weight in weights if weight.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
