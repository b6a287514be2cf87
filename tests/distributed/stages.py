"""worker.py's scenario of ZeRO's stages 1 and 2: runs, one that is stopped and taken up again, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from cases import APPROXIMATE, accumulate, case
from exact_r1 import engine_gradients
from lora_oracle import LORA, start_apart

from dmd2_fast.config import load_config
from dmd2_fast.ranks import init_distributed
from dmd2_fast.runs import read_metrics
from dmd2_fast.trainer import Trainer, main

SPLIT = accumulate(2, 2)
EXACT = {"kind": "exact", "weight": 5.0}


def zero(stage: int, **keys) -> dict:
    return {"zero_optimization": {"stage": stage, **keys}}


CASES = {
    "1-fake-score": case(
        gather="network", passes="independent", guidance=2.0, r1=APPROXIMATE, iterations=20,
        deepspeed={**zero(1), **SPLIT},
    ),
    "1-teacher": case(
        gather="module", passes="shared", features="teacher", index="batch", iterations=5, clipping=0.0,
        deepspeed={**zero(1, overlap_comm=True), **SPLIT},
    ),
    "2-fake-score": case(
        gather="rollout", passes="shared", index="batch", r1=APPROXIMATE, iterations=5,
        deepspeed={**zero(2, parameter_alignment=True, reduce_bucket_size=5000), **SPLIT},
    ),
    "2-teacher": case(
        gather="network", passes="independent", features="teacher", guidance=2.0, iterations=20,
        deepspeed={**zero(2), **SPLIT},
    ),
    "2-offload": case(
        gather="network", passes="shared", iterations=4,
        deepspeed=zero(2, offload_optimizer={"device": "cpu"}, reduce_scatter=False),
    ),
    "1-exact-r1": case(
        gather="network", passes="independent", r1=EXACT, iterations=3, deepspeed={**zero(1), **SPLIT},
    ),
    "2-exact-r1": case(
        gather="network", passes="shared", features="teacher", r1=EXACT, iterations=3, deepspeed={**zero(2), **SPLIT},
    ),
}  # fmt: skip
for name in ("1-exact-r1", "2-exact-r1"):
    CASES[name].section["model"] = {"fused_operators": False}
SPOILED = {"1-spoiled": zero(1), "2-spoiled": {**zero(2), **SPLIT}}
RESUMED = {"1": zero(1), "2": zero(2, round_robin_gradients=True)}
ADAPTERS = case(gather="network", passes="shared", guidance=2.0, iterations=4, deepspeed={**zero(2), **SPLIT})
EXACT_R1 = [(stage, steps) for stage in (1, 2) for steps in (1, 2)]


def adapters_section() -> dict:
    return {**ADAPTERS.section, "model": {"lora": LORA, "activation_checkpointing": True}}


def rank_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """All weights, and this rank's part of what else the next iteration depends on."""
    found = {f"ema {key}": value.clone() for key, value in trainer.ema.shards.items()}
    for name in ("generator", "fake_score"):
        engine = getattr(trainer.engines, name)
        found |= {f"{name} {key}": value.detach().clone() for key, value in engine.module.named_parameters()}
        (master,) = engine.optimizer.single_partition_of_fp32_groups
        (state,) = engine.optimizer.optimizer.state.values()
        found[f"{name} master"] = master.detach().clone()
        found |= {f"{name} optimizer {key}": torch.as_tensor(value).clone() for key, value in state.items()}
    return found


def elements(trainer: Trainer) -> dict[str, tuple[int, int]]:
    """What -> (elements on this rank, elements in all)."""
    state, found = rank_state(trainer), {}
    for name in ("generator", "fake_score"):
        total = sum(p.numel() for p in getattr(trainer.engines, name).module.parameters())
        found[f"{name} master"] = (state[f"{name} master"].numel(), total)
        found |= {
            f"{name} {key}": (state[f"{name} optimizer {key}"].numel(), total) for key in ("exp_avg", "exp_avg_sq")
        }
        if name == "generator":
            found["ema"] = (sum(value.numel() for key, value in state.items() if key.startswith("ema ")), total)
    return found


def stages(folder: Path, options: dict) -> None:
    """All of it on each rank."""
    from worker import run_case, spoil

    rank = init_distributed()

    def keep(name: str, value) -> None:
        torch.save(value, folder / f"{name}-rank{rank.rank}.pt")

    for name in CASES:
        seen: list[Trainer] = []
        result = run_case(rank, folder / f"{name}.json", prepare=seen.append)
        keep(name, {**result, "elements": elements(seen[0])})
    for name in SPOILED:
        spoiled = [spoil("fake_score", {3}, 1), spoil("generator", {4}, 1, float("inf"))]
        keep(name, run_case(rank, folder / f"{name}.json"))
        for item in spoiled:
            item.undo()
    for name in RESUMED:
        keep(f"resumed-{name}", resumed(folder, name, rank))
    keep("refused", refused(folder, rank))
    start_apart()
    keep("adapters", run_case(rank, folder / "adapters.json"))
    for stage, steps in EXACT_R1:
        config = load_config(folder / f"r1-{stage}-{steps}.json", (), rank.world_size)
        keep(f"r1-{stage}-{steps}", engine_gradients(config, rank.rank, rank.world_size))


def resumed(folder: Path, name: str, rank) -> dict:
    """A run through, and one that is stopped twice: what they hold at the end, and the lines they wrote."""
    from worker import make_trainer, stop_at

    found = {}
    for kind, stops in (("through", [None]), ("stopped", [3, 5, None])):
        config, reached = load_config(folder / f"{kind}-{name}.json", (), rank.world_size), []
        for stop in stops:
            trainer = make_trainer(config, rank)
            reached.append(trainer.iteration)
            if stop is not None:
                stop_at(trainer, stop)
            trainer.train()
            trainer.close()
        trainer.export()
        found[kind] = {"state": rank_state(trainer), "lines": read_metrics(trainer.run.metrics), "reached": reached}
    return found


def refused(folder: Path, rank) -> dict[str, int]:
    """Exit codes for copies of a run's folder: a file cut off that one rank or all read, another number of ranks."""
    if rank.is_main:
        for name in ("optimizer", "weights", "ranks"):
            copied = shutil.copytree(folder / "through-2", folder / name)
            (copied / "generator.safetensors").unlink()
            (checkpoint,) = copied.glob("checkpoints/iteration-*")
            if name == "ranks":
                state = json.loads((checkpoint / "trainer.json").read_text())
                (checkpoint / "trainer.json").write_text(json.dumps({**state, "world_size": 1}))
                continue
            end = "_rank_1_mp_rank_00_optim_states.pt" if name == "optimizer" else "mp_rank_00_model_states.pt"
            (file,) = checkpoint.glob(f"fake_score/*/*{end}")
            file.write_bytes(file.read_bytes()[:-2000])
    torch.distributed.barrier()
    return {name: main(["--config", str(folder / f"{name}.json")]) for name in ("optimizer", "weights", "ranks")}
