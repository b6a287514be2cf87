"""What can be found wrong with a run's inputs before any rank meets another: the teacher, the data, and their fit.

Every rank checks for itself and finds the same. No weights are read and no network is filled: the teacher is built on
the meta device, and its file is asked for names and shapes. Large data are only looked for; the loader checks them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .algorithm import Algorithm
from .config import Config
from .data.dataset import Dataset, ImageDataset, open_dataset
from .data.latents import LATENTS, NOISE, Description, LatentDataset, read_description
from .data.loader import choose_loader
from .data.shards import file_size, find_shards
from .denoiser import Denoiser
from .errors import ConfigError, DataError
from .networks import build_without_weights, check_shapes, tensor_shapes
from .networks.lora import check_targets
from .networks.skip import check_layers
from .networks.source import open_source, open_start
from .pipeline import NAMES as ENCODER_NAMES

SMALL_BYTES = 32 << 20
"""Shards up to this size in all are read through; more are left to the loader, which must read their headers anyway."""


def check_inputs(config: Config) -> None:
    """Refuse, with a UserError, a run that cannot work with this teacher and these data."""
    teacher = _teacher_without_weights(config)
    check_teacher(config, teacher)
    choose_loader(config.data.loader)
    check_previews(config)
    check_regression(config, teacher)
    for split in ("train", "test"):
        if split == "test" and not any(Path(config.data.path).glob("test-*.tar")):
            continue  # such a run is not evaluated
        _check_split(config, teacher, split)


def check_teacher(config: Config, teacher: Denoiser) -> None:
    """Refuse a teacher that knows no classes, or that the configured steps and feature levels do not fit."""
    path = config.model.path
    if config.model.kind == "unet2d" and teacher.network.null_label is None:
        raise ConfigError(f"model.path: the network of {path} takes no class: expected num_class_embeds.")
    try:
        teacher.steps(config.generator.steps)
    except ValueError as error:
        raise ConfigError(f"generator.steps do not fit the schedule of {path}: {error}") from None
    try:
        for level in config.adversarial.levels:
            teacher.network.feature_shape(level)
    except ValueError as error:
        raise ConfigError(f"adversarial.levels do not fit the network of {path}: {error}") from None
    if config.teacher.skip_layer_guidance is not None:
        try:
            check_layers(teacher.network.unet, config.teacher.skip_layer_guidance.layers)
        except ValueError as error:
            raise ConfigError(f"teacher.skip_layer_guidance.layers: {error} ({path}).") from None
    if config.model.lora is not None:
        check_targets(teacher.network.unet, config.model.lora)


def check_previews(config: Config) -> None:
    """Refuse grids of prompts from a pipeline without what they take: its VAE, and text encoders for given prompts."""
    model, run = config.model, config.run
    if model.kind == "unet2d" or not run.sample_interval:
        return
    needed = ["vae/config.json"]
    if run.sample_prompts:
        needed += [f"{part}{end}/" for end in ENCODER_NAMES[model.kind] for part in ("tokenizer", "text_encoder")]
    missing = [part for part in needed if Path(model.path).is_dir() and not (Path(model.path) / part).exists()]
    if missing:
        raise ConfigError(
            f"run.sample_interval is {run.sample_interval}, but {model.path} has no {', '.join(missing)}, which grids "
            "of samples take: name a whole pipeline, or set run.sample_interval 0."
        )


def check_regression(config: Config, teacher: Denoiser) -> None:
    """Refuse a regression loss whose pairs are not there or do not fit, or whose distance is not installed."""
    folder = config.regression.path
    if not config.regression.is_on or folder is None:
        return
    check_lpips(config)
    try:
        find_shards(Path(folder), "train")
        description = read_description(folder)
        check_latents(config, teacher, description)
    except (ConfigError, DataError) as error:
        message = str(error).replace("data.path", "regression.path").replace(config.data.path, folder)
        raise ConfigError(f"{message} (`dmd2-fast pairs` makes the teacher's pairs.)") from None
    if not {NOISE, LATENTS} <= description.shapes.keys():
        raise ConfigError(
            f"regression.path: {folder} holds {', '.join(sorted(description.shapes))}, expected noise and latents: "
            "make it with `dmd2-fast pairs`."
        )


def check_lpips(config: Config) -> None:
    """Refuse `regression.loss: "lpips"` where the package is not installed, or latents have no VAE to decode them."""
    if config.regression.loss != "lpips":
        return
    if importlib.util.find_spec("lpips") is None:
        raise ConfigError(
            'regression.loss is "lpips", and the package is not installed: `pip install lpips torchvision`, or set '
            'regression.loss "mse".'
        )
    path = Path(config.model.path)
    if config.model.kind != "unet2d" and path.is_dir() and not (path / "vae" / "config.json").is_file():
        raise ConfigError(f'regression.loss is "lpips" of decoded images, but {path} has no vae/: set it "mse".')


def check_data(config: Config, teacher: Denoiser, split: str, dataset: Dataset) -> None:
    """Refuse samples that the teacher, or the configured losses, cannot take."""
    if isinstance(dataset, LatentDataset):
        check_latents(config, teacher, dataset)
    elif isinstance(dataset, ImageDataset):
        check_images(config, teacher, split, dataset.image_shape, int(dataset.labels.max()) + 1)


def check_latents(config: Config, teacher: Denoiser, data: LatentDataset | Description) -> None:
    """Refuse latents or conditions of shapes that the teacher does not take, and a GAN without real samples."""
    folder, path, expected = config.data.path, config.model.path, teacher.network.image_shape
    if data.sample_shape != expected:
        raise ConfigError(
            f"data.path: {folder} holds samples of (channels, height, width) {data.sample_shape}, and the teacher in "
            f"{path} takes {expected}: set model.sample_size to {data.sample_shape[-1]}, prepare the data at another "
            "--resolution, or name another teacher."
        )
    for name, shape in teacher.network.condition_shapes.items():
        found = data.shapes.get(name)
        if found is None or not _fits(found, shape):
            shown = ", ".join("any" if side is None else str(side) for side in shape)
            raise ConfigError(
                f"data.path: {folder} holds samples with {name} of shape {found or 'none at all'}, and the teacher in "
                f"{path} takes ({shown}): prepare the data with this model's own text encoders."
            )
    weight = config.adversarial.discriminator_weight
    if LATENTS not in data.shapes and weight > 0:
        raise ConfigError(
            f"adversarial.discriminator_weight is {weight:g}, but {folder} holds prompts alone, and a GAN needs real "
            "images to tell from generated ones: set adversarial.generator_weight and discriminator_weight to 0, or "
            "prepare images with captions (dmd2-fast prepare --images)."
        )
    if LATENTS not in data.shapes and config.generator.input != "backward_simulation":
        raise ConfigError(
            f"generator.input is {config.generator.input}, but {folder} holds prompts alone, and there are no real "
            'images to noise: set it "backward_simulation", or prepare images (dmd2-fast prepare --images).'
        )


def _fits(found: tuple[int, ...], shape: tuple[int | None, ...]) -> bool:
    return len(found) == len(shape) and all(side in (None, own) for side, own in zip(shape, found, strict=True))


def check_images(config: Config, teacher: Denoiser, split: str, image_shape: tuple[int, ...], num_classes: int) -> None:
    """Refuse images (C, H, W) or labels that the teacher does not take."""
    folder, expected, known = config.data.path, teacher.network.image_shape, teacher.network.null_label
    if tuple(image_shape) != expected:
        raise ConfigError(
            f"data.path: {folder} holds {split} images of (channels, height, width) {tuple(image_shape)}, and the "
            f"teacher in {config.model.path} takes {expected}: name other data, or another teacher."
        )
    if num_classes > known:
        raise ConfigError(
            f"data.path: {folder} holds {split} labels up to {num_classes - 1}, and the teacher in {config.model.path} "
            f"knows {known} classes (num_class_embeds {known + 1}, the last for none)."
        )


def _teacher_without_weights(config: Config) -> Denoiser:
    sources = [open_source(config.model)]
    if config.run.start_from is not None:
        started = ("generator", "fake_score")[: 2 if Algorithm.from_config(config).keeps_fake_score else 1]
        sources += [open_start(config.model, config.run.start_from, name) for name in started]
    teacher = build_without_weights(sources[0].settings)
    for source in sources:
        check_shapes(
            tensor_shapes(teacher.network.unet), source.shapes(), str(source.weights or source.folder / "unet")
        )
    return teacher


def _check_split(config: Config, teacher: Denoiser, split: str) -> None:
    folder = Path(config.data.path)
    if config.data.kind == "latents":
        find_shards(folder, split)
        check_latents(config, teacher, read_description(folder))
    if sum(map(file_size, find_shards(folder, split))) > SMALL_BYTES:
        return
    dataset = open_dataset(config.data.kind, folder, split)
    try:
        check_data(config, teacher, split, dataset)
    finally:
        dataset.close()
