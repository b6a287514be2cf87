"""What a real run holds, computes and sends, measured on each rank for test_planned.py to compare with the plan."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

import dmd2_fast.trainer as trainer_module
from dmd2_fast.config import load_config
from dmd2_fast.config_deepspeed import shards_weights
from dmd2_fast.data.batch import Batch
from dmd2_fast.ranks import init_distributed, on_main
from dmd2_fast.runs import RunFolder, open_run
from dmd2_fast.trainer import Trainer

SCALARS = 64
"""Bytes of an all-reduce that is about norms and flags, at most."""


class Loader:
    """SDXL-shaped batches of noise, in place of a data folder."""

    name, dataset = "noise", None

    def __init__(self, config, rank: int):
        self.config, self.rank = config, rank

    def __iter__(self):
        rows, generator = self.config.micro_batch_size, torch.Generator().manual_seed(self.rank)
        while True:
            yield [
                Batch(
                    torch.randn(rows, 4, 16, 16, generator=generator),
                    {
                        "prompt_embeds": torch.randn(rows, 77, 32, generator=generator),
                        "pooled_prompt_embeds": torch.randn(rows, 16, generator=generator),
                        "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]]).repeat(rows, 1),
                    },
                    torch.arange(rows) + rows * (i + self.rank * self.config.gradient_accumulation_steps),
                )
                for i in range(self.config.gradient_accumulation_steps)
            ]

    def close(self) -> None:
        pass


def make_trainer(config, rank) -> Trainer:
    on_main(rank, lambda: open_run(config))
    with (
        mock.patch.object(trainer_module, "make_loader", lambda *_, **__: Loader(config, rank.rank)),
        mock.patch.object(trainer_module, "check_data", lambda *_: None),
        mock.patch.object(trainer_module, "read_unconditional", lambda *_: {"prompt_embeds": torch.zeros(77, 32)}),
    ):
        return Trainer(config, RunFolder(config.run.folder), rank)


class Measure:
    """Counters that are filled under the name of the part that runs: generator, rollout or fake_score."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.part = trainer, ""
        self.rows: Counter = Counter()
        self.gathered, self.reduced = Counter(), Counter()
        engines, hooked = trainer.engines, set()
        for name in ("generator", "fake_score", "teacher"):
            module = getattr(engines, name).module
            for part in (module, getattr(engines.whole.get(module), "module", module)):
                unet = getattr(part, "denoiser", part).network.unet
                if unet not in hooked:
                    self._hook(name, unet)
                hooked.add(unet)

    def _hook(self, name: str, unet: torch.nn.Module) -> None:
        for half, block in (("encoder", unet.down_blocks[-1]), ("decoder", unet.up_blocks[0])):

            def after(_, inputs, output, half=half):
                first = output[0] if isinstance(output, tuple) else output
                network = "rollout" if name == "generator" and not torch.is_grad_enabled() else name
                key = (self.part, network, half)
                self.rows[key] += len(first)
                if first.requires_grad:
                    part = self.part
                    first.register_hook(lambda grad: self.rows.update({(part, network, f"{half}_backward"): len(grad)}))

            block.register_forward_hook(after)

    @contextlib.contextmanager
    def traffic(self):
        """Bytes of the whole tensors that all-gathers and reduce-scatters, DeepSpeed's and ours, put together."""
        import deepspeed.comm.comm

        depth = [0]

        def count(owner, name: str, counter: Counter, times: int = 1, least: int = 0):
            original = getattr(owner, name)

            def call(*args, **kwargs):
                tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor | list)]
                if not depth[0]:  # one of them may call another
                    size = max(map(bytes_of, tensors))
                    counter[self.part] += times * size * (size > least)
                depth[0] += 1
                try:
                    return original(*args, **kwargs)
                finally:
                    depth[0] -= 1

            return mock.patch.object(owner, name, call)

        backend = deepspeed.comm.comm.cdb
        with contextlib.ExitStack() as stack:
            for name in ("all_gather_into_tensor", "all_gather"):
                stack.enter_context(count(dist, name, self.gathered))
            for name in ("all_gather_into_tensor", "all_gather", "all_gather_coalesced"):
                stack.enter_context(count(backend, name, self.gathered))
            for name in ("reduce_scatter_tensor", "reduce_scatter"):
                stack.enter_context(count(backend, name, self.reduced))
            if not shards_weights(self.trainer.config.deepspeed):  # where it is gradients that go to all ranks
                stack.enter_context(count(backend, "all_reduce", self.reduced, times=2, least=SCALARS))
            yield

    @contextlib.contextmanager
    def within(self, part: str):
        self.part = part
        yield
        self.part = ""

    def wrap(self, name: str, part: str) -> None:
        original = getattr(self.trainer, name)

        def call(*args):
            with self.within(part):
                return original(*args)

        setattr(self.trainer, name, call)


def held_bytes(trainer: Trainer) -> dict[str, int]:
    """Bytes of states on this rank between iterations."""
    engines, found = trainer.engines, Counter()
    if not shards_weights(trainer.config.deepspeed):
        return held_beside_whole_weights(trainer)
    for name in ("generator", "fake_score", "teacher"):
        engine = getattr(engines, name)
        for p in engine.module.parameters():
            found["weights"] += bytes_of(p.ds_tensor) + (bytes_of(p.data) if p.ds_persist else 0)
        if name == "teacher":
            continue
        optimizer = engine.optimizer
        found["gradients"] += bytes_of(optimizer.grad_partitions_flat_buffer)
        found["optimizer"] += sum(map(bytes_of, optimizer.fp32_partitioned_groups_flat))
        for state in optimizer.optimizer.state.values():
            found["optimizer"] += sum(bytes_of(v) for v in state.values() if torch.is_tensor(v) and v.numel() > 1)
        found["buckets"] += sum(bytes_of(bucket.buffer) for bucket in optimizer.ipg_buckets.values())
    if trainer.ema is not None:
        found["ema"] = sum(map(bytes_of, trainer.ema.shards.values()))
    return dict(found)


def held_beside_whole_weights(trainer: Trainer) -> dict[str, int]:
    """The same at stages 1 and 2: all weights, and this rank's part of the rest."""
    engines, found = (
        trainer.engines,
        Counter(gradients=0, buckets=0, ema=sum(map(bytes_of, trainer.ema.shards.values()))),
    )
    for engine in (engines.generator, engines.fake_score, engines.teacher):
        found["weights"] += sum(map(bytes_of, engine.module.parameters()))
    for engine in (engines.generator, engines.fake_score):
        optimizer = engine.optimizer
        found["gradients"] += sum(bytes_of(p.grad) for p in engine.module.parameters() if p.grad is not None)
        found["buckets"] += sum(map(bytes_of, [bucket.buffer for bucket in optimizer.ipg_buckets.values()]))
        (master,), (state,) = optimizer.single_partition_of_fp32_groups, optimizer.optimizer.state.values()
        found["optimizer"] += sum(map(bytes_of, [master, state["exp_avg"], state["exp_avg_sq"]]))
    return dict(found)


def watch_gradients(trainer: Trainer, found: dict[str, int]) -> None:
    """Fills in, at stages 1 and 2, the bytes of each update's gradients when its step comes and its largest buckets."""
    for name in ("generator", "fake_score"):
        engine = getattr(trainer.engines, name)

        def step(engine=engine, name=name, original=engine.step):
            if engine.is_gradient_accumulation_boundary():
                kept = [value for values in engine.optimizer.averaged_gradients.values() for value in values]
                found[f"{name} gradients"] = bytes_of(kept)
            return original()

        def average(*args, name=name, optimizer=engine.optimizer, original=engine.optimizer.average_tensor):
            found[f"{name} buckets"] = sum(bytes_of(bucket.buffer) for bucket in optimizer.ipg_buckets.values())
            return original(*args)

        engine.step, engine.optimizer.average_tensor = step, average


def bytes_of(value: torch.Tensor | list) -> int:
    return sum(map(bytes_of, value)) if isinstance(value, list) else value.numel() * value.element_size()


def planned(folder: Path, options: dict) -> None:
    """One cycle of each run."""
    rank = init_distributed()
    for name in options["runs"]:
        trainer = make_trainer(load_config(folder / f"{name}.json", (), rank.world_size), rank)
        measure, batches, gradients = Measure(trainer), iter(trainer.loader), {}
        if not shards_weights(trainer.config.deepspeed):
            watch_gradients(trainer, gradients)
        measure.wrap("_update_generator", "generator")
        measure.wrap("_update_fake_score", "fake_score")
        with measure.traffic():
            for _ in range(trainer.config.fake_score.ttur_ratio):
                measure.part = "rollout"
                trainer.step(next(batches))
                trainer.iteration += 1
        result = {
            "held": held_bytes(trainer), "rows": dict(measure.rows), "gathered": dict(measure.gathered),
            "reduced": dict(measure.reduced), "in an update": gradients,
        }  # fmt: skip
        torch.save(result, folder / f"{name}-rank{rank.rank}.pt")
        trainer.close()
        del trainer
