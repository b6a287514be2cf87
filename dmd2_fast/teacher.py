"""Training a small teacher from nothing: the diffusion model that the embedded default distils.

Plain denoising training in one process, an average of the weights, and a cosine learning rate. What `teacher.training`
leaves open is the schedule's usual (for "karras" Karras et al. 2022: x0 through the EDM preconditioning, noise levels
log-normal with mean -1.2 and deviation 1.2, weight sigma^-2 + sigma_data^-2). Every draw comes from keys, so a seed and
a machine give one teacher. The folder appears whole or not.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .config import Config, TeacherTrainingConfig, TimeSamplingConfig
from .config_times import predicted, reads_sigma_data
from .data import make_loader, read_all
from .data.batch import Batch
from .data.dataset import open_dataset
from .denoiser import Condition, Denoiser
from .errors import ConfigError, UserError
from .locks import acquire
from .networks import SETTINGS_FILE, build_denoiser, build_without_weights, load_denoiser, save_denoiser
from .ops.denoising import denoising_loss
from .ops.noise import add_noise
from .optimization import make_optimizer, set_learning_rate, warmup_cosine
from .preflight import check_data, check_teacher
from .random import NoiseKey, Stream, philox_normal, philox_uniform
from .runs import move_aside
from .schedules import KarrasSchedule, TimeSampling

LOG_SIGMA_MEAN, LOG_SIGMA_STD = -1.2, 1.2  # EDM, table 1
LABEL_STREAM = Stream.USER
WARMUP_ITERATIONS = 100
WAIT_SECONDS = 7200.0
"""For another process that trains the same teacher, as two runs started together do: it is reused then."""
TRAINING_FILE = "training.json"


def teacher_settings(training: TeacherTrainingConfig, measure: Callable[[], Any]) -> dict[str, Any]:
    """Denoiser settings of a new teacher; `measure` gives the data's deviation where sigma_data is not set."""
    schedule: dict[str, Any] = {"kind": training.schedule}
    if reads_sigma_data(training):
        schedule["sigma_data"] = training.sigma_data or round(float(measure()), 6)
    return {
        "network": {"kind": "unet2d", "config": dict(training.network), "patch_size": training.patch_size},
        "schedule": schedule,
        "prediction_type": predicted(training),
        "preconditioning": training.preconditioning or ("edm" if reads_sigma_data(training) else "none"),
    }


def training_times(
    denoiser: Denoiser, batch: Batch, key: NoiseKey, time_sampling: TimeSamplingConfig | None = None
) -> Tensor:
    """Times (N,) of one training step; without `time_sampling` EDM's log-normal sigmas for Karras, else uniform."""
    ids, key = batch.sample_ids, key.fork(Stream.DENOISING_TIME)
    if time_sampling is None and isinstance(denoiser.schedule, KarrasSchedule):
        return (LOG_SIGMA_MEAN + LOG_SIGMA_STD * philox_normal(ids, (1,), key, torch.float32)[:, 0]).exp()
    sampling = TimeSampling() if time_sampling is None else TimeSampling(**asdict(time_sampling))
    return sampling.draw(denoiser.schedule, philox_uniform(ids, (1,), key)[:, 0])


def drop_labels(denoiser: Denoiser, batch: Batch, key: NoiseKey, probability: float) -> Condition:
    """The condition with each sample's label replaced by the empty one with this probability."""
    if probability == 0:
        return batch.condition
    dropped = philox_uniform(batch.sample_ids, (1,), key.fork(LABEL_STREAM))[:, 0] <= probability
    empty = denoiser.unconditional(batch.condition)
    return {name: torch.where(dropped, empty[name], value) for name, value in batch.condition.items()}


def teacher_step_loss(
    denoiser: Denoiser,
    batch: Batch,
    key: NoiseKey,
    label_dropout: float,
    time_sampling: TimeSamplingConfig | None = None,
) -> Tensor:
    t = training_times(denoiser, batch, key, time_sampling)
    alpha, sigma = denoiser.schedule.coefficients(t)
    noise_key = key.fork(Stream.DENOISING_NOISE)
    x_t = add_noise(batch.x0, alpha, sigma, key=noise_key, sample_ids=batch.sample_ids)
    prediction = denoiser.predict(x_t, t, drop_labels(denoiser, batch, key, label_dropout))
    return denoising_loss(
        prediction, batch.x0, alpha, sigma, prediction_type=denoiser.prediction_type, key=noise_key,
        sample_ids=batch.sample_ids, sample_weight=denoiser.schedule.loss_weight(t, denoiser.prediction_type),
    )  # fmt: skip


def train_teacher(config: Config, *, fresh: bool = False, on_step: Callable[[int, Tensor], None] | None = None) -> Path:
    """Train the teacher of `config.teacher.training` into `config.model.path`; reuse one of the same settings.

    Raises ConfigError when the config has no training section or the folder holds a teacher of other settings.
    """
    training, folder = config.teacher.training, Path(config.model.path).resolve()
    if training is None:
        raise ConfigError("teacher.training is null: there is no teacher to train; model.path must hold one")
    wanted = {"training": config.to_dict()["dmd2_fast"]["teacher"]["training"], "data": config.data.path}
    if _is_there(folder, wanted, fresh):
        return folder
    _check_data(config, training)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(training.seed)
    denoiser = build_denoiser(teacher_settings(training, lambda: read_all(config.data.path)[0].std())).to(device)
    with acquire(folder.with_name(f".{folder.name}.lock"), str(folder), WAIT_SECONDS):
        if _is_there(folder, wanted, fresh):  # another process was faster
            return folder
        averaged = _run(config, training, denoiser, device, on_step)
        if not all(bool(torch.isfinite(value).all()) for value in averaged.parameters()):
            raise UserError(
                "teacher: training has diverged (weights that are not finite), nothing was written: "
                "lower teacher.training.optimizer.params.lr"
            )
        temporary = folder.with_name(folder.name + ".tmp")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            save_denoiser(averaged, temporary)
            (temporary / TRAINING_FILE).write_text(json.dumps(wanted, indent=2) + "\n")
            if (folder / SETTINGS_FILE).exists():
                print(f"teacher: the old one is now {move_aside(folder)}")
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _check_data(config: Config, training: TeacherTrainingConfig) -> None:
    """Refuse data that the network to train does not take, before any of them are read into memory."""
    planned = build_without_weights(teacher_settings(training, lambda: 1.0))
    check_teacher(config, planned)
    dataset = open_dataset(config.data.kind, config.data.path, "train")
    try:
        check_data(config, planned, "train", dataset)
    finally:
        dataset.close()


def _is_there(folder: Path, wanted: Any, fresh: bool) -> bool:
    """Whether the folder holds the wanted teacher; ConfigError when it holds another, or something else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / SETTINGS_FILE).is_file():
        raise ConfigError(f"model.path: {str(folder)!r} exists and is no teacher's folder; name another one")
    if fresh:
        return False
    if _recorded(folder) != wanted:
        raise ConfigError(
            f"model.path: {str(folder)!r} holds something else than a teacher of these settings; "
            "train with --fresh to move it aside, or name another folder"
        )
    load_denoiser(folder)
    print(f"teacher: {folder} is there already, with the same settings")
    return True


def _recorded(folder: Path) -> Any:
    try:
        return json.loads((folder / TRAINING_FILE).read_text())
    except (OSError, ValueError):
        return None


def _run(config: Config, training: TeacherTrainingConfig, denoiser: Denoiser, device, on_step) -> Denoiser:
    averaged = copy.deepcopy(denoiser).requires_grad_(False)
    optimizer = make_optimizer(denoiser.parameters(), training.optimizer)
    loader = make_loader(config.data, seed=training.seed, micro_batch_size=training.batch_size, device=device)
    warmup = min(WARMUP_ITERATIONS, training.iterations // 10)
    bar = tqdm(total=training.iterations, desc="teacher", disable=not config.run.progress)
    try:
        for iteration, batches in zip(range(training.iterations), loader, strict=False):
            ratio = warmup_cosine(iteration, training.iterations, warmup, 0.0)
            set_learning_rate(optimizer, training.optimizer.lr * ratio)
            key = NoiseKey(training.seed, step=iteration)
            loss = teacher_step_loss(denoiser, batches[0], key, training.label_dropout, training.time_sampling)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            # The average forgets the first, bad weights: its memory grows with the run.
            decay = min(training.ema, (1 + iteration) / (10 + iteration))
            with torch.no_grad():
                torch._foreach_lerp_(list(averaged.parameters()), list(denoiser.parameters()), 1 - decay)
            if on_step:
                on_step(iteration, loss.detach())
            if iteration % 50 == 49:
                bar.set_postfix(loss=f"{loss.item():.3f}")
            bar.update()
    finally:
        bar.close()
        loader.close()
    return averaged
