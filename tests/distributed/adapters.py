"""worker.py's scenario of adapters on one base: what it trains, and what it looks at afterwards."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from lora_oracle import start_apart

from dmd2_fast.config import load_config
from dmd2_fast.networks import load_denoiser
from dmd2_fast.ranks import init_distributed
from dmd2_fast.trainer import Trainer


def watch_updates(trainer: Trainer, found: list) -> None:
    """(the network whose update it was, the networks that moved in it), one for each update."""
    from worker import weights

    for name in ("generator", "fake_score"):
        original = getattr(trainer, f"_update_{name}")

        def update(*arguments, name=name, original=original):
            before = weights(trainer)
            result = original(*arguments)
            after = weights(trainer)
            del before["ema"], after["ema"]
            moved = [n for n in before if any(not after[n][key].equal(value) for key, value in before[n].items())]
            found.append((name, moved))
            return result

        setattr(trainer, f"_update_{name}", update)


def teacher_alone(trainer: Trainer) -> dict[str, bool]:
    """Which networks, as the losses see them, give the very bits of a teacher that was never near an adapter."""
    plain = load_denoiser(trainer.config.model).eval()
    torch.manual_seed(0)
    inputs = (
        torch.randn(2, *plain.network.image_shape),
        torch.tensor([0.5, 3.0]),
        {"class_labels": torch.tensor([1, 2])},
    )
    with torch.no_grad(), trainer.engines.for_generator() as (networks, rollout):
        expected = plain(*inputs)[0]
        outputs = {"generator": rollout, "fake_score": networks.fake_score, "teacher": networks.teacher}
        return {name: torch.equal(network(*inputs)[0], expected) for name, network in outputs.items()}


def adapters_at_rest(trainer: Trainer) -> dict[str, tuple[int, int]]:
    """What -> (elements or bytes on this rank, in all or at most)."""
    engines = trainer.engines
    base = list(engines.base_parameters.values())
    total = sum(parameter.ds_numel for parameter in base)
    own = {id(p): p for engine in (engines.generator, engines.fake_score) for p in engine.module.parameters()}
    trained = sum(parameter.ds_numel for parameter in own.values())
    return {
        "base": (sum(p.ds_tensor.numel() + p.numel() for p in base), total),
        "adapters and head": (sum(p.ds_tensor.numel() + p.numel() for p in own.values()), trained),
    }


def whole_of_base(trainer: Trainer) -> list[tuple[int, ...]]:
    """Shapes of live tensors that are as large and shaped as a weight of the base of more than 2,000 elements."""
    shapes = {tuple(p.ds_shape) for p in trainer.engines.base_parameters.values() if p.ds_numel > 2000}
    assert shapes
    gc.collect()
    alive = (value for value in gc.get_objects() if type(value) in (torch.Tensor, torch.nn.Parameter))
    return [tuple(value.shape) for value in alive if value.device.type == "cpu" and tuple(value.shape) in shapes]


def live_bytes() -> int:
    """Of all tensors in this process that Python knows of, each storage once."""
    gc.collect()
    live = [value for value in gc.get_objects() if type(value) in (torch.Tensor, torch.nn.Parameter)]
    storages = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in live if v.device.type == "cpu"}
    return sum(storages.values())


def adapters(folder: Path, options: dict) -> None:
    """Runs with adapters that start apart; then one that is stopped and taken up again."""
    from worker import make_trainer, run_case, stop_at, whole_state

    rank = init_distributed()
    start_apart()
    for name in options["runs"]:
        seen: list[Trainer] = []
        updates: list = []
        before, built = live_bytes(), []

        def prepare(trainer, seen=seen, updates=updates, before=before, built=built):
            seen.append(trainer)
            built.append(live_bytes() - before)
            watch_updates(trainer, updates)

        result = run_case(rank, folder / f"{name}.json", prepare=prepare)
        result |= {"bytes": built[0], "whole": whole_of_base(seen[0])}
        result |= {"updates of": updates, "alone": teacher_alone(seen[0]), "at rest": adapters_at_rest(seen[0])}
        result["state"] = whole_state(seen[0])
        torch.save(result, folder / f"{name}-rank{rank.rank}.pt")
    config = load_config(folder / "stopped.json", (), rank.world_size)
    for stop in (*options["stops"], None):
        trainer = make_trainer(config, rank)
        if stop is not None:
            stop_at(trainer, stop)
        trainer.train()
        trainer.close()
    torch.save({"state": whole_state(trainer)}, folder / f"stopped-rank{rank.rank}.pt")
