"""The table at the end of a run: teacher, undistilled and distilled generator against the test split.

Every row samples as many images as `run.num_samples`, classes in turn, from the same noise, and is measured here: the
teacher by its ODE samplers (Heun, Euler), "undistilled" as the generator's few-step sampler with the teacher's
weights, "generator" from generator.safetensors. `seconds` is the time to sample 1,000 images.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .config import Config
from .data import read_all
from .denoiser import Denoiser
from .errors import DataError, UserError
from .export import BATCH_SIZE, SAMPLING_STEP, FewStepGenerator, cycling_labels, load_generator, num_classes
from .grids import save_grid, save_samples
from .metrics import NEIGHBOURS, Reference
from .networks import load_denoiser
from .random import NoiseKey
from .rollout import UNGUIDED, Guidance, denoiser_of, initial_noise, sample_ode
from .runs import load_run_config, read_json, write_json

TEACHER_ROWS = ((35, True), (8, False), (4, False), (1, False))
"""(evaluations, Heun?): 18 Heun steps, the last one Euler, are 35 evaluations."""
VERSIONS = ("torch", "deepspeed", "diffusers", "triton", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "numpy")


def has_test_split(config: Config) -> bool:
    """Whether there are held-out images to compare samples with."""
    return config.data.kind == "webdataset" and any(Path(config.data.path).glob("test-*.tar"))


def load_reference(config: Config) -> Reference:
    """The test split and the cached classifier for the data of a config; raises DataError without them."""
    train, test = read_all(config.data.path, "train"), read_all(config.data.path, "test")
    for split, (images, _) in (("train", train), ("test", test)):
        if len(images) <= NEIGHBOURS:
            raise DataError(
                f"{config.data.path}: {len(images)} {split} images, expected more than {NEIGHBOURS} to compare"
            )
    return Reference(*train, *test, Path(config.data.path) / "classifier")


def sample_teacher(
    teacher: Denoiser,
    class_labels: Tensor,
    evaluations: int,
    *,
    heun: bool,
    guidance: Guidance = UNGUIDED,
    seed: int = 0,
) -> Tensor:
    """Images (N, C, H, W) f32 in [-1, 1] of a teacher by the probability-flow ODE, from pure noise down to 0."""
    device = next(teacher.parameters()).device
    num_times = (evaluations + 1) // 2 if heun else evaluations
    times = teacher.schedule.sampling_times(num_times, teacher.prediction_type).to(device)
    denoise, key = denoiser_of(teacher, guidance), NoiseKey(seed, step=SAMPLING_STEP)
    ids, parts = torch.arange(len(class_labels), device=device), []
    for labels, part in zip(class_labels.to(device).split(BATCH_SIZE), ids.split(BATCH_SIZE), strict=True):
        x = initial_noise(teacher.schedule, times, part, teacher.network.image_shape, key)
        parts.append(sample_ode(denoise, teacher.schedule, times, x, {"class_labels": labels}, heun=heun))
    return torch.cat(parts).clamp(-1, 1).cpu()


@dataclass
class _Row:
    network: str
    evaluations: int
    sample: Callable[[Tensor], Tensor]


def _rows(config: Config, teacher: Denoiser, generator: FewStepGenerator) -> list[_Row]:
    rows, seed, guidance = [], config.run.seed, Guidance.from_config(config)
    for evaluations, heun in TEACHER_ROWS:
        options: dict[str, Any] = {"evaluations": evaluations, "heun": heun, "guidance": guidance, "seed": seed}
        rows.append(_Row("teacher", evaluations, partial(sample_teacher, teacher, **options)))
    undistilled = FewStepGenerator(teacher, generator.steps)
    num_steps = len(generator.steps)
    rows.append(_Row("undistilled", num_steps, lambda labels: undistilled.sample(labels, seed=seed)))
    rows.append(_Row("generator", num_steps, lambda labels: generator.sample(labels, seed=seed)))
    return rows


def evaluate_run(run_folder: str | os.PathLike, *, generator_only: bool = False, **extra: Any) -> dict[str, Any]:
    """Measure a finished run; writes samples.safetensors, samples.png and summary.json and returns the summary.

    `generator_only` leaves out the teacher's rows and the undistilled one; `extra` goes into the summary. Raises
    `UserError` when the run has no generator yet or its data or teacher are gone.
    """
    folder = Path(run_folder)
    config, earlier = load_run_config(folder), read_json(folder / "summary.json")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = load_generator(folder / "generator.safetensors", device)
    teacher = load_denoiser(config.model).to(device).eval().requires_grad_(False)
    reference = load_reference(config)
    classes = num_classes(teacher)
    labels, rows = cycling_labels(config.run.num_samples, classes), []
    wanted = _rows(config, teacher, generator)[-1 if generator_only else 0 :]
    with tqdm(wanted, desc="evaluate", disable=not config.run.progress) as bar:
        for row in bar:
            start = time.perf_counter()
            images = row.sample(labels)
            seconds = (time.perf_counter() - start) * 1000 / len(labels)
            if not bool(torch.isfinite(images).all()):
                raise UserError(f"{folder}: samples of the {row.network} are not finite: its training has diverged")
            scores = reference.evaluate(images, labels)
            rows.append({"network": row.network, "evaluations": row.evaluations, **scores, "seconds": seconds})
    save_samples(folder / "samples.safetensors", images, labels, config.run.seed)
    save_grid(folder / "samples.png", images[: 10 * classes], classes)
    summary: dict[str, Any] = {
        "floor": reference.floor["fd"],
        "floor_row": reference.floor,
        "rows": rows,
        "seed": config.run.seed,
        "iterations": config.run.iterations,
        "machine": machine(),
        "versions": versions(),
        **{key: earlier[key] for key in ("command", "time") if key in earlier},
        **extra,
    }
    write_json(folder / "summary.json", summary)
    return summary


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def versions() -> dict[str, str]:
    """Versions of the packages that decide the figures, and of Python."""
    found = {"python": platform.python_version()}
    for package in VERSIONS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
