"""DeepSpeed ZeRO-3 around the three networks: engines for generator and fake score, the teacher sharded and frozen.

The recipe (docs/design.md, "Three networks on ZeRO-3"): gradients flow through another network only by its bare
`.module`, never by its engine, with that network frozen around forward and backward; only `engine.backward`, never
`loss.backward()`. A non-finite loss is turned into non-finite gradients, so that the global norm, which DeepSpeed
reduces over all ranks anyway, makes every rank skip the step together without a further collective.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .config import Config, FakeScoreConfig, GeneratorConfig
from .denoiser import Denoiser
from .distillation import FakeScore, Networks
from .optimization import make_optimizer


def _engine_config(config: Config, gradient_clipping: float) -> dict:
    keys = {
        **config.deepspeed,
        "train_batch_size": config.global_batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": gradient_clipping,  # explicit: DeepSpeed's default clips at 1
    }
    keys.setdefault("steps_per_print", 10**9)
    return keys


def make_engine(config: Config, model: nn.Module, network: GeneratorConfig | FakeScoreConfig | None) -> Any:
    """DeepSpeed's engine of a model with its network's optimizer and clipping; None: frozen, without an optimizer."""
    import deepspeed

    client = None if network is None else make_optimizer(model.parameters(), network.optimizer)
    settings = _engine_config(config, 0.0 if network is None else network.gradient_clipping)
    return deepspeed.initialize(model=model, optimizer=client, config=settings, dist_init_required=False)[0]


class WholeNetwork:
    """A network for passes that do not update it: hook-free, with all its weights gathered at once while in use.

    ZeRO-3's hooks cost more than the arithmetic of a small network, and gather a large one anew for every forward. Here
    one all-gather serves any number of forwards, and gradients reach the input as through any plain module.
    """

    def __init__(self, module: nn.Module):
        self.module = copy.deepcopy(module).to("meta").requires_grad_(False).eval()
        for ours, theirs in zip(self.module.modules(), module.modules(), strict=True):
            if theirs._compiled_call_impl is not None:
                ours.compile()  # which a copy leaves out
        self.slots = [
            (owner, leaf, f"{path}.{leaf}" if path else leaf)
            for path, owner in self.module.named_modules()
            for leaf in owner._parameters
            if owner._parameters[leaf] is not None
        ]
        self.buffers = dict(module.named_buffers())
        for path, owner in self.module.named_modules():
            for leaf in owner._buffers:
                owner._buffers[leaf] = self.buffers[f"{path}.{leaf}" if path else leaf]

    @contextlib.contextmanager
    def gathered(self, parameters: dict[str, nn.Parameter]) -> Iterator[nn.Module]:
        """The module with the weights of a ZeRO-3 module's `parameters` inside. Collective."""
        placeholders = [owner._parameters[leaf] for owner, leaf, _ in self.slots]
        weights = gather_all([parameters[name] for _, _, name in self.slots])
        try:
            for (owner, leaf, _), weight in zip(self.slots, weights, strict=True):
                owner._parameters[leaf] = weight
            yield self.module
        finally:
            for (owner, leaf, _), placeholder in zip(self.slots, placeholders, strict=True):
                owner._parameters[leaf] = placeholder


class Engines:
    """The three engines, and the views of them that the losses take.

    `run.gather` says how passes that do not update a network (rollout, teacher, the fake score under the generator's
    loss) get at its weights: "module", through ZeRO-3's hooks, or "network", as a `WholeNetwork`.
    """

    def __init__(self, config: Config, generator: Denoiser, fake_score: FakeScore, teacher: Denoiser):
        self.schedule, self.prediction_type = teacher.schedule, teacher.prediction_type
        self.unconditional = teacher.unconditional
        whole = config.run.gather == "network"
        self.whole = {model: WholeNetwork(model) for model in (generator, fake_score, teacher)} if whole else {}
        self.generator = make_engine(config, generator, config.generator)
        self.fake_score = make_engine(config, fake_score, config.fake_score)
        self.teacher = make_engine(config, teacher.requires_grad_(False).eval(), None)

    @contextlib.contextmanager
    def bare(self, engine: Any) -> Iterator[nn.Module]:
        """An engine's module for passes that do not update it. Collective; the same on every rank."""
        if engine.module not in self.whole:
            yield engine.module
            return
        with self.whole[engine.module].gathered(dict(engine.module.named_parameters())) as module:
            yield module

    @contextlib.contextmanager
    def for_generator(self) -> Iterator[tuple[Networks, nn.Module]]:
        """(networks, the generator as its rollout calls it) for the generator's loss; run backward inside, too.

        The generator is an engine; the fake score is frozen, and gradients pass through it to its input.
        """
        with (
            frozen(self.fake_score.module),
            self.bare(self.generator) as rollout,
            self.bare(self.fake_score) as fake_score,
            self.bare(self.teacher) as teacher,
        ):
            yield self._networks(self.generator, fake_score, teacher), rollout

    @contextlib.contextmanager
    def for_regression(self) -> Iterator[Networks]:
        """Networks for the generator's loss on pairs alone; run backward inside, too."""
        yield self._networks(self.generator, None, None)

    @contextlib.contextmanager
    def for_samples(self) -> Iterator[Networks]:
        """Networks for the generator's samples without gradient."""
        with self.bare(self.generator) as generator:
            yield self._networks(generator, self.fake_score, None)

    @contextlib.contextmanager
    def for_fake_score(self, teacher_features: bool) -> Iterator[Networks]:
        """Networks for the fake score's loss: the fake score is an engine, the teacher gives features if asked to."""
        with self.bare(self.teacher) if teacher_features else contextlib.nullcontext() as teacher:
            yield self._networks(None, self.fake_score, teacher)

    def _networks(self, generator: Any, fake_score: Any, teacher: Any) -> Networks:
        return Networks(generator, fake_score, teacher, self.schedule, self.prediction_type, self.unconditional)


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


def shard(parameter: nn.Parameter) -> Tensor:
    """This rank's part of a ZeRO-3 parameter, flat (padded on the last rank)."""
    return parameter.ds_tensor


def gather_all(parameters: list[nn.Parameter], shards: list[Tensor] | None = None) -> list[Tensor]:
    """The whole tensors, in the parameters' shapes, from every rank's `shards` (default: the weights'). Collective."""
    shards = [shard(parameter).detach() for parameter in parameters] if shards is None else shards
    world_size = dist.get_world_size()
    if world_size == 1:
        wholes = shards
    else:
        mine = torch.cat([part.flatten() for part in shards])
        ranks = torch.empty(world_size, mine.numel(), dtype=mine.dtype, device=mine.device)
        dist.all_gather(list(ranks.unbind()), mine)
        wholes = [part.flatten() for part in ranks.split([part.numel() for part in shards], dim=1)]
    return [w[: p.ds_numel].view(p.ds_shape) for p, w in zip(parameters, wholes, strict=True)]


class ShardedEMA:
    """Exponential moving average of a ZeRO-3 module, f32, each rank keeping the average of its own shard."""

    def __init__(self, engine: Any, decay: float):
        self.engine, self.decay = engine, decay
        self.parameters = dict(engine.module.named_parameters())
        self.shards = {name: value.clone() for name, value in self._masters()}

    def _masters(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's f32 master weights by name (the optimizer's, where weights are kept in bf16)."""
        from deepspeed.utils import safe_get_local_fp32_param

        for name, parameter in self.parameters.items():
            master = safe_get_local_fp32_param(parameter)
            yield name, (parameter.ds_tensor.float() if master is None else master).detach()

    @torch.no_grad()
    def update(self) -> None:
        masters = [master for _, master in self._masters()]
        torch._foreach_lerp_(list(self.shards.values()), masters, 1 - self.decay)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The engine's module runs with the averaged weights inside. Collective."""
        saved = {name: shard(parameter).clone() for name, parameter in self.parameters.items()}
        try:
            self._write(self.shards)
            yield
        finally:
            self._write(saved)

    @torch.no_grad()
    def _write(self, shards: dict[str, Tensor]) -> None:
        """Put these shards into the module."""
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        for name, parameter in self.parameters.items():
            shard(parameter).copy_(shards[name])
        # DeepSpeed keeps small parameters gathered between passes (its persistence threshold): no forward fetches them.
        whole = [p for p in self.parameters.values() if p.ds_status == ZeroParamStatus.AVAILABLE]
        for parameter, value in zip(whole, gather_all(whole) if whole else [], strict=True):
            parameter.data.copy_(value)

    def full_state_dict(self) -> dict[str, Tensor]:
        """The averaged weights, whole, f32, on the CPU. Collective."""
        wholes = gather_all(list(self.parameters.values()), [self.shards[name] for name in self.parameters])
        return {name: _own_copy(whole) for name, whole in zip(self.parameters, wholes, strict=True)}


def full_state_dict(engine: Any) -> dict[str, Tensor]:
    """The engine's current weights, whole, f32, on the CPU. Collective."""
    parameters = dict(engine.module.named_parameters())
    wholes = gather_all(list(parameters.values()))
    return {name: _own_copy(whole) for name, whole in zip(parameters, wholes, strict=True)}


def _own_copy(whole: Tensor) -> Tensor:
    """f32 on the CPU; never a view of weights that go on changing, as a single rank's shards are."""
    return whole.to("cpu", torch.float32, copy=True)
