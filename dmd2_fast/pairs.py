"""`dmd2-fast pairs`: a teacher's noise-image pairs, for the regression loss of one-step generators and of DMD.

Pair i is noise n_i and what the teacher makes of it, under the condition of the training split's sample i, by the
deterministic sampler of its probability-flow ODE: Heun for Karras schedules, else Euler, which is DDIM. Noise is keyed
by i alone, so neither batches nor interruptions show in the result. Written as LatentDataset reads it: KEY.safetensors
with `noise` (C, h, w) f32 of unit variance, `latents` (C, h, w) f32 (images, for a unet2d) and the conditions.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .config import Config
from .data.dataset import Dataset, open_dataset
from .data.latents import DESCRIPTION, LATENTS, NOISE, UNCONDITIONAL, LatentDataset
from .data.shards import write_shard
from .denoiser import Condition, Denoiser
from .errors import ConfigError, DataError
from .export import BATCH_SIZE, DTYPES, TEXT_BATCH_SIZE, takes_text
from .locks import acquire
from .networks import load_denoiser
from .preflight import check_data
from .random import NoiseKey, Stream, philox_normal
from .rollout import Guidance, denoiser_of, sample_ode
from .runs import read_json, write_json

SETTINGS_FILE = "pairs.json"
PAIRS_PER_SHARD = 500
PAIRS_STEP = 2**32 - 2
"""NoiseKey.step of the pairs' noise: neither training nor sampling draws the same."""


@dataclass(frozen=True)
class PairsOptions:
    """How pairs are made; `num_steps` are the sampler's, of which one of Heun's takes two evaluations."""

    num: int
    num_steps: int = 50
    guidance_scale: float | None = None
    """None: the config's teacher.guidance_scale."""
    batch_size: int | None = None
    dtype: str | None = None
    """Of the teacher's weights; None: bf16 for text on a GPU, else f32."""


def make_pairs(config: Config, options: PairsOptions) -> Path:
    """Write `regression.path`, or go on where an interrupted call stopped; its shards are whole or not there.

    Raises ConfigError without a path, and DataError for a folder that holds something else.
    """
    if config.regression.path is None:
        raise ConfigError("regression.path is null: it names the folder that the pairs are written to.")
    folder = Path(config.regression.path)
    guidance = Guidance.from_config(config)
    if options.guidance_scale is not None:
        guidance = replace(guidance, scale=options.guidance_scale)
    settings = {
        "model": config.model.path, "data": config.data.path, "seed": config.run.seed, "num": options.num,
        "num_steps": options.num_steps, "guidance_scale": guidance.scale,
    }  # fmt: skip
    if guidance.skip_scale:
        settings["skip_layer_guidance"] = [guidance.skip_scale, *guidance.skip_layers]
    _claim(folder, settings)
    with acquire(folder / ".lock", str(folder)):
        if not (folder / DESCRIPTION).is_file():
            dataset = open_dataset(config.data.kind, config.data.path, "train")
            try:
                _write(config, options, guidance, folder, dataset)
            finally:
                dataset.close()
    return folder


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Say in the folder what it is for; DataError where it is for something else."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"regression.path: {folder} cannot be made ({error.strerror}).") from None
    found = read_json(folder / SETTINGS_FILE)
    if found and found != settings:
        wrong = ", ".join(f"{key} {found.get(key)!r}" for key in settings if found.get(key) != settings[key])
        raise DataError(f"regression.path: {folder} holds pairs made with {wrong}: name another folder, or remove it.")
    if not found:
        if any(folder.iterdir()):
            raise DataError(f"regression.path: {folder} holds something else than pairs: name a new folder.")
        write_json(folder / SETTINGS_FILE, settings)


def _write(config: Config, options: PairsOptions, guidance: Guidance, folder: Path, dataset: Dataset) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = load_denoiser(config.model)
    check_data(config, teacher, "train", dataset)
    text = takes_text(teacher)
    dtype = DTYPES[options.dtype or ("bfloat16" if text and device.type == "cuda" else "float32")]
    teacher = teacher.to(device, dtype).requires_grad_(False)
    _give_unconditional(teacher, dataset)
    batch_size = options.batch_size or (TEXT_BATCH_SIZE if text else BATCH_SIZE)
    with tqdm(total=options.num, desc="pairs", unit="pair", disable=not config.run.progress) as bar:
        for shard, first in enumerate(range(0, options.num, PAIRS_PER_SHARD)):
            path, last = folder / f"train-{shard:06d}.tar", min(first + PAIRS_PER_SHARD, options.num)
            if path.exists():
                bar.update(last - first)
                continue
            samples = _samples(
                config, options.num_steps, guidance, teacher, dataset, range(first, last), batch_size, bar
            )
            write_shard(path, _members(samples, first))
    _write_unconditional(config, teacher, folder)
    shape = list(teacher.network.image_shape)
    fields: dict[str, Any] = {name: {"shape": shape, "dtype": "float32"} for name in (LATENTS, NOISE)}
    for name, value in _conditions(dataset, torch.zeros(1, dtype=torch.int64)).items():
        stored = _as_stored(dataset, name, value)
        fields[name] = {"shape": list(value.shape[1:]), "dtype": str(stored.dtype).removeprefix("torch.")}
    write_json(
        folder / DESCRIPTION, {"kind": "pairs", "num_samples": options.num, "sample_shape": shape, "fields": fields}
    )


def _give_unconditional(teacher: Denoiser, dataset: Dataset) -> None:
    """SD1.5's teacher must know the empty prompt's embedding, which the data have."""
    if isinstance(dataset, LatentDataset) and hasattr(teacher.network, "null_prompt_embeds"):
        teacher.network.null_prompt_embeds = dataset.unconditional.get("prompt_embeds")


def _samples(
    config: Config,
    num_steps: int,
    guidance: Guidance,
    teacher: Denoiser,
    dataset: Dataset,
    indices: range,
    batch_size: int,
    bar: tqdm,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(i, its tensors without batch dimension) for pairs i in `indices`."""
    device = next(teacher.parameters()).device
    shape, schedule = teacher.network.image_shape, teacher.schedule
    times = schedule.sampling_times(num_steps, teacher.prediction_type).to(device)
    denoise, heun = denoiser_of(teacher, guidance), schedule.kind == "karras"
    key = NoiseKey(config.run.seed, step=PAIRS_STEP, stream=Stream.GENERATOR_INPUT)
    for start in range(indices.start, indices.stop, batch_size):
        ids = torch.arange(start, min(start + batch_size, indices.stop))
        condition = _conditions(dataset, ids % dataset.num_samples)
        noise = philox_normal(ids.to(device), shape, key)
        x = noise * schedule.init_sigma(times[:1])
        on_device = {name: value.to(device) for name, value in condition.items()}
        latents = sample_ode(denoise, schedule, times, x, on_device, heun=heun)
        if not bool(torch.isfinite(latents).all()):
            raise DataError(f"samples of the teacher in {config.model.path} are not finite: try --dtype float32.")
        stored = {name: _as_stored(dataset, name, value) for name, value in condition.items()}
        stored |= {NOISE: noise.cpu(), LATENTS: latents.float().cpu()}
        for row, index in enumerate(ids.tolist()):
            yield index, {name: value[row].contiguous() for name, value in stored.items()}
        bar.update(len(ids))


def _conditions(dataset: Dataset, rows: Tensor) -> Condition:
    raw = torch.stack([torch.from_numpy(dataset.decode(int(row)).copy()) for row in rows])
    return dataset.batch(raw, rows, rows).condition


def _as_stored(dataset: Dataset, name: str, value: Tensor) -> Tensor:
    """A condition in the dtype it has in the data's shards, from which it was widened."""
    return value.to(dataset.dtypes[name]) if isinstance(dataset, LatentDataset) else value


def _members(samples: Iterator[tuple[int, dict[str, Tensor]]], first: int) -> Iterator[tuple[str, bytes]]:
    from safetensors.torch import save

    for index, tensors in samples:
        yield f"{index:09d}.safetensors", save(tensors)


def _write_unconditional(config: Config, teacher: Denoiser, folder: Path) -> None:
    from safetensors.torch import save_file

    source = Path(config.data.path) / UNCONDITIONAL
    if source.is_file():
        shutil.copyfile(source, folder / UNCONDITIONAL)
    else:
        save_file({"class_labels": torch.tensor(teacher.network.null_label)}, folder / UNCONDITIONAL)


def pairs_summary(folder: Path) -> str:
    """One line on a finished folder."""
    settings = json.loads((folder / SETTINGS_FILE).read_text())
    return f"{folder}: {settings['num']} pairs, {settings['num_steps']} steps, guidance {settings['guidance_scale']:g}"
