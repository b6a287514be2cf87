"""What one rank does for test_sdxl.py: the published configurations on a tiny pipeline, with sizes overridden."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

import dmd2_fast.trainer as trainer_module
from dmd2_fast.config import load_config
from dmd2_fast.preflight import check_inputs
from dmd2_fast.ranks import init_distributed, on_main
from dmd2_fast.runs import RunFolder, open_run, read_metrics
from dmd2_fast.trainer import Trainer, main

ROOT = Path(__file__).resolve().parent.parent.parent
UNSHARDED = ("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance")


def sizes(folder: Path, run: str, iterations: int, *more: str) -> list[str]:
    """Overrides of sizes and paths alone; ZeRO's thresholds are sizes, too: tiny networks lie below the defaults."""
    return [
        f"model.path={folder / 'pipeline'}", f"data.path={folder / 'data'}", f"run.folder={folder / run}",
        "model.sample_size=8", "train_batch_size=4", "train_micro_batch_size_per_gpu=1",
        f"run.iterations={iterations}", "run.log_interval=1", "run.progress=false",
        *[f"zero_optimization.{key}=0" for key in UNSHARDED], *more,
    ]  # fmt: skip


def at_rest(trainer: Trainer) -> dict[str, tuple[int, int]]:
    """Network -> (elements of its weights on this rank, in all); what its optimizer holds likewise."""
    found = {}
    for name in ("generator", "fake_score", "teacher"):
        engine = getattr(trainer.engines, name)
        parameters = list(engine.module.parameters())
        total = sum(parameter.ds_numel for parameter in parameters)
        found[name] = (sum(p.ds_tensor.numel() + p.numel() for p in parameters), total)
        if name != "teacher":
            trained = sum(parameter.ds_numel for parameter in parameters if parameter.requires_grad)
            states = engine.optimizer.optimizer.state.values()
            held = sum(v.numel() for state in states for v in state.values() if torch.is_tensor(v) and v.numel() > 1)
            found[f"{name} optimizer"] = (held, 2 * trained)
    shards = trainer.ema.shards.values()
    found["ema"] = (sum(value.numel() for value in shards), found["generator"][1])
    return found


def runs(folder: Path, options: dict[str, Any]) -> None:
    """Each of `options`: name -> (configuration file, overrides)."""
    from worker import record_first_gradients, weights

    rank = init_distributed()
    for name, (file, overrides) in options.items():
        config = load_config(ROOT / file, overrides, rank.world_size)
        check_inputs(config)
        on_main(rank, lambda config=config: open_run(config))
        trainer = Trainer(config, RunFolder(config.run.folder), rank)
        start, gradients = weights(trainer), record_first_gradients(trainer)
        finished = trainer.train()
        trainer.export()
        result = {"finished": finished, "start": start, "gradients": gradients, "at rest": at_rest(trainer)}
        result |= {"losses": read_metrics(trainer.run.metrics), "weights": weights(trainer)}
        trainer.close()
        torch.save(result, folder / f"{name}-rank{rank.rank}.pt")


def command(folder: Path, options: dict[str, Any]) -> int:
    """train.py's own main, as the launcher calls it."""
    arguments = [word for override in options["set"] for word in ("--set", override)]
    code = main(["--config", str(ROOT / options["config"]), "--local_rank", os.environ["LOCAL_RANK"], *arguments])
    assert trainer_module.Trainer is Trainer
    return code
