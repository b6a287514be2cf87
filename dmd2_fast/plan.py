"""`dmd2-fast plan`: what a run needs on each GPU, what it computes and sends, and how long a step may take.

Counts are exact (plan_counts.py), memory follows ZeRO's rules (plan_memory.py), times are estimates from a stated
peak and bandwidth.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .algorithm import Algorithm
from .config import Config, load_config
from .config_deepspeed import shards_weights
from .denoiser import Denoiser
from .errors import UserError
from .plan_counts import Counts, count_updates
from .plan_memory import Memory, ZeRO, plan_memory, traffic
from .plan_networks import build, build_base

GIB, GB = 2**30, 10**9
UPDATES = {"generator": "generator update", "rollout": "rollout alone", "fake_score": "fake-score update"}


@dataclass(frozen=True)
class Machine:
    """What the plan is for. Defaults: an A100 80GB, and what its tensor cores and links give in practice."""

    gpus: int
    memory: int = 80 * GB
    """bytes of one GPU; 80GB is 80e9"""
    peak_tflops: float = 312.0
    """arithmetic of one GPU in the run's dtype, 1e12 FLOP/s (A100, bf16, dense)"""
    efficiency: float = 0.4
    """share of the peak that a UNet reaches; convolutions and attention in bf16 are seen at .35-.5"""
    bandwidth: float = 100.0
    """bytes each GPU receives from the others, 1e9 B/s: NVLink gives 200 and more, 8 x 200 Gb/s InfiniBand some 20"""
    reserve: int = 2 * GIB
    """CUDA's context, NCCL, workspaces of cuDNN and fragmentation, bytes: an allowance"""


@dataclass(frozen=True)
class Alternative:
    """A change of the configuration and the total it brings."""

    change: str
    total: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """Everything that is printed."""

    config: Config
    machine: Machine
    source: str
    counts: Counts
    memory: Memory
    traffic: dict[str, float]
    sizes: dict[str, int]
    alternatives: list[Alternative] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.machine.memory

    def forwards(self, update: str) -> float:
        """Full forwards (F) of one sample that an update costs for each sample."""
        return getattr(self.counts, update).flops / self.config.micro_batch_size / self.counts.forward_flops

    @property
    def cycle_flops(self) -> float:
        """FLOPs of one rank in a cycle."""
        config = self.config
        return self.counts.cycle(config.fake_score.ttur_ratio).flops * config.gradient_accumulation_steps

    @property
    def seconds(self) -> tuple[float, float]:
        """Of a cycle: (arithmetic, communication)."""
        machine = self.machine
        received = sum(self.traffic.values()) * (machine.gpus - 1) / machine.gpus
        return (
            self.cycle_flops / (machine.peak_tflops * 1e12 * machine.efficiency),
            received / (machine.bandwidth * GB),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON types: bytes, FLOPs, seconds."""
        memory, config = self.memory, self.config
        updates = {
            name: {
                "flops": getattr(self.counts, name).flops * config.gradient_accumulation_steps,
                "forwards_per_sample": self.forwards(name),
                "passes": [{**asdict(p), "times": n} for p, n in getattr(self.counts, name).passes.items()],
            }
            for name in UPDATES
        }
        arithmetic, communication = self.seconds
        ratio = config.fake_score.ttur_ratio
        return {
            "model": self.source,
            "parameters": self.sizes,
            "machine": asdict(self.machine),
            "batch": {
                "global": config.global_batch_size, "micro": config.micro_batch_size,
                "accumulation": config.gradient_accumulation_steps,
            },
            "memory": {
                "states": memory.states,
                "updates": {name: asdict(phase) for name, phase in memory.phases.items()},
                "reserve": memory.reserve, "host": memory.host, "total": memory.total, "fits": self.fits,
            },
            "forward_flops": self.counts.forward_flops,
            "updates": updates,
            "cycle": {
                "fake_score_updates": ratio,
                "flops": self.cycle_flops,
                "forwards_per_sample": self.counts.cycle(ratio).flops
                / config.micro_batch_size / self.counts.forward_flops,
                **self.traffic,
                "arithmetic_seconds": arithmetic, "communication_seconds": communication,
            },
            "alternatives": [asdict(item) for item in self.alternatives],
        }  # fmt: skip


Load = Callable[[Sequence[str], int], Config]
"""The configuration with more overrides, for a number of ranks."""


class Planner:
    """Plans of one configuration and its variants; the network is built once, each variant counted once."""

    def __init__(self, load: Load, machine: Machine):
        self.load, self.machine = load, machine
        self._bases: dict[Any, tuple[Denoiser, str]] = {}
        self._counted: dict[Any, tuple[Counts, dict[str, list[int]]]] = {}

    def _count(self, config: Config, source_key: Any) -> tuple[Counts, dict[str, list[int]]]:
        persistence = ZeRO.from_config(config).persistence
        key = (config.model, config.micro_batch_size, Algorithm.from_config(config), persistence)
        if key not in self._counted:
            networks = build(config, self._bases[source_key][0])
            counts = count_updates(config, networks, persistence)
            sizes = {name: [p.numel() for p in group] for name, group in networks.parameters.items()}
            self._counted[key] = counts, sizes
        return self._counted[key]

    def plan(self, overrides: Sequence[str] = (), gpus: int | None = None) -> Plan:
        """The plan of a variant."""
        gpus = gpus or self.machine.gpus
        config = self.load(overrides, gpus)
        source_key = (config.model.kind, config.model.path, config.model.sample_size)
        if source_key not in self._bases:
            self._bases[source_key] = build_base(config.model)
        counts, sizes = self._count(config, source_key)
        machine = Machine(**{**asdict(self.machine), "gpus": gpus})
        memory = plan_memory(config, sizes, counts, reserve=machine.reserve)
        names = {name: sum(values) for name, values in sizes.items()}
        return Plan(config, machine, self._bases[source_key][1], counts, memory, traffic(config, sizes, counts), names)

    def advise(self, plan: Plan) -> list[Alternative]:
        """What would make a plan that does not fit smaller, each change alone, then those that keep the recipe."""
        found, kept = [], []
        for what, overrides, keeps in self._changes(plan.config):
            try:
                total = self.plan(overrides).memory.total
            except UserError:
                continue  # a combination that the configuration refuses
            if total < plan.memory.total:
                found.append(Alternative(what, total, total <= plan.machine.memory))
                kept += overrides if keeps else []
        if len(kept) > 1:
            total = self.plan(kept).memory.total
            found.append(Alternative("all of these that keep the recipe", total, total <= plan.machine.memory))
        return found + self._more_gpus(plan, kept)

    def _changes(self, config: Config) -> list[tuple[str, list[str], bool]]:
        changes: list[tuple[str, list[str], bool]] = []
        if not config.model.activation_checkpointing:
            changes.append(("model.activation_checkpointing true", ["model.activation_checkpointing=true"], True))
        if config.micro_batch_size > 1:
            one = ["train_micro_batch_size_per_gpu=1"]
            if config.deepspeed.get("gradient_accumulation_steps") is not None:
                steps = config.gradient_accumulation_steps * config.micro_batch_size
                one.append(f"gradient_accumulation_steps={steps}")
            changes.append(("train_micro_batch_size_per_gpu 1, accumulated to the same global batch", one, True))
        sharded = shards_weights(config.deepspeed)
        if sharded and config.run.gather != "module":
            changes.append(("run.gather module", ["run.gather=module"], True))
        if ZeRO.from_config(config).bucket > 50_000_000:
            changes.append(
                ("zero_optimization.reduce_bucket_size 5e7", ["zero_optimization.reduce_bucket_size=50000000"], True)
            )
        if not sharded:
            stage3 = ["zero_optimization.stage=3"]
            changes.append(("zero_optimization.stage 3, which divides the weights too", stage3, True))
        offload = ['zero_optimization.offload_optimizer={"device": "cpu"}']
        changes.append(("zero_optimization.offload_optimizer to the CPU", offload, True))
        if config.model.lora is None:
            changes.append(('model.lora {"rank": 64, "alpha": 8}', ['model.lora={"rank": 64, "alpha": 8}'], False))
        return changes

    def _more_gpus(self, plan: Plan, kept: list[str]) -> list[Alternative]:
        """The smallest number of GPUs, doubling, on which the configuration fits as it is."""
        gpus = plan.machine.gpus
        for _ in range(6):
            gpus *= 2
            try:
                more = self.plan((), gpus)
            except UserError:
                continue
            if more.fits:
                return [Alternative(f"{gpus} GPUs", more.memory.total, True)]
        return []


def make_plan(path: str, overrides: Sequence[str], machine: Machine) -> Plan:
    """The plan of a configuration file, with advice where it does not fit."""
    planner = Planner(lambda more, gpus: load_config(path, (*overrides, *more), gpus), machine)
    plan = planner.plan()
    if plan.fits:
        return plan
    return Plan(**{**plan.__dict__, "alternatives": planner.advise(plan)})


def refusal(plan: Plan) -> str:
    """The one message about a plan that does not fit."""
    need, have = plan.memory.total / GB, plan.machine.memory / GB
    fitting = [item for item in plan.alternatives if item.fits]
    ways = "; ".join(f"{item.change}: {item.total / GB:.1f} GB" for item in fitting)
    what = f"fits with {ways}" if fitting else "no single change brings it below; see the list above"
    return f"the plan does not fit: {need:.1f} GB a GPU of {have:.1f} GB; {what}."


def format_plan(plan: Plan) -> str:
    """Tables for people. GB is 1e9 bytes."""
    config, machine, memory = plan.config, plan.machine, plan.memory
    batch = (
        f"global batch {config.global_batch_size} = {config.micro_batch_size} x {machine.gpus} GPU(s)"
        f" x {config.gradient_accumulation_steps} accumulated"
    )
    stage = config.deepspeed["zero_optimization"]["stage"]
    how = f"run.gather {config.run.gather}" if stage == 3 else "weights whole on each GPU"
    lines = [f"model: {plan.source}", f"{batch}; ZeRO stage {stage}, {how}", "", "GB on each GPU"]
    lines += [_row(name, value / GB) for name, value in memory.states.items()]
    for name, phase in memory.phases.items():
        parts = f"activations {phase.activations / GB:.2f}, gathered weights {phase.gathered / GB:.2f}"
        parts += f", gradients {phase.gradients / GB:.2f}" if phase.gradients else ""
        step = f", optimizer step {phase.step / GB:.2f}" if phase.step else ""
        lines.append(_row(UPDATES[name], phase.peak / GB, parts + step))
    lines.append(_row("CUDA, workspaces, fragmentation", memory.reserve / GB, "an allowance"))
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines.append(_row("total, with the largest of these", memory.total / GB, f"{verdict} in {machine.memory / GB:.1f}"))
    if memory.host:
        lines.append(_row("in the host's memory", memory.host / GB, "each rank"))
    lines += ["", "full forwards (F) a sample", *_work(plan), ""]
    arithmetic, communication = plan.seconds
    lines += [
        f"a cycle gathers {plan.traffic['gathered'] / GB:.1f} GB and reduces {plan.traffic['reduced'] / GB:.1f} GB"
        f" (weights and gradients whole; a GPU receives {machine.gpus - 1}/{machine.gpus} of it)",
        f"a cycle takes about {max(arithmetic, communication):.2f} s, if communication overlaps, to "
        f"{arithmetic + communication:.2f} s: arithmetic {arithmetic:.2f} s at {machine.efficiency:.0%} of "
        f"{machine.peak_tflops:g} TFLOP/s, communication {communication:.2f} s at {machine.bandwidth:g} GB/s",
    ]
    if plan.alternatives:
        lines += ["", "GB on each GPU instead, with"]
        lines += [_row(item.change, item.total / GB, "fits" if item.fits else "") for item in plan.alternatives]
    return "\n".join(lines)


def _work(plan: Plan) -> list[str]:
    ratio, forward = plan.config.fake_score.ttur_ratio, plan.counts.forward_flops
    rows = [_row(text, plan.forwards(name)) for name, text in UPDATES.items()]
    cycle = plan.counts.cycle(ratio).flops / plan.config.micro_batch_size / forward
    remark = f"F = {forward / 1e12:.3f} TFLOP; {plan.cycle_flops / 1e12:.0f} TFLOP a GPU"
    rows.append(_row(f"cycle of 1:{ratio}", cycle, remark))
    return rows


def _row(name: str, value: float, remark: str = "") -> str:
    return f"  {name:<46}{value:>9.2f}  {remark}".rstrip()


def to_json(plan: Plan) -> str:
    return json.dumps(plan.to_dict(), indent=2)
