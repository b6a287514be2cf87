"""What one rank does in a test: `worker.py SCENARIO FOLDER [JSON]`, started by ranks.py in a launcher's environment."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import sdxl
import text_cases
import torch
from adapters import adapters
from cases import CASES
from plain_loop import write_config
from planned import planned
from stages import stages
from variant_cases import VARIANTS

import dmd2_fast.failures
import dmd2_fast.trainer as trainer_module
from dmd2_fast.config import load_config
from dmd2_fast.engine import Engines, full_state_dict
from dmd2_fast.errors import DataError
from dmd2_fast.export import FewStepGenerator
from dmd2_fast.ranks import init_distributed, on_main, quiet_libraries
from dmd2_fast.runs import RunFolder, open_run, read_metrics
from dmd2_fast.traffic import counted
from dmd2_fast.trainer import Trainer, main


def make_trainer(config, rank) -> Trainer:
    on_main(rank, lambda: open_run(config))
    return Trainer(config, RunFolder(config.run.folder), rank)


def weights(trainer: Trainer) -> dict[str, dict[str, torch.Tensor]]:
    """Whole, on every rank."""
    engines = trainer.engines
    found = {name: full_state_dict(getattr(engines, name)) for name in ("generator", "fake_score")}
    return found if trainer.ema is None else {**found, "ema": trainer.ema.full_state_dict()}


def record_first_gradients(trainer: Trainer) -> dict[str, dict[str, torch.Tensor]]:
    """Filled, before clipping, when each engine first steps at an accumulation boundary."""
    from deepspeed.utils import safe_get_full_grad

    found: dict[str, dict[str, torch.Tensor]] = {}
    for name in ("generator", "fake_score"):
        engine = getattr(trainer.engines, name)

        def step(name=name, engine=engine, original=engine.step):
            if name not in found and engine.is_gradient_accumulation_boundary():
                parameters = engine.module.named_parameters()
                found[name] = {key: safe_get_full_grad(parameter).clone() for key, parameter in parameters}
            return original()

        engine.step = step
    return found


def run_case(rank, path: Path, iterations: int | None = None, prepare=None) -> dict:
    """Train; gradients, weights and metrics lines."""
    trainer = make_trainer(load_config(path, (), rank.world_size), rank)
    if prepare is not None:
        prepare(trainer)
    start, gradients = weights(trainer), record_first_gradients(trainer)
    finished = trainer.train()
    result = {
        "finished": finished, "start": start, "weights": weights(trainer), "gradients": gradients,
        "losses": read_metrics(trainer.run.metrics), "skipped": trainer.skipped, "loader": trainer.loader.name,
        "updates": trainer.generator_updates,
    }  # fmt: skip
    labels = torch.arange(10)
    with trainer.averaged(), trainer.engines.bare(trainer.engines.generator) as denoiser:
        result["samples"] = FewStepGenerator(denoiser, trainer.algorithm.steps).sample(labels, seed=5)
    trainer.export()
    result["weights after"] = weights(trainer)
    trainer.close()
    return result


@contextlib.contextmanager
def frozen_engine():
    """The mistake DESIGN.md warns of: the generator's loss goes through the fake score's ENGINE."""
    original = Engines._networks

    def networks(self, generator, fake_score, teacher):
        wrong = generator is self.generator
        return original(self, generator, self.fake_score if wrong else fake_score, teacher)

    Engines._networks = networks
    try:
        yield
    finally:
        Engines._networks = original


def equality(folder: Path, options: dict) -> None:
    """Every case that suits this number of ranks, then one with the frozen engine."""
    rank = init_distributed()
    for name, case in CASES.items():
        if case.world_size == rank.world_size:
            start = time.perf_counter()
            result = run_case(rank, folder / f"{name}.json")
            print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
            torch.save(result, folder / f"{name}-rank{rank.rank}.pt")
    if rank.world_size == 2:
        path = folder / "frozen-engine.json"
        on_main(rank, lambda: write_config(folder, path.stem, 2, **CASES["module-guided"].section))
        with frozen_engine():
            torch.save(run_case(rank, path), folder / f"frozen-engine-rank{rank.rank}.pt")


def elements_at_rest(trainer: Trainer) -> dict[str, tuple[int, int]]:
    """What -> (elements on this rank, elements in all), and any whole parameter found anywhere in this process."""
    engines, found = trainer.engines, {}
    for name in ("generator", "fake_score", "teacher"):
        engine = getattr(engines, name)
        parameters = list(engine.module.parameters())
        total = sum(parameter.ds_numel for parameter in parameters)
        found[f"{name} weights"] = (sum(p.ds_tensor.numel() + p.numel() for p in parameters), total)
        if name != "teacher":
            states = engine.optimizer.optimizer.state.values()
            held = sum(v.numel() for state in states for v in state.values() if torch.is_tensor(v) and v.numel() > 1)
            found[f"{name} optimizer"] = (held, 2 * total)
            held = sum(group.numel() for group in engine.optimizer.fp32_partitioned_groups_flat)
            found[f"{name} master weights"] = (held, total)
    shards = trainer.ema.shards.values()
    total = sum(parameter.ds_numel for parameter in engines.generator.module.parameters())
    found["ema"] = (sum(value.numel() for value in shards), total)
    for name, module in (
        ("generator", engines.generator),
        ("fake_score", engines.fake_score),
        ("teacher", engines.teacher),
    ):
        whole = engines.whole.get(module.module)
        if whole is not None:
            left = sum(p.numel() for p in whole.module.parameters() if p.device.type != "meta")
            found[f"{name} whole"] = (left, sum(p.ds_numel for p in module.module.parameters()))
    return found


def whole_tensors(trainer: Trainer) -> list[tuple[int, ...]]:
    """Shapes of live tensors that are as large and shaped as a parameter of more than 2,000 elements."""
    engines = (trainer.engines.generator, trainer.engines.fake_score, trainer.engines.teacher)
    shapes = {tuple(p.ds_shape) for engine in engines for p in engine.module.parameters() if p.ds_numel > 2000}
    gc.collect()
    alive = (value for value in gc.get_objects() if type(value) in (torch.Tensor, torch.nn.Parameter))
    return [tuple(value.shape) for value in alive if value.device.type == "cpu" and tuple(value.shape) in shapes]


def sharding(folder: Path, options: dict) -> None:
    rank = init_distributed()
    for name in options["runs"]:
        trainer = make_trainer(load_config(folder / f"{name}.json", (), rank.world_size), rank)
        trainer.train()
        result = {"elements": elements_at_rest(trainer), "whole": whole_tensors(trainer)}
        torch.save(result, folder / f"{name}-rank{rank.rank}.pt")
        trainer.close()
        del trainer


def whole_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """This rank's part of everything that the next iteration depends on, flat."""
    rank, found = trainer.rank.rank, {}
    for name in ("generator", "fake_score"):
        engine = getattr(trainer.engines, name)
        names = {parameter: key for key, parameter in engine.module.named_parameters()}
        flats = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_partitioned_groups_flat, strict=True)
        for parameters, flat in flats:
            sizes = [parameter.ds_tensor.numel() for parameter in parameters]
            masters = flat.detach()[: sum(sizes)].split(sizes)
            for parameter, master in zip(parameters, masters, strict=True):
                # The last rank's shard is filled up with whatever was in memory.
                own = min(max(parameter.ds_numel - rank * len(master), 0), len(master))
                found[f"{name} {names[parameter]}"] = parameter.ds_tensor[:own].clone()
                found[f"{name} master {names[parameter]}"] = master[:own].clone()
        for i, state in enumerate(engine.optimizer.optimizer.state.values()):
            found |= {f"{name} optimizer {i} {key}": torch.as_tensor(value).clone() for key, value in state.items()}
    found |= {f"ema {key}": value.clone() for key, value in trainer.ema.shards.items()}
    return found


def stop_at(trainer: Trainer, iteration: int) -> None:
    """As SIGTERM during the iteration before would."""
    original = trainer.step

    def step(micro_batches):
        original(micro_batches)
        trainer.stop_requested = trainer.rank.is_main and trainer.iteration + 1 == iteration

    trainer.step = step


def resume(folder: Path, options: dict) -> None:
    """One run through, one stopped at each of `stops` and taken up by a new trainer each time; then what is refused."""
    rank = init_distributed()
    for name, stops in (("through", []), ("stopped", options["stops"])):
        config = load_config(folder / f"{name}.json", (), rank.world_size)
        finished = []
        for stop in [*stops, None]:
            trainer = make_trainer(config, rank)
            first = trainer.iteration
            if stop is not None:
                stop_at(trainer, stop)
            finished.append((first, trainer.train(), trainer.iteration))
            trainer.close()
        trainer.export()
        result = {"finished": finished, "state": whole_state(trainer), "losses": read_metrics(trainer.run.metrics)}
        torch.save(result, folder / f"{name}-rank{rank.rank}.pt")
    if rank.is_main:
        damaged = shutil.copytree(folder / "through", folder / "damaged")
        (damaged / "generator.safetensors").unlink()
        (file,) = damaged.glob("checkpoints/iteration-000010/fake_score/*/*_rank_1_*optim_states.pt")
        file.write_bytes(file.read_bytes()[:-2000])
    torch.distributed.barrier()
    codes = {name: main(["--config", str(folder / f"{name}.json")]) for name in ("one-rank", "damaged")}
    torch.save(codes, folder / f"refused-rank{rank.rank}.pt")


def one_rank(folder: Path, options: dict) -> None:
    """A run of one rank that is not finished: two ranks could otherwise use it as it is."""
    run_case(init_distributed(), folder / "one-rank.json")
    (folder / "one-rank" / "generator.safetensors").unlink()


def spoil(name: str, iterations: set[int], on_rank: int, value: float = float("nan")):
    """Multiply the loss of that update by nan, on one rank's last micro-batch only."""
    function = f"{name}_loss"
    original = getattr(trainer_module, function)

    def loss(networks, algorithm, batch, *rest, **options):
        key = rest[-1]
        result = original(networks, algorithm, batch, *rest, **options)
        if key.step in iterations and torch.distributed.get_rank() == on_rank:
            return (result[0] * value, *result[1:])
        return result

    setattr(trainer_module, function, loss)
    return SimpleNamespace(undo=lambda: setattr(trainer_module, function, original))


def nan(folder: Path, options: dict) -> None:
    """Single updates spoiled on rank 1 alone; a batch of nan there; then twenty in a row, and going on after them."""
    rank = init_distributed()
    for name in ("nan-module", "nan-network"):
        spoiled = [spoil("fake_score", {4}, 1), spoil("generator", {6}, 1, float("inf"))]

        def spoil_batch(trainer):
            original = trainer.step

            def step(micro_batches):
                if trainer.iteration == 8 and not rank.is_main:
                    micro_batches[0].x0.fill_(float("nan"))
                original(micro_batches)

            trainer.step = step

        torch.save(run_case(rank, folder / f"{name}.json", prepare=spoil_batch), folder / f"{name}-rank{rank.rank}.pt")
        for item in spoiled:
            item.undo()
    diverging = spoil("fake_score", set(range(2, 100)), 1)
    code = main(["--config", str(folder / "diverging.json")])
    diverging.undo()
    run = RunFolder(folder / "diverging")
    saved = [iteration for iteration, _ in run.list_checkpoints()]
    resumed = run_case(rank, folder / "diverging.json")
    torch.save(unreadable(folder), folder / f"unreadable-rank{rank.rank}.pt")
    torch.save({"code": code, "saved": saved, "resumed": resumed}, folder / f"diverging-rank{rank.rank}.pt")


def unreadable(folder: Path) -> int:
    """Rank 1 alone cannot read its part of the third batch."""
    original = Trainer._next

    def next_batch(self, batches):
        if self.iteration == 2 and not self.rank.is_main:
            return [], DataError("train-000000.tar: cannot be read")
        return original(self, batches)

    Trainer._next = next_batch
    code = main(["--config", str(folder / "unreadable.json")])
    Trainer._next = original
    return code


def train(folder: Path, options: dict) -> int:
    """train.py on this rank; at an iteration, or in the middle of a checkpoint, this rank gets a signal."""
    rank = int(os.environ["RANK"])
    number = getattr(signal, options.get("signal", "SIGTERM"))
    if rank == options.get("rank") and "iteration" in options:
        original = Trainer.step

        def step(self, micro_batches):
            if self.iteration == options["iteration"]:
                os.kill(os.getpid(), number)
            original(self, micro_batches)

        Trainer.step = step
    if rank == options.get("rank") and "checkpoint" in options:
        from deepspeed.runtime.engine import DeepSpeedEngine

        original_save = DeepSpeedEngine.save_checkpoint

        def save_checkpoint(self, path, *arguments, **keywords):
            if f"{options['checkpoint']:06d}" in path and path.endswith("fake_score"):
                os.kill(os.getpid(), number)
            return original_save(self, path, *arguments, **keywords)

        DeepSpeedEngine.save_checkpoint = save_checkpoint
    return main(["--config", str(folder / options["config"]), "--local_rank", os.environ["LOCAL_RANK"]])


def count_traffic(trainer: Trainer, found: list) -> None:
    """What each iteration from now on exchanges."""
    original = trainer.step

    def step(batches):
        with counted() as traffic:
            original(batches)
        found.append(traffic)

    trainer.step = step


def text(folder: Path, options: dict) -> None:
    """The SDXL-shaped pipeline: how its networks are made and gathered, and its runs."""
    rank = init_distributed()
    if "runs" not in options:
        text_cases.construction(folder, options)
        text_cases.passes(folder, options)
    else:
        text_cases.nvme(folder)
    for name in options.get("runs", text_cases.RUNS):
        start, traffic = time.perf_counter(), []
        config = load_config(folder / f"{name}.json", (), rank.world_size)
        trainer = make_trainer(config, rank)
        gradients = record_first_gradients(trainer)
        with text_cases.invalidated() as dropped:
            if "offload" in name or name == "nvme":  # what is offloaded is saved and taken up again
                stop_at(trainer, 4)
                count_traffic(trainer, traffic)
                trainer.train()
                trainer.close()
                trainer = make_trainer(config, rank)
                assert trainer.iteration == 4
            count_traffic(trainer, traffic)
            trainer.train()
        result = {"weights": weights(trainer), "gradients": gradients, "losses": read_metrics(trainer.run.metrics)}
        result |= {"updates": trainer.generator_updates, "traffic": traffic, "dropped": len(dropped)}
        trainer.close()
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
        torch.save(result, folder / f"{name}-rank{rank.rank}.pt")


def previews_pairs(folder: Path, options: dict) -> None:
    """A run whose grids show prompts, and one that learns from a teacher's pairs."""
    rank = init_distributed()
    for name in ("prompts", "pairs-run"):
        trainer = make_trainer(load_config(folder / f"{name}.json", (), rank.world_size), rank)
        gradients = record_first_gradients(trainer)
        trainer.train()
        result = {"weights": weights(trainer), "gradients": gradients, "losses": read_metrics(trainer.run.metrics)}
        result["updates"] = trainer.generator_updates
        trainer.close()
        torch.save(result, folder / f"{name}-rank{rank.rank}.pt")


def variants(folder: Path, options: dict) -> None:
    """Every variant; f-distill again, stopped after five iterations and taken up by a new trainer."""
    rank = init_distributed()
    for name in (*VARIANTS, "f-distill-resumed"):
        start, path, kept = time.perf_counter(), folder / f"{name}.json", []
        if name.endswith("resumed"):
            trainer = make_trainer(load_config(path, (), rank.world_size), rank)
            stop_at(trainer, 5)
            trainer.train()
            trainer.close()
        result = run_case(rank, path, prepare=kept.append)
        if kept[0].divergence is not None:
            result["bins"] = kept[0].divergence.bins
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
        torch.save(result, folder / f"{name}-rank{rank.rank}.pt")


SCENARIOS = {
    "variants": variants,
    "previews_pairs": previews_pairs,
    "adapters": adapters,
    "text": text,
    "equality": equality,
    "sharding": sharding,
    "resume": resume,
    "one_rank": one_rank,
    "nan": nan,
    "train": train,
    "sdxl_runs": sdxl.runs,
    "sdxl_command": sdxl.command,
    "planned": planned,
    "stages": stages,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    quiet_libraries()
    dmd2_fast.failures.PATIENCE_SECONDS = 1.0
    scenario, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    sys.exit(SCENARIOS[scenario](folder, options))
