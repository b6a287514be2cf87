"""The training loop: one iteration is one call of each loss and one step of each engine.

`deepspeed train.py --config ds_digits.json [--set key=value ...] [--fresh]`. Iterations 0, R, 2R, ... update the
generator (R = `fake_score.ttur_ratio`), every iteration the fake score. Metrics stay on the device between log lines.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from .checkpoint import load_checkpoint, read_state, save_checkpoint
from .cli_parser import parse_training_arguments
from .config import Config, load_config
from .config_deepspeed import validate_with_deepspeed
from .construction import build_base, build_networks
from .data import make_loader
from .data.batch import Batch
from .data.latents import read_unconditional
from .dispatch import backends
from .distillation import Algorithm, fake_score_loss, generate, generator_loss, warmup_loss
from .engine import Engines, ShardedEMA, full_state_dict, poison_if_not_finite, step_was_skipped
from .engine_lora import LoRAEngines
from .errors import UserError
from .evaluation import evaluate_run, has_test_split
from .export import FewStepGenerator, save_fake_score, save_generator
from .f_divergence import Divergence
from .failures import DivergedError, diagnosis, exit_code
from .meters import Clock, Metrics
from .networks import describe_network
from .optimization import learning_rate, set_learning_rate
from .preflight import check_data, check_inputs, check_teacher
from .previews import make_previews
from .random import NoiseKey
from .ranks import (
    Rank,
    all_sum,
    any_rank,
    from_main,
    init_distributed,
    on_main,
    quiet_libraries,
    raise_together,
    world_size_from_environment,
)
from .regression import PairReader, make_measure
from .rendezvous import adopt_slurm
from .runs import RunFolder, inspect_run, open_run, write_atomic
from .shards import held
from .stopping import EXIT_STOPPED, StopRequested, StopSignals, watch_launchers

MAX_SKIPS_IN_A_ROW = 20


class Trainer:
    """Everything a run holds between iterations."""

    def __init__(self, config: Config, run: RunFolder, rank: Rank):
        self.config, self.run, self.rank = config, run, rank
        self.algorithm = Algorithm.from_config(config)
        self.divergence = Divergence.of(self.algorithm, all_sum)
        self._build_networks()
        self.iteration = 0
        self.skipped = {"generator": 0, "fake_score": 0}
        self.in_a_row = {"generator": 0, "fake_score": 0}
        self.generator_updates = 0
        self.metrics, self.clock, self.seconds_before = Metrics(), Clock(), 0.0
        self.started = time.perf_counter()
        self.stop_requested = False
        self._resume()
        self.writer = self._make_writer()
        self.loader = make_loader(
            config.data, seed=config.run.seed, rank=rank.rank, world_size=rank.world_size, device=rank.device,
            micro_batch_size=config.micro_batch_size, start_iteration=self.iteration,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
        )  # fmt: skip
        check_data(config, self.denoiser, "train", self.loader.dataset)
        self.pairs = PairReader(config, rank) if config.regression.is_on else None
        self.measure = make_measure(config, rank.device)
        self.previews = make_previews(config, self.denoiser, rank, self.loader.dataset)

    def _build_networks(self) -> None:
        """Generator and fake score start as copies of the teacher, or of an earlier run's; all are sharded."""
        config, algorithm = self.config, self.algorithm
        if config.model.lora is not None:
            teacher, heads = build_base(config, algorithm, self.rank)
            check_teacher(config, teacher)
            self.engines: Engines = LoRAEngines(config, teacher, heads, algorithm)
        else:
            generator, fake_score, teacher = build_networks(config, algorithm, self.rank)
            check_teacher(config, teacher)
            self.engines = Engines(config, generator, fake_score, teacher)
        self.denoiser = teacher
        if config.data.kind == "latents":
            empty = read_unconditional(config.data.path)["prompt_embeds"]
            teacher.network.null_prompt_embeds = empty.to(self.rank.device)
        decay = config.generator.ema
        self.ema = None if decay is None else ShardedEMA(self.engines.generator, decay)

    def _resume(self) -> None:
        latest = self.run.latest_checkpoint()
        if latest is None:
            on_main(self.rank, lambda: self.run.truncate_metrics(0))
            return
        _, folder = latest
        state = from_main(self.rank, lambda: read_state(folder, self.rank.world_size))
        load_checkpoint(folder, self.engines, self.ema, self.metrics, self.rank)
        self.iteration, self.skipped = state["iteration"], dict(state["skipped"])
        self.in_a_row = dict(state["in_a_row"])
        self.generator_updates, self.seconds_before = state["generator_updates"], state["seconds"]
        if self.divergence is not None:
            self.divergence.bins = torch.tensor(state["ratio_bins"])
        # A line counts finished iterations: the one of the checkpoint's own iteration stays.
        on_main(self.rank, lambda: self.run.truncate_metrics(self.iteration + 1))
        if self.rank.is_main:
            print(f"resuming at iteration {self.iteration} from {folder}")

    def _make_writer(self) -> Any:
        """TensorBoard's writer on rank 0, where TensorBoard is installed."""
        if not self.rank.is_main or importlib.util.find_spec("tensorboard") is None:
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.run.path / "tensorboard"), purge_step=self.iteration + 1)

    def description(self) -> str:
        """One line on what is about to run: the global batch, who reads the data, what each operator runs on."""
        config, device = self.config, self.rank.device
        on: dict[str, list[str]] = {}
        for name, choices in backends().items():
            if not name.endswith(("_backward", "_out")):
                on.setdefault(choices[device.type].backend, []).append(name)
        operators = "; ".join(f"{backend}: {', '.join(names)}" for backend, names in sorted(on.items()))
        return (
            f"global batch {config.global_batch_size} = {config.micro_batch_size} a forward x "
            f"{config.gradient_accumulation_steps} accumulated x {self.rank.world_size} rank(s) on {device.type}, "
            f"data by the {self.loader.name} loader, {self.engines.optimizer_name}; operators on {operators}; "
            f"networks: {describe_network(self.denoiser.network)}"
        )

    def close(self) -> None:
        self.loader.close()
        if self.pairs is not None:
            self.pairs.close()
        if self.writer is not None:
            self.writer.close()

    def state(self) -> dict[str, Any]:
        return {
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "generator_updates": self.generator_updates,
            "seconds": self.seconds(),
            "seed": self.config.run.seed,
            **({} if self.divergence is None else {"ratio_bins": self.divergence.bins.tolist()}),
        }

    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def train(self) -> bool:
        """Run to the last iteration; False when asked to stop before it."""
        run, batches = self.config.run, iter(self.loader)
        self.started = time.perf_counter()
        hidden = not (run.progress and self.rank.is_main)
        with tqdm(total=run.iterations, initial=self.iteration, desc="distil", disable=hidden) as bar:
            while self.iteration < run.iterations:
                with self.clock.part("data"):
                    micro_batches, failure = self._next(batches)
                if any_rank(self.stop_requested or failure is not None, self.rank.device):
                    self.save()
                    raise_together(failure, self.rank)
                    return False
                self.step(micro_batches)
                self.iteration += 1
                bar.update()
                self._stop_if_diverged(bar)
                self._periodic(bar)
        self.save()
        return True

    def _next(self, batches: Iterator[list[Batch]]) -> tuple[list[Batch], UserError | None]:
        """This rank's part of the next global batch, or why it cannot be read."""
        try:
            return next(batches), None
        except UserError as error:
            return [], error

    def step(self, micro_batches: list[Batch]) -> None:
        """One iteration: the generator's update when it is due, then the fake score's on the same samples."""
        key = NoiseKey(self.config.run.seed, step=self.iteration)
        if self.iteration < self.config.regression.warmup_iterations:
            with self.clock.part("generator"):
                self._warm_up()
            return
        if self.iteration % self.config.fake_score.ttur_ratio == 0:
            with self.clock.part("generator"):
                samples = self._update_generator(micro_batches, key)
        else:
            with self.clock.part("rollout"), torch.no_grad(), self.engines.for_samples() as networks:
                samples = [generate(networks, self.algorithm, batch, key) for batch in micro_batches]
        with self.clock.part("fake_score"):
            self._update_fake_score(micro_batches, samples, key)

    def _warm_up(self) -> None:
        """An update of the generator from the teacher's pairs alone."""
        engine, algorithm = self.engines.generator, self.algorithm
        assert self.pairs is not None  # the configuration's check has seen to it
        self._set_rate(engine, self.config.generator)
        with self.engines.for_regression() as networks:
            for pairs in self.pairs(self.iteration):
                loss, metrics = warmup_loss(networks, algorithm, pairs, self.measure)
                engine.backward(poison_if_not_finite(loss))
                self.metrics.add(metrics)
                engine.step()
        self._generator_moved()

    def _update_generator(self, micro_batches: list[Batch], key: NoiseKey) -> list[Tensor]:
        engine, samples = self.engines.generator, []
        self._set_rate(engine, self.config.generator)
        with self.engines.for_generator() as (networks, rollout):
            for batch, pairs in zip(micro_batches, self._pairs(len(micro_batches)), strict=True):
                loss, x, metrics = generator_loss(
                    networks, self.algorithm, batch, key, rollout=rollout, pairs=pairs, measure=self.measure,
                    divergence=self.divergence,
                )  # fmt: skip
                engine.backward(poison_if_not_finite(loss))
                self.metrics.add(metrics)
                samples.append(x)
                engine.step()
        self._generator_moved()
        return samples

    def _pairs(self, num: int) -> Sequence[Batch | None]:
        """The teacher's pairs beside each of this iteration's `num` micro-batches; None where they have no weight."""
        if self.pairs is None or not self.algorithm.regression_weight:
            return [None] * num
        return self.pairs(self.iteration)

    def _generator_moved(self) -> None:
        if self._count("generator", self.engines.generator):
            self.generator_updates += 1
            if self.ema is not None:
                self.ema.update()

    def _update_fake_score(self, micro_batches: list[Batch], samples: list[Tensor], key: NoiseKey) -> None:
        engine, algorithm = self.engines.fake_score, self.algorithm
        self._set_rate(engine, self.config.fake_score)
        double_backward = held(engine.module.heads) if algorithm.r1_kind == "exact" else nullcontext()
        with (
            double_backward,
            self.engines.for_fake_score(algorithm.adversarial and algorithm.features == "teacher") as networks,
        ):
            for batch, x in zip(micro_batches, samples, strict=True):
                loss, metrics = fake_score_loss(networks, algorithm, batch, x, key)
                engine.backward(poison_if_not_finite(loss))
                self.metrics.add(metrics)
                engine.step()
        self._count("fake_score", engine)

    def _set_rate(self, engine, settings) -> None:
        iterations = self.config.run.iterations
        rate = learning_rate(settings.optimizer.lr, settings.lr_scheduler, self.iteration, iterations)
        set_learning_rate(engine.optimizer, rate)

    def _count(self, name: str, engine) -> bool:
        """Count a skipped step; True when the step was taken. Every rank sees the same global norm."""
        if not step_was_skipped(engine):
            self.in_a_row[name] = 0
            norm = torch.as_tensor(engine.get_global_grad_norm(), device=self.rank.device)
            self.metrics.add({f"{name}/grad_norm": norm})
            return True
        self.skipped[name] += 1
        self.in_a_row[name] += 1
        return False

    def _stop_if_diverged(self, bar: tqdm) -> None:
        """After MAX_SKIPS_IN_A_ROW skipped updates of a network: log, save, say what was seen, raise on all ranks."""
        for name, number in self.in_a_row.items():
            if number >= MAX_SKIPS_IN_A_ROW:
                self.in_a_row[name] = 0  # who goes on from here has mended the cause
                record = self._log({}, bar)
                self.save()
                text = diagnosis(name, self.iteration, number, self.skipped[name], record)
                if self.rank.is_main:
                    write_atomic(self.run.path / "diagnosis.txt", text + "\n")
                raise DivergedError(text)

    def _periodic(self, bar: tqdm) -> None:
        run, last = self.config.run, self.iteration == self.config.run.iterations
        sampled = bool(run.sample_interval) and (self.iteration % run.sample_interval == 0 or last)
        scores = self._sample() if sampled else {}
        if self.iteration % run.log_interval == 0 or last or sampled:
            self._log(scores, bar)
        if self.iteration % run.checkpoint_interval == 0 and not last:
            self.save()

    def _log(self, extra: dict[str, Any], bar: tqdm) -> dict[str, Any]:
        values = self.metrics.read()
        record = {"iteration": self.iteration, "time": self.seconds(), **values}
        for name, settings in (("generator", self.config.generator), ("fake_score", self.config.fake_score)):
            record[f"{name}/lr"] = learning_rate(
                settings.optimizer.lr, settings.lr_scheduler, self.iteration - 1, self.config.run.iterations
            )
            record[f"skipped/{name}"] = self.skipped[name]
        record |= {**self.clock.read(), **extra}
        if not self.rank.is_main:
            return record
        self.run.append_metrics(record)
        shown = {"dmd": "generator/dmd", "denoising": "fake_score/denoising", "fd": "eval/fd"}
        bar.set_postfix({name: f"{record[key]:.3g}" for name, key in shown.items() if key in record}, refresh=False)
        if self.writer is not None:
            for name, value in record.items():
                self.writer.add_scalar(name, value, self.iteration)
        return record

    def averaged(self):
        """Context in which the generator runs with the averaged weights, if there are any."""
        return nullcontext() if self.ema is None else self.ema.swapped_in()

    def _sample(self) -> dict[str, float]:
        """A grid of fixed-noise samples and their scores. Collective: every rank samples, rank 0 keeps."""
        assert self.previews is not None  # sample_interval is not 0
        with self.clock.part("sampling"), self.averaged(), self.engines.bare(self.engines.generator) as denoiser:
            generator = FewStepGenerator(denoiser, self.algorithm.steps)
            samples = generator.sample(self.previews.condition, seed=self.config.run.seed)
            if not self.rank.is_main:
                return {}
            scores = self.previews.keep(samples, self.run.grid(self.iteration))
        return {f"eval/{name}": value for name, value in scores.items()}

    def save(self) -> None:
        """Write a checkpoint of the state after `self.iteration` iterations. Collective."""
        with self.clock.part("checkpoint"):
            save_checkpoint(
                self.run, self.iteration, self.config.run.keep_checkpoints, self.engines, self.ema, self.metrics,
                self.state(), self.rank,
            )  # fmt: skip

    def export(self) -> None:
        """Write generator.safetensors, the average where there is one, and fake_score.safetensors. Collective.

        A second stage (`run.start_from`) starts from both.
        """
        keep, config = self.rank.is_main, self.config
        state = full_state_dict(self.engines.generator, keep) if self.ema is None else self.ema.full_state_dict(keep)
        facts = {"iteration": self.iteration, "ema": config.generator.ema, "seed": config.run.seed}
        if keep:
            path = self.run.path / "generator.safetensors"
            save_generator(path, state, self.denoiser, self.algorithm.steps, model=config.model, **facts)
        if config.model.lora is None and self.algorithm.keeps_fake_score:
            state = full_state_dict(self.engines.fake_score, keep)
            if keep:
                save_fake_score(self.run.path / "fake_score.safetensors", state)


def finish(run: RunFolder, config: Config, seconds: float) -> None:
    """Evaluate, write the report and print the table. One process."""
    from .report import format_table, write_report

    if has_test_split(config):
        typed = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]  # which the launcher appends
        command = shlex.join(["deepspeed", "train.py", *typed])
        print("\n" + format_table(evaluate_run(run.path, command=command, time={"distil": seconds})))
    write_report(run.path)
    print(f"\n{run.path / 'report.html'}")


def run_training(config: Config, fresh: bool = False, stop: StopSignals | None = None) -> int:
    """Train, or go on with, the run of a config; evaluate it at the end. Returns the exit code.

    Raises UserError and DivergedError on every rank; StopRequested where a signal came and there was nothing to save.
    """
    stop = stop or StopSignals()
    quiet_libraries()
    rank = init_distributed()
    stop.listen()
    try:
        # A single rank can leave wherever it is; several leave together.
        with stop.at_once(rank.world_size == 1):
            run = on_main(rank, lambda: open_run(config, fresh)) or RunFolder(config.run.folder)
        try:
            return _train(config, run, rank, stop)
        except BaseException:
            if rank.is_main:
                run.discard_pending()
            raise
        finally:
            if run.lock is not None:
                run.lock.release()
    finally:
        stop.restore()


def _train(config: Config, run: RunFolder, rank: Rank, stop: StopSignals) -> int:
    latest = run.latest_checkpoint()
    seconds = 0.0
    if (run.path / "generator.safetensors").exists() and latest is not None and latest[0] >= config.run.iterations:
        if rank.is_main:
            print(f"{run.path} is trained already ({latest[0]} iterations); --fresh starts anew")
        finished, seconds = True, read_state(latest[1])["seconds"]
    else:
        with stop.at_once(rank.world_size == 1):
            trainer = Trainer(config, run, rank)
        if any_rank(stop.requested, rank.device):
            raise StopRequested
        if rank.is_main:
            print(trainer.description())
        stop.tell(lambda: setattr(trainer, "stop_requested", True))
        finished = trainer.train()
        if finished:
            trainer.export()
        elif rank.is_main:
            print(f"stopped at iteration {trainer.iteration}; the same command goes on from there")
        seconds = trainer.seconds()
        trainer.close()
    dist.barrier()
    dist.destroy_process_group()
    if not finished:
        return EXIT_STOPPED
    if rank.is_main:
        with stop.at_once():
            finish(run, config, seconds)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit codes: 0 done, 1 diverged (state saved), 2 bad input, 3 another node lost, 143 stopped
    by a signal (state saved)."""
    stop, is_main = StopSignals(), False
    try:
        adopt_slurm()
        is_main = os.environ.get("RANK", "0") == "0"
        args = parse_training_arguments(argv)
        world_size = world_size_from_environment()
        config = load_config(args.config, args.set, world_size)
        validate_with_deepspeed(config.deepspeed, world_size)
        watch_launchers()
        check_inputs(config)
        if is_main:
            inspect_run(config, args.fresh)
        return run_training(config, args.fresh, stop)
    except (StopRequested, KeyboardInterrupt):
        if is_main:
            print("stopped; nothing is lost: the same command goes on from the last checkpoint", file=sys.stderr)
        return EXIT_STOPPED
    except Exception as error:
        code = exit_code(error, stop)
        if code is None:
            raise
        return code
