"""A whole 1:5 cycle, ours against DMD2's and FastGen's: counted FLOPs, operators, bytes, and time, in one run.

    python -m benchmarks.cycle                  # the tables of docs/performance.md
    python -m benchmarks.cycle --compile        # torch.compile too: many minutes of compiling

Ours is the library's losses on plain modules (no DeepSpeed, no data loading) with `passes: shared`, `clipped_step` and
an average of the generator's weights: 4 steps and the fake score's features against DMD2's, 1 step and the teacher's
features against FastGen's. All run as many rollout steps. Networks: the digits' UNet2DModel and a small UNet of SDXL's
shape. FLOPs are those of matrix products and convolutions (torch.utils.flop_counter), operators every call that
PyTorch's dispatcher sees, forward, backward, clipping, optimizer and average; "gathered" are the bytes of weights that
modules need around their forwards and backwards, each time anew, in 16 bits, as ZeRO-3's hooks gather them.
"""

from __future__ import annotations

import argparse
import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness
from benchmarks.cycle_baselines import DMD2, LIMIT, FastGen, Plain
from dmd2_fast.config import OptimizerConfig
from dmd2_fast.data.batch import Batch
from dmd2_fast.denoiser import Denoiser
from dmd2_fast.distillation import Algorithm, FakeScore, Networks, fake_score_loss, generate, generator_loss
from dmd2_fast.engine import frozen
from dmd2_fast.heads import GANHeads
from dmd2_fast.networks import build_network
from dmd2_fast.networks.swap import swap_operators
from dmd2_fast.networks.unet import UNet
from dmd2_fast.optimization import clipped_step, make_optimizer
from dmd2_fast.random import NoiseKey
from dmd2_fast.rollout import rollout_index
from dmd2_fast.schedules import DDPMSchedule

TTUR_RATIO = 5
EMA = 0.999
GUIDANCE = {"digits": 1.0, "sdxl-shaped": 8.0, "sdxl-shaped-wide": 8.0}
SEED = 1
"""of a cycle whose rollout indices are 3, 0, 1, 1, 3: 1.6 on average, of 1.5"""
STEPS = {"dmd2": (999, 749, 499, 249), "fastgen": (399,)}
BARS = {"FLOPs": {"dmd2": 0.88, "fastgen": 1.0}, "operators": {"dmd2": 0.65, "fastgen": 0.65}}
NETWORKS: dict[str, dict[str, Any]] = {
    "digits": {
        "kind": "unet2d",
        "patch_size": 2,
        "config": {
            "sample_size": 4,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": [64, 64],
            "layers_per_block": 1,
            "down_block_types": ["DownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "UpBlock2D"],
            "num_class_embeds": 11,
            "norm_num_groups": 16,
            "add_attention": False,
        },
    },
    "sdxl-shaped": {
        "kind": "unet2d_condition",
        "config": {
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "norm_num_groups": 16,
            "cross_attention_dim": 64,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "block_out_channels": [32, 64, 128],
            "layers_per_block": 1,
            "transformer_layers_per_block": [1, 1, 4],
            "attention_head_dim": [1, 2, 2],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 32,
            "projection_class_embeddings_input_dim": 64 + 6 * 32,
        },
    },
}
WIDE = {"block_out_channels": [96, 192, 384], "attention_head_dim": [2, 3, 6], "norm_num_groups": 32}
NETWORKS["sdxl-shaped-wide"] = {
    **NETWORKS["sdxl-shaped"],
    "config": {**NETWORKS["sdxl-shaped"]["config"], **WIDE},
}
"""Three times as wide: more of the time in convolutions and matrix products, as in SDXL, which is ten times as wide."""


def make_networks(name: str) -> tuple[list[UNet], GANHeads]:
    """Generator, fake score and teacher, all different, and a head; the same weights every time."""
    torch.manual_seed(0)
    networks = [build_network(NETWORKS[name]).eval() for _ in range(3)]
    networks[2].requires_grad_(False)
    return networks, GANHeads((networks[0].feature_shape("mid"),))


def make_batch(network: UNet, size: int) -> Batch:
    torch.manual_seed(1)
    condition = {
        name: torch.randn(size, *[77 if n is None else n for n in shape])
        for name, shape in network.condition_shapes.items()
    }
    if "class_labels" in condition:
        condition["class_labels"] = torch.arange(size) % 10
    if "time_ids" in condition:
        condition["time_ids"] = torch.tensor([[128.0, 128, 0, 0, 128, 128]]).expand(size, 6)
    return Batch(torch.rand(size, *network.image_shape) * 2 - 1, condition, torch.arange(size))


def indices(steps: tuple[int, ...]) -> list[int]:
    """The rollout indices that ours draws in the cycle's iterations."""
    ids = torch.zeros(1, dtype=torch.int64)
    return [int(rollout_index(len(steps), "batch", ids, NoiseKey(SEED, i))) for i in range(TTUR_RATIO)]


class Ours:
    """The library's cycle on plain modules.

    dtype bf16: 16-bit weights beside f32 ones that the optimizer and the average keep, as DeepSpeed has them.
    """

    def __init__(self, name: str, rival: str, *, fused=True, dtype=torch.float32, channels_last=False, compiled=False):
        networks, heads = make_networks(name)
        for network in networks:
            if fused:
                swap_operators(network.unet)
            network.channels_last = channels_last
            if channels_last:
                network.to(memory_format=torch.channels_last)
            if compiled:
                network.compile_blocks()
        self.algorithm = Algorithm(
            steps=STEPS[rival], guidance_scale=GUIDANCE[name], passes="shared",
            features="fake_score" if rival == "dmd2" else "teacher",
        )  # fmt: skip
        schedule = DDPMSchedule()
        generator, fake, teacher = (Denoiser(network.to(dtype), schedule, "epsilon") for network in networks)
        fake_score = FakeScore(fake, heads.to(dtype), self.algorithm.own_levels)
        self.networks = Networks(generator, fake_score, teacher, schedule, "epsilon", teacher.unconditional)
        self.trained = {"generator": Trained(generator), "fake_score": Trained(fake_score)}
        self.average = [master.detach().clone() for master in self.trained["generator"].masters]

    def cycle(self, batch: Batch, indices: list[int]) -> None:
        for i in range(len(indices)):
            key = NoiseKey(SEED, i)
            if i == 0:
                with frozen(self.networks.fake_score):
                    loss, x, _ = generator_loss(self.networks, self.algorithm, batch, key)
                    self.trained["generator"].update(loss)
                with torch.no_grad():
                    torch._foreach_lerp_(self.average, self.trained["generator"].masters, 1 - EMA)
            else:
                with torch.no_grad():
                    x = generate(self.networks, self.algorithm, batch, key)
            loss, _ = fake_score_loss(self.networks, self.algorithm, batch, x, key)
            self.trained["fake_score"].update(loss)


class Trained:
    """A module's weights, the f32 ones the optimizer keeps where they are of 16 bits, and the optimizer."""

    def __init__(self, module: nn.Module, lr: float = 1e-6):
        self.weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.has_masters = any(weight.dtype != torch.float32 for weight in self.weights)
        self.masters = [w.detach().float().requires_grad_() for w in self.weights] if self.has_masters else self.weights
        self.optimizer = make_optimizer(self.masters, OptimizerConfig(lr=lr), on_cpu=True)

    def update(self, loss: Tensor) -> None:
        loss.backward()
        if not self.has_masters:
            clipped_step(self.optimizer, LIMIT)
            return
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad = weight.grad.float()
            weight.grad = None
        clipped_step(self.optimizer, LIMIT)
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)


def make_rival(name: str, rival: str) -> DMD2 | FastGen:
    (generator, fake, teacher), head = make_networks(name)
    abar = DDPMSchedule().coefficients(torch.arange(1000))[0] ** 2
    plain = Plain(generator, fake, teacher, head, abar, STEPS[rival], GUIDANCE[name], 5e-3, 1e-2)
    return DMD2(plain) if rival == "dmd2" else FastGen(plain)


# --- counting ---------------------------------------------------------------------------------------------------------


class Counter(TorchDispatchMode):
    """Operators that the dispatcher sees, and the most bytes that tensors made meanwhile hold at once."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = self.bytes = self.peak = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self._hold((args, kwargs), made=False)
        result = function(*args, **(kwargs or {}))
        self.operators += 1
        self._hold(result, made=True)
        return result

    def _hold(self, tensors: Any, made: bool) -> None:
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, Tensor) or (key := (storage := tensor.untyped_storage())._cdata) in self.alive:
                continue
            num_bytes = storage.nbytes() if made else 0  # what comes in unseen was there before
            self.alive.add(key)
            self.bytes += num_bytes
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._release, key, num_bytes)

    def _release(self, key: int, num_bytes: int) -> None:
        self.alive.discard(key)
        self.bytes -= num_bytes


def gathered_bytes(cycle: Callable[[], Any], modules: list[nn.Module]) -> int:
    """16-bit bytes of weights that modules of these networks need around their forwards and backwards in a cycle."""
    total, hooks = 0, []
    for root in modules:
        for module in root.modules():
            size = 2 * sum(parameter.numel() for parameter in module.parameters(recurse=False))

            def count(*_: Any, size: int = size) -> None:
                nonlocal total
                total += size

            if size:
                hooks += [module.register_forward_pre_hook(count), module.register_full_backward_pre_hook(count)]
    cycle()
    for hook in hooks:
        hook.remove()
    return total


def count(contestant: Any, batch: Batch, rounds: list[int]) -> dict[str, float]:
    """FLOPs, operators, peak bytes beyond what lives between cycles, and gathered bytes of one cycle."""
    contestant.cycle(batch, rounds)
    flops, counter = FlopCounterMode(display=False), Counter()
    with flops:
        contestant.cycle(batch, rounds)
    with counter:
        contestant.cycle(batch, rounds)
    nets = contestant.networks if isinstance(contestant, Ours) else contestant.nets
    modules = [item for item in vars(nets).values() if isinstance(item, nn.Module)]
    return {
        "FLOPs": flops.get_total_flops(),
        "operators": counter.operators,
        "peak": counter.peak,
        "gathered": gathered_bytes(lambda: contestant.cycle(batch, rounds), modules),
    }


# --- time -------------------------------------------------------------------------------------------------------------


def interleaved(cycles: dict[str, Callable[[], Any]], rounds: int, now: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each cycle, round after round in turn; a first round, which allocates and compiles, is not timed."""
    times: dict[str, list[float]] = {name: [] for name in cycles}
    names = list(cycles)
    for i in range(rounds + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = now()
            cycles[name]()
            if i:
                times[name].append(now() - start)
    return times


VARIANTS: dict[str, dict[str, Any]] = {
    "f32": {},
    "f32, diffusers' operators": {"fused": False},
    "f32, channels_last": {"channels_last": True},
    "bf16": {"dtype": torch.bfloat16},
    "bf16, channels_last": {"dtype": torch.bfloat16, "channels_last": True},
}
COMPILED = {"bf16, channels_last, compiled": {"dtype": torch.bfloat16, "channels_last": True, "compiled": True}}


def timings(name: str, size: int, rounds: int, variants: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Rows of the table: a variant of ours, its time, and how many times as long each rival takes, in eager f32."""
    batch = make_batch(make_networks(name)[0][0], size)
    now, rows = harness.quiet_clock("cpu"), []
    contestants: dict[str, tuple[Any, list[int]]] = {}
    for rival, steps in STEPS.items():
        contestants[rival] = make_rival(name, rival), indices(steps)
        for variant, options in variants.items():
            if rival == "dmd2" or variant == "f32":
                contestants[f"{variant} against {rival}"] = Ours(name, rival, **options), indices(steps)
    cycles = {key: (lambda c=c, i=i: c.cycle(batch, i)) for key, (c, i) in contestants.items()}
    times = interleaved(cycles, rounds, now)
    for variant in variants:
        ratios = [
            f"{harness.ratio(times[rival], times[key]):.2f}" if (key := f"{variant} against {rival}") in times else ""
            for rival in STEPS
        ]
        rows.append([name, str(size), variant, harness.duration(min(times[f"{variant} against dmd2"])), *ratios])
    return rows


def counts(name: str, size: int) -> list[list[str]]:
    """Rows of the table: what is counted, ours and as a share of each rival's."""
    batch, rows = make_batch(make_networks(name)[0][0], size), []
    for rival, steps in STEPS.items():
        ours, theirs = (count(c, batch, indices(steps)) for c in (Ours(name, rival), make_rival(name, rival)))
        values = [f"{ours[key] / theirs[key]:.3f}" for key in ours]
        exact = [f"{ours['FLOPs'] / 1e9:.2f} G", f"{ours['operators']:.0f}"]
        exact += [f"{ours[key] / 2**20:.1f} MiB" for key in ("peak", "gathered")]
        rows.append([name, str(size), rival, *[f"{a} ({b})" for a, b in zip(exact, values, strict=True)]])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["digits", "sdxl-shaped"], choices=list(NETWORKS))
    parser.add_argument("--batches", nargs="+", type=int, default=[4, 16])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--no-counts", action="store_true", help="times alone")
    parser.add_argument("--compile", action="store_true", help="torch.compile too: minutes a network and batch")
    args = parser.parse_args()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    harness.keep_memory()
    variants = {name: VARIANTS[name] for name in args.variants} | (COMPILED if args.compile else {})
    if not args.no_counts:
        header = ["network", "batch", "against", "FLOPs", "operators", "peak memory", "gathered"]
        rows = [row for name in args.networks for row in counts(name, min(args.batches))]
        print(harness.markdown(header, rows) + "\n", flush=True)
    header = ["network", "batch", "ours", "a cycle", "times as fast as DMD2", "as FastGen"]
    sizes = [(name, size) for name in args.networks for size in args.batches]
    rows = [row for name, size in sizes for row in timings(name, size, args.rounds, variants)]
    print(harness.markdown(header, rows))
    environment = harness.environment("cpu")
    print("\n" + ", ".join(f"{key} {value}" for key, value in environment.items()))


if __name__ == "__main__":
    main()
