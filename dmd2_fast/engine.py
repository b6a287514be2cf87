"""DeepSpeed's ZeRO around the three networks: engines for generator and fake score, the teacher frozen.

At stage 3 all three are sharded, and the teacher has an engine too; at stages 1 and 2 every rank has them whole, and
they are plain modules.

The recipe (docs/design.md, "Three networks on ZeRO-3"): gradients flow through another network only by its bare
`.module`, never by its engine, with that network frozen around forward and backward; only `engine.backward`, never
`loss.backward()`. A non-finite loss is turned into non-finite gradients, so that the global norm, which DeepSpeed
reduces over all ranks anyway, makes every rank skip the step together without a further collective.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import Config, FakeScoreConfig, GeneratorConfig
from .config_deepspeed import is_bf16, offloaded_to, shards_weights
from .denoiser import Denoiser
from .distillation import Networks
from .fake_score import FakeScore
from .optimization import make_optimizer, optimizer_name
from .partitions import FlatWeights
from .shards import ShardedWeights, Traces, WholeNetwork

Trained = GeneratorConfig | FakeScoreConfig


def engine_settings(config: Config, network: Trained | None) -> dict[str, Any]:
    """DeepSpeed's configuration of the engine around the generator, the fake score or (None) the frozen teacher."""
    keys = {
        **config.deepspeed,
        "train_batch_size": config.global_batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        # Explicit: DeepSpeed's default clips at 1.
        "gradient_clipping": 0.0 if network is None else network.gradient_clipping,
        "zero_optimization": _zero_settings(config, network),
    }
    keys.setdefault("steps_per_print", 10**9)
    # torch's fused AdamW runs on the CPU as well; DeepSpeed's own would be compiled at the first start.
    keys.setdefault("zero_force_ds_cpu_optimizer", False)
    if is_bf16(config.deepspeed):
        # DeepSpeed's default rounds the sums over ranks and over accumulated micro-batches to bf16.
        keys["data_types"] = {"grad_accum_dtype": "fp32", **keys.get("data_types", {})}
        keys.setdefault("communication_data_type", "fp32")
    return keys


def _zero_settings(config: Config, network: Trained | None) -> dict[str, Any]:
    """`zero_optimization` for one of the engines: DeepSpeed clears an NVMe folder when an engine starts in it."""
    zero, name = dict(config.deepspeed["zero_optimization"]), _name(network)
    if offloaded_to(zero, "offload_param") == "nvme":
        params = zero["offload_param"]
        zero["offload_param"] = {**params, "nvme_path": str(Path(params["nvme_path"]) / name)}
    if network is None:
        zero.pop("offload_optimizer", None)
    return zero


def _name(network: Trained | None) -> str:
    if network is None:
        return "teacher"
    return "generator" if isinstance(network, GeneratorConfig) else "fake_score"


class FrozenNetwork:
    """In place of an engine around a network that is whole and never trained: DeepSpeed has nothing to do for it."""

    def __init__(self, module: nn.Module):
        self.module = module.to(next(module.parameters()).device)  # its buffers, too


def make_engine(config: Config, model: nn.Module, network: Trained | None) -> Any:
    """DeepSpeed's engine of a model with its network's optimizer and clipping; None: frozen, without an optimizer."""
    import deepspeed

    if network is None and not shards_weights(config.deepspeed):
        return FrozenNetwork(model)
    settings = engine_settings(config, network)
    on_cpu = offloaded_to(settings["zero_optimization"], "offload_optimizer") is not None
    client = None if network is None else make_optimizer(model.parameters(), network.optimizer, on_cpu=on_cpu)
    return deepspeed.initialize(model=model, optimizer=client, config=settings, dist_init_required=False)[0]


class Engines:
    """The three engines, and the views of them that the losses take.

    `run.gather` says how passes that do not update a network (rollout, teacher, the fake score under the generator's
    loss) get at its weights: "module", through ZeRO-3's hooks; "network", as a `WholeNetwork`; "rollout", the generator
    as a `WholeNetwork` for its rollout alone, the others through hooks. At stages 1 and 2 there are neither hooks nor
    copies: whatever it says, the module itself is called.
    """

    generator: Any
    fake_score: Any
    teacher: Any

    def __init__(self, config: Config, generator: Denoiser, fake_score: FakeScore, teacher: Denoiser):
        self.schedule, self.prediction_type = teacher.schedule, teacher.prediction_type
        self.unconditional = teacher.unconditional
        self.gather = how_to_gather(config)
        whole: dict[str, tuple[nn.Module, ...]] = {
            "module": (), "rollout": (generator,), "network": (generator, fake_score, teacher),
        }  # fmt: skip
        self.whole = {model: WholeNetwork(model) for model in whole[self.gather]}
        self.generator = make_engine(config, generator, config.generator)
        self.fake_score = make_engine(config, fake_score, config.fake_score)
        self.teacher = make_engine(config, teacher.requires_grad_(False).eval(), None)
        self.traces = traces_of(config, self.generator, self.fake_score, self.teacher)

    @property
    def optimizer_name(self) -> str:
        """Which implementation of AdamW moves the weights."""
        return optimizer_name(self.generator.optimizer.optimizer)

    def traced(self, engine: Any, kind: str) -> contextlib.AbstractContextManager[None]:
        """Passes of one kind inside, and their backward, where ZeRO-3 records them."""
        return self.traces[engine].of(kind) if engine in self.traces else contextlib.nullcontext()

    @contextlib.contextmanager
    def bare(self, engine: Any, decode: bool = True) -> Iterator[nn.Module]:
        """An engine's module for passes that do not update it; `decode` False: none of them has rows to decode.

        Collective; the same on every rank.
        """
        if engine.module not in self.whole:
            with self.traced(engine, "decode" if decode else "encode"):
                yield engine.module
            return
        with self.whole[engine.module].gathered(dict(engine.module.named_parameters()), decode) as module:
            yield module

    @contextlib.contextmanager
    def for_generator(self) -> Iterator[tuple[Networks, Callable[..., Any]]]:
        """(networks, the generator as its rollout calls it) for the generator's loss; run backward inside, too.

        The generator is an engine; the fake score is frozen, and gradients pass through it to its input.
        """
        with (
            frozen(self.fake_score.module),
            self._rollout() as rollout,
            self.bare(self.fake_score) as fake_score,
            self.bare(self.teacher) as teacher,
        ):
            yield self._networks(self.generator, fake_score, teacher), rollout

    @contextlib.contextmanager
    def for_regression(self) -> Iterator[Networks]:
        """Networks for the generator's loss on pairs alone; run backward inside, too."""
        yield self._networks(self.generator, None, None)

    @contextlib.contextmanager
    def _rollout(self) -> Iterator[Callable[..., Any]]:
        """The generator for forwards without gradient between those that train it."""
        engine = self.generator
        if self.gather == "network":
            with self.bare(engine) as module:
                yield module
            return
        with contextlib.ExitStack() as held:
            inside: list[nn.Module] = []

            def rollout(*arguments: Any, **options: Any) -> Any:
                if not inside:
                    inside.append(held.enter_context(self.bare(engine)))
                return inside[0](*arguments, **options)

            def release(*_: Any) -> None:
                inside.clear()
                held.close()

            # A trained forward ends the rollout: the copy is gone before activations come, and the trace is its own.
            hook = engine.register_forward_pre_hook(release, prepend=True)
            try:
                yield rollout
            finally:
                hook.remove()

    @contextlib.contextmanager
    def for_samples(self) -> Iterator[Networks]:
        """Networks for the generator's samples without gradient."""
        with self.bare(self.generator) as generator:
            yield self._networks(generator, self.fake_score, None)

    @contextlib.contextmanager
    def for_fake_score(self, teacher_features: bool) -> Iterator[Networks]:
        """Networks for the fake score's loss: the fake score is an engine, the teacher gives features if asked to."""
        features = self.bare(self.teacher, decode=False) if teacher_features else contextlib.nullcontext()
        with features as teacher:
            yield self._networks(None, self.fake_score, teacher)

    def _networks(self, generator: Any, fake_score: Any, teacher: Any) -> Networks:
        return Networks(generator, fake_score, teacher, self.schedule, self.prediction_type, self.unconditional)


def how_to_gather(config: Config) -> str:
    """`run.gather`, where weights are sharded at all."""
    return config.run.gather if shards_weights(config.deepspeed) else "module"


def traces_of(config: Config, *engines: Any) -> dict[Any, Traces]:
    """What ZeRO-3 records of each engine; nothing at other stages."""
    return {engine: Traces(engine) for engine in engines} if shards_weights(config.deepspeed) else {}


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of `module` takes a gradient inside; what was trainable is trainable again afterwards."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def poison_if_not_finite(loss: Tensor) -> Tensor:
    """The loss, or nan with nan gradients everywhere when it is not finite: no host read."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, float("nan"))


def step_was_skipped(engine: Any) -> bool:
    """Whether the last step at an accumulation boundary met a non-finite gradient, on any rank, and was not taken."""
    return bool(engine.optimizer.overflow)


def weights_of(engine: Any) -> ShardedWeights | FlatWeights:
    """A trained engine's weights, as its stage of ZeRO keeps them."""
    return ShardedWeights(engine) if engine.zero_optimization_partition_weights() else FlatWeights(engine)


class ShardedEMA:
    """Exponential moving average of an engine's f32 weights, each rank keeping the average of its own part.

    It lies where the optimizer keeps its f32 weights: on the device, or in the CPU's memory.
    """

    def __init__(self, engine: Any, decay: float):
        self.weights, self.decay = weights_of(engine), decay
        self.shards = {name: master.clone() for name, master in self.weights.masters().items()}

    @torch.no_grad()
    def update(self) -> None:
        for name, master in self.weights.masters().items():
            self.shards[name].lerp_(master, 1 - self.decay)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The engine's module runs with the averaged weights inside. Collective."""
        saved = self.weights.copied()
        try:
            self.weights.write(self.shards)
            yield
        finally:
            self.weights.write(saved)

    def full_state_dict(self, keep: bool = True) -> dict[str, Tensor]:
        """The averaged weights, whole, f32, on the CPU; {} where `keep` is false. Collective."""
        return self.weights.whole(self.shards, keep)


def full_state_dict(engine: Any, keep: bool = True) -> dict[str, Tensor]:
    """The engine's current weights, whole, f32, on the CPU; {} where `keep` is false. Collective."""
    return weights_of(engine).whole(keep=keep)
