"""What each rank holds under ZeRO, in bytes: from the shapes of the weights, the settings and the counted peaks.

At stage 3, b bytes an element (2 in bf16, 4 in f32), W ranks, n weights of a network, n / W rounded up for each:
    weights       n / W * b, and weights up to stage3_param_persistence_threshold elements whole beside
    gradients     n / W in data_types.grad_accum_dtype for each trained network, kept from start to end
    optimizer     n / W * 12: f32 masters and two moments
    EMA           n / W * 4 of the generator
    buckets       reduce_bucket_size, in communication_data_type, for each trained network, kept from start to end
While an update runs, beside these: tensors alive (activations), gathered weights and, at its end, f32 gradients of the
weights that the optimizer takes at a time. Stages 1 and 2 (n / W of all weights together):
    weights       n * b
    optimizer     n / W * 12, EMA n / W * 4, both as above
and while an update runs its gradients (stage 1: n * b, stage 2: n / W in grad_accum_dtype) and its bucket with the copy
that is sent.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .config import Config
from .config_deepspeed import is_bf16
from .engine import engine_settings
from .plan_counts import Counts

TRAINED = ("generator", "fake_score")
GATHER_BUFFER = 1 << 25
"""Elements that one all-gather of a whole network takes at a time."""
BYTES = {"fp32": 4, "bf16": 2, "bfp16": 2, "fp16": 2}


@dataclass(frozen=True)
class ZeRO:
    """The numbers in `zero_optimization` that memory and traffic depend on, with DeepSpeed's defaults."""

    persistence: int = 100_000
    reuse: int = 1_000_000_000
    prefetch: int = 50_000_000
    bucket: int = 500_000_000
    sub_group: int = 1_000_000_000
    contiguous: bool = True
    width: int = 4
    """bytes an element of the weights"""
    accumulated: int = 4
    """bytes an element of gradients between micro-batches"""
    sent: int = 4
    """bytes an element of gradients between ranks"""
    offload_optimizer: bool = False
    offload_param: bool = False
    stage: int = 3
    overlap: bool = False
    """whether one bucket is sent while the next one is filled, at stages 1 and 2"""
    one_all_reduce: bool = True
    """whether gradients go to all ranks at stages 1 and 2, and not each to the rank that takes it"""

    @classmethod
    def from_config(cls, config: Config) -> ZeRO:
        settings, width = engine_settings(config, config.generator), 2 if is_bf16(config.deepspeed) else 4
        given = settings.get("zero_optimization", {})

        def value(default: Any, *names: str) -> Any:
            return next((given[name] for name in names if given.get(name) is not None), default)

        def offloaded(name: str) -> bool:
            device = (given.get(name) or {}).get("device")
            return device not in (None, "none")

        return cls(
            int(value(cls.persistence, "stage3_param_persistence_threshold", "param_persistence_threshold")),
            int(value(cls.reuse, "stage3_max_reuse_distance", "max_reuse_distance")),
            int(value(cls.prefetch, "stage3_prefetch_bucket_size", "prefetch_bucket_size")),
            int(value(cls.bucket, "reduce_bucket_size")),
            int(value(cls.sub_group, "sub_group_size")),
            bool(value(cls.contiguous, "contiguous_gradients")),
            width,
            BYTES.get(str(settings.get("data_types", {}).get("grad_accum_dtype")), width),
            BYTES.get(str(settings.get("communication_data_type")), width),
            offloaded("offload_optimizer"),
            offloaded("offload_param"),
            int(given["stage"]),
            bool(value(cls.overlap, "overlap_comm")),
            bool(value(True, "use_multi_rank_bucket_allreduce")) or not value(True, "reduce_scatter"),
        )


def shard(sizes: Iterable[int], world_size: int) -> int:
    """Elements of a rank's part: every weight is split for itself."""
    return sum(-(-size // world_size) for size in sizes)


@dataclass(frozen=True)
class Phase:
    """What an update needs beside the states, in bytes."""

    activations: int = 0
    gathered: int = 0
    """weights that are whole while it runs"""
    step: int = 0
    """what the optimizer's step needs, when the activations are gone"""
    gradients: int = 0
    """gradients and buckets that are there while it runs alone: at stages 1 and 2"""

    @property
    def peak(self) -> int:
        return self.gathered + self.gradients + max(self.activations, self.step)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    states: dict[str, int]
    phases: dict[str, Phase]
    """generator, fake_score: their updates; rollout: samples alone"""
    reserve: int = 0
    """CUDA's context, libraries' workspaces and fragmentation: an allowance, not counted"""
    host: int = 0
    """bytes in the host's memory, where states are offloaded"""

    @property
    def at_rest(self) -> int:
        return sum(self.states.values())

    @property
    def total(self) -> int:
        """The largest over the updates."""
        return self.at_rest + max(phase.peak for phase in self.phases.values()) + self.reserve


def plan_memory(config: Config, sizes: dict[str, list[int]], counts: Counts, *, reserve: int = 0) -> Memory:
    """Memory of a rank of `config.world_size`; `sizes`: elements of each weight of each engine."""
    zero, world = ZeRO.from_config(config), config.world_size
    if zero.stage < 3:
        return _whole_weights(config, zero, {name: sum(values) for name, values in sizes.items()}, counts, reserve)
    width = zero.width
    held = {name: shard(values, world) for name, values in sizes.items()}
    trained = sum(held[name] for name in TRAINED)
    weights = sum(held.values()) * width
    persistent = sum(size for values in sizes.values() for size in values if size <= zero.persistence) * width
    optimizer, gradients = 12 * trained, zero.accumulated * trained
    if config.model.lora is not None:  # an adapter stays whole after the rollout that begins an iteration
        persistent += sum(size for size in sizes["generator"] if size > zero.persistence) * width
    averages = 0 if config.generator.ema is None else 4 * held["generator"]  # kept where the f32 masters are
    host = (optimizer + gradients + averages) * zero.offload_optimizer + weights * zero.offload_param
    states = {
        "weights": (0 if zero.offload_param else weights) + (persistent if world > 1 else 0),
        "gradients": 0 if zero.offload_optimizer else gradients,
        "optimizer (f32 masters, two moments)": 0 if zero.offload_optimizer else optimizer,
        "EMA": 0 if zero.offload_optimizer else averages,
        "reduce buckets": 2 * zero.bucket * zero.sent if zero.contiguous else 0,
    }
    phases = {"rollout": Phase(counts.rollout.peak_bytes, _gathered(config, zero, sizes, "rollout"))}
    for name, cost in (("generator", counts.generator), ("fake_score", counts.fake_score)):
        taken = 0 if zero.offload_optimizer else min(held[name], max(zero.sub_group, 1))
        phases[name] = Phase(cost.peak_bytes, _gathered(config, zero, sizes, name), taken * (4 + zero.accumulated))
    return Memory(states, phases, reserve, host)


def _whole_weights(config: Config, zero: ZeRO, sizes: dict[str, int], counts: Counts, reserve: int) -> Memory:
    """Stages 1 and 2: weights whole on each rank, f32 masters, moments and average divided."""
    parts = {name: -(-size // config.world_size) for name, size in sizes.items()}
    optimizer = {
        "optimizer (f32 masters, two moments)": 12 * sum(parts[name] for name in TRAINED),
        "EMA": 0 if config.generator.ema is None else 4 * parts["generator"],
    }
    states, host = {"weights": sum(sizes.values()) * zero.width, **optimizer}, 0
    if zero.offload_optimizer:  # with the gradients and the weights that they are copied to and from
        host = sum(optimizer.values()) + (zero.accumulated + 4 + zero.width) * sum(parts[name] for name in TRAINED)
        states |= dict.fromkeys(optimizer, 0)
    phases = {"rollout": Phase(counts.rollout.peak_bytes)}
    for name, cost in (("generator", counts.generator), ("fake_score", counts.fake_score)):
        bucket = zero.bucket * zero.width * (1 + zero.overlap) + min(zero.bucket, sizes[name]) * zero.sent
        part = parts[name] * zero.accumulated
        # In f32, a micro-batch's part is there beside the sum of those before it; and the step takes a copy of the sum.
        again = part if zero.accumulated == zero.width else 0
        step = again
        if zero.stage == 1:
            kept = sizes[name] * zero.width + part
        else:
            kept = part + again * (config.gradient_accumulation_steps > 1)
            if zero.offload_optimizer and again:  # goes to the host as it comes
                kept = 0
        if zero.offload_optimizer:
            step = 0
        phases[name] = Phase(cost.peak_bytes, step=step, gradients=bucket + kept)
    return Memory(states, phases, reserve, host)


def whole_networks(config: Config, update: str) -> list[str]:
    """Engines of ZeRO-3 whose weights lie whole beside an update (generator, rollout, fake_score), by `run.gather`."""
    if config.run.gather == "module":
        return []
    if config.model.lora is not None:
        return ["teacher"] if config.run.gather == "network" else []
    if update == "rollout":
        return ["generator"]
    if config.run.gather != "network":  # "rollout": the copy is gone before the update itself
        return []
    if update == "generator":
        return ["generator", "fake_score", "teacher"]
    adversarial = config.adversarial
    return ["teacher"] if adversarial.features == "teacher" and adversarial.discriminator_weight > 0 else []


def hooked_networks(config: Config, update: str) -> list[str]:
    """Engines whose weights an update takes layer by layer, through ZeRO-3's hooks."""
    if config.model.lora is not None:
        base = [] if whole_networks(config, update) else ["teacher"]
        return [*base, "generator", *(["fake_score"] if update != "rollout" else [])]
    used = {"generator": ["generator", "fake_score", "teacher"], "rollout": ["generator"], "fake_score": ["fake_score"]}
    if update == "fake_score" and config.adversarial.features == "teacher":
        used["fake_score"].append("teacher")
    return [name for name in used[update] if name == update or name not in whole_networks(config, update)]


def _gathered(config: Config, zero: ZeRO, sizes: dict[str, list[int]], update: str) -> int:
    if config.world_size == 1:
        return 0  # a rank's part is the whole, and is used where it lies
    total = 0
    for name in hooked_networks(config, update):
        gathered = [size for size in sizes[name] if size > zero.persistence]
        # A weight stays until its next use when that is less than `reuse` elements away, there and back.
        kept = sum(gathered) if sum(gathered) <= zero.reuse else zero.reuse // 2
        total += min(sum(gathered), kept + zero.prefetch + 2 * max(gathered, default=0))
    whole = [sum(sizes[name]) for name in whole_networks(config, update)]
    # The last one is put together from the buffer of an all-gather.
    return (total + sum(whole) + min(max(whole, default=0), GATHER_BUFFER)) * zero.width


def traffic(config: Config, sizes: dict[str, list[int]], counts: Counts) -> dict[str, float]:
    """Bytes of the whole tensors of all-gathers and reduce-scatters in a cycle; a rank receives (W - 1) / W of them.

    An all-reduce counts as the two that it is made of. At stage 3, as if every layer's weights were let go after use:
    what ZeRO-3 keeps for a use that is near (`max_reuse_distance`) is gathered less often.
    """
    zero = ZeRO.from_config(config)
    times, accumulation = config.fake_score.ttur_ratio, config.gradient_accumulation_steps
    moved = sum(sizes["generator"]) + times * sum(sizes["fake_score"])
    if zero.stage < 3:  # weights once after each step; gradients with each micro-batch, or at stage 1 with the last
        sendings = (accumulation if zero.stage == 2 else 1) * (2 if zero.one_all_reduce else 1)
        return {"gathered": float(moved * zero.width), "reduced": float(moved * sendings * zero.sent)}
    gathered = 0.0
    for update, cost, number in (
        ("generator", counts.generator, 1), ("rollout", counts.rollout, times - 1),
        ("fake_score", counts.fake_score, times),
    ):  # fmt: skip
        hooked = set(hooked_networks(config, update))
        if "generator" in hooked and not (config.run.gather != "module" and config.model.lora is None):
            hooked.add("rollout")
        layers = sum(n for name, n in cost.gathered.items() if name in hooked) * accumulation
        whole = sum(sum(sizes[name]) for name in whole_networks(config, update))
        if config.run.gather == "rollout" and config.model.lora is None and update == "generator":
            # Anew for each micro-batch, where there is a rollout.
            gathered += number * sum(sizes["generator"]) * accumulation * _share_with_rollout(config)
        gathered += number * (layers + whole)
    persistent = {n: sum(size for size in sizes[n] if size <= zero.persistence) for n in TRAINED}
    gathered += persistent["generator"] + times * persistent["fake_score"]  # once after each step
    return {"gathered": gathered * zero.width, "reduced": float(accumulation * moved * zero.sent)}


def _share_with_rollout(config: Config) -> float:
    """How many of the generator's updates have a rollout: the first step's input needs none."""
    num = len(config.generator.steps)
    return (num - 1) / num if config.generator.rollout_index == "batch" else float(num > 1)
