"""`dmd2-fast export`: a finished run's generator as a folder that plain diffusers loads, with its timesteps.

| format | folder |
| --- | --- |
| diffusers | unet/ (config.json, safetensors), scheduler/ (LCMScheduler's config); with `full`, the whole pipeline |
| lora | pytorch_lora_weights.safetensors in diffusers' names, scheduler/ |

A class-conditional UNet2DModel has no scheduler of diffusers that samples it; its folder is a denoiser's, which
another run can start from. Every folder has README.md, with the call that samples right, and generator.json, from which
`load_generator` and `dmd2-fast sample` take it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .errors import UserError
from .export import (
    ADAPTER_FILE,
    DTYPES,
    GENERATOR_FILE,
    FewStepGenerator,
    load_generator,
    read_metadata,
    takes_text,
)
from .lcm import scheduler_config
from .model_card import PIPELINES, model_card
from .networks import denoiser_settings, save_denoiser
from .networks.source import read_object
from .runs import METADATA_FILE, load_run_config
from .schedules import DDPMSchedule

COPIED = (".json", ".txt", ".model", ".safetensors")
"""Files of a pipeline that --full copies: no pickles, and no weights in other formats."""


def export_run(
    run_folder: str | os.PathLike, format: str, out: str | os.PathLike, *, full: bool = False, dtype: str = "float32"
) -> Path:
    """Write a run's generator into the new folder `out`, whole or not at all; weights in `dtype`.

    `full`: with copies of everything else of the pipeline in model.path. Raises `UserError` for a run that is not
    finished, for what it cannot be exported as, and for an `out` that exists.
    """
    run, out = Path(run_folder), Path(out)
    source = run / GENERATOR_FILE
    metadata = read_metadata(source)
    if "model" not in metadata:
        config = load_run_config(run)
        metadata["model"] = {"kind": config.model.kind, "path": config.model.path}
    is_lora = metadata.get("weights") == "lora"
    if format == "lora" and not is_lora:
        raise UserError(f"{run} trained every weight (model.lora null), so it has no adapter: use --format diffusers")
    pipeline = _pipeline_to_copy(metadata["model"], format) if full else None
    with new_folder(out) as folder:
        if format == "lora":
            shutil.copyfile(source, folder / ADAPTER_FILE)
            generator = FewStepGenerator(load_generator(source).denoiser, tuple(metadata["steps"]), metadata)
        else:
            generator = load_generator(source)
            metadata["weights"] = "unet"
            _write_unet(generator, folder, DTYPES[dtype])
        metadata |= denoiser_settings(generator.denoiser)
        baked = _write_scheduler(generator, folder)
        if pipeline is not None:
            _copy_pipeline(pipeline, folder)
        (folder / METADATA_FILE).write_text(json.dumps(metadata, indent=2) + "\n")
        (folder / "README.md").write_text(model_card(run.resolve().name, metadata, baked=baked, full=full))
        mode = (folder / "README.md").stat().st_mode  # safetensors makes its files private
        for file in folder.rglob("*.safetensors"):
            file.chmod(mode)
    return out


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `path` at the end; a block that fails leaves nothing behind."""
    path = path.absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists already: name a new folder, or remove it")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _pipeline_to_copy(model: dict[str, Any], format: str) -> Path:
    path = Path(model["path"])
    if format != "diffusers" or model["kind"] not in PIPELINES:
        raise UserError("--full makes a pipeline of --format diffusers, from a run whose model.kind is sd15 or sdxl")
    if not (path / "model_index.json").is_file():
        raise UserError(
            f"--full copies the rest of the pipeline from model.path, and there is no folder {str(path)!r} with a "
            "model_index.json: leave --full out; README.md then says how to load the UNet into the pipeline"
        )
    return path


def _write_unet(generator: FewStepGenerator, folder: Path, dtype: torch.dtype) -> None:
    network = generator.denoiser.network
    network.unet.register_to_config(sample_size=network.sample_size)  # the pipeline's default size
    network.unet.to(dtype)
    if takes_text(generator.denoiser):
        network.unet.save_pretrained(folder / "unet", safe_serialization=True)
    else:
        save_denoiser(generator.denoiser, folder)


def _write_scheduler(generator: FewStepGenerator, folder: Path) -> bool:
    """Write scheduler/ where LCMScheduler samples this generator; whether the number of steps alone gives the steps."""
    denoiser = generator.denoiser
    if not takes_text(denoiser):
        return False
    from diffusers import LCMScheduler

    assert isinstance(denoiser.schedule, DDPMSchedule)  # pipelines have no other
    config, baked = scheduler_config(denoiser.schedule, denoiser.prediction_type, generator.steps)
    LCMScheduler(**config).save_pretrained(folder / "scheduler")
    return baked


def _copy_pipeline(pipeline: Path, folder: Path) -> None:
    index = read_object(pipeline / "model_index.json")
    ours = {"unet": ["diffusers", "UNet2DConditionModel"], "scheduler": ["diffusers", "LCMScheduler"]}
    for name, value in index.items():
        part = isinstance(value, list) and value[0] is not None and name not in ours
        if not part or name.startswith("_"):
            continue
        if "/" in name or not (pipeline / name).is_dir():
            raise UserError(f"{pipeline} has no {name}/, which its model_index.json names: expected a whole pipeline")
        (folder / name).mkdir()
        for file in sorted((pipeline / name).iterdir()):
            if file.suffix in COPIED:
                shutil.copyfile(file, folder / name / file.name)
    (folder / "model_index.json").write_text(json.dumps({**index, **ours}, indent=2) + "\n")
