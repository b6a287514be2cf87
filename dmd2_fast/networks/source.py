"""Where a teacher comes from: a denoiser's folder, or a diffusers pipeline (folder or hub id).

A denoiser's folder holds `denoiser.json` and `unet/`; a pipeline holds `unet/` and `scheduler/`, whose betas and
prediction type are the denoiser's. Weights are safetensors, in one file or several with an index.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import UserError
from ..schedules import NUM_TIMESTEPS

if TYPE_CHECKING:
    from ..config_schema import ModelConfig

SETTINGS_FILE = "denoiser.json"
WEIGHTS = "diffusion_pytorch_model"
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
HUB_FILES = (
    "model_index.json", "scheduler/*.json", "unet/config.json", f"unet/{WEIGHTS}.safetensors",
    f"unet/{WEIGHTS}.safetensors.index.json", f"unet/{WEIGHTS}-*-of-*.safetensors",
)  # fmt: skip
PIPELINE_KINDS = ("sd15", "sdxl")


@dataclass(frozen=True)
class Source:
    """A teacher that can be built (`settings`, for `build_denoiser`) and whose tensors can be read one by one."""

    settings: dict[str, Any]
    folder: Path
    """Holds unet/."""
    weights: Path | None = None
    """A file of weights that takes the place of the folder's."""

    @property
    def files(self) -> list[Path]:
        """The safetensors files of the UNet; `UserError` when there are none."""
        if self.weights is not None:
            return [self.weights]
        unet = self.folder / "unet"
        index = unet / f"{WEIGHTS}.safetensors.index.json"
        if not index.exists():
            return [unet / f"{WEIGHTS}.safetensors"]
        names = read_object(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) and "/" not in name for name in names.values()):
            raise UserError(f"model.path: {index} has no weight_map of file names")
        return [unet / name for name in dict.fromkeys(names.values())]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all tensors, from the files' headers; `UserError` when one is missing or damaged."""
        found: dict[str, tuple[int, ...]] = {}
        for path in self.files:
            found |= weights_shapes(path)
        return found

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) one after another, each read when it is asked for."""
        import safetensors

        with ExitStack() as stack:
            for path in self.files:
                try:
                    file = stack.enter_context(safetensors.safe_open(str(path), framework="pt"))
                    names = list(file.keys())
                except (OSError, safetensors.SafetensorError) as error:
                    raise UserError(f"model.path: {path} cannot be read: {error}") from error
                for name in names:
                    yield name, file.get_tensor(name)


def weights_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a weights file, from its header; `UserError` when it is missing, truncated or damaged."""
    import safetensors

    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        other = sorted(item.name for item in path.parent.glob(f"{WEIGHTS}*")) if path.parent.is_dir() else []
        hint = f"; the folder has {', '.join(other)}: save it again with safe_serialization" if other else ""
        raise UserError(f"model.path: {path} cannot be read: {error}{'' if path.exists() else hint}") from error


def read_object(path: Path) -> dict[str, Any]:
    """The object of a model's JSON file; `UserError` when it is unreadable or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"model.path: {path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"model.path: {path} holds no object {{...}}")
    return value


def open_source(model: ModelConfig) -> Source:
    """The teacher of a config; `UserError` when it is missing or no model of that kind."""
    if model.kind not in PIPELINE_KINDS:
        folder = Path(model.path)
        return Source(_with_size(read_settings(folder), model.sample_size), folder)
    folder = pipeline_folder(model.path)
    config = public_settings(read_object(folder / "unet" / "config.json"))
    pooled = config.get("addition_embed_type") == "text_time"
    if pooled != (model.kind == "sdxl"):
        other = "sdxl" if pooled else "sd15"
        raise UserError(
            f'model.kind is "{model.kind}", but {folder}/unet is conditioned as "{other}" is: set it to that.'
        )
    settings = {
        "network": {"kind": "unet2d_condition", "config": config},
        **_noise_settings(folder / "scheduler" / "scheduler_config.json"),
    }
    return Source(_with_size(settings, model.sample_size), folder)


def open_start(model: ModelConfig, run_folder: str, network: str) -> Source:
    """`open_source` with the weights of a finished run's "generator" or "fake_score"; `UserError` without them."""
    path = Path(run_folder) / f"{network}.safetensors"
    if not path.is_file():
        raise UserError(
            f"run.start_from: there is no {path}: expected the folder of a finished run, which writes it at its end"
        )
    return replace(open_source(model), weights=path)


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a denoiser's folder, for `build_denoiser`; `UserError` when they are missing or unreadable."""
    if not (folder / SETTINGS_FILE).exists():
        raise UserError(
            f"model.path: there is no denoiser in {str(folder)!r} (no {SETTINGS_FILE}); "
            "train one with `dmd2-fast teacher --config ...`, or name a folder that has one"
        )
    return read_object(folder / SETTINGS_FILE)


def is_hub_id(path: str | os.PathLike) -> bool:
    """Whether a model's path names no file or folder here, and can be a Hugging Face id."""
    return not Path(path).exists() and HUB_ID.fullmatch(str(path)) is not None


@lru_cache(maxsize=8)
def pipeline_folder(path: str) -> Path:
    """A diffusers pipeline as a folder: itself, or the UNet and scheduler of a hub id in Hugging Face's cache."""
    if (Path(path) / "unet" / "config.json").is_file():
        return Path(path)
    if not is_hub_id(path):
        raise UserError(
            f"model.path: {path!r} is no diffusers pipeline (it has no unet/config.json): expected a folder with unet/ "
            "and scheduler/, or a hub id such as stabilityai/stable-diffusion-xl-base-1.0"
        )
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(path, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # of many libraries: no such model, a token is asked for, no network
        raise UserError(
            f"model.path: there is no folder {path!r}, and the Hugging Face hub gave none of that name: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _noise_settings(path: Path) -> dict[str, Any]:
    """Schedule and prediction type of a pipeline's scheduler; `UserError` for what the DDPM schedule is not."""
    config = read_object(path)
    prediction_type = config.get("prediction_type", "epsilon")
    expected = {"beta_schedule": "scaled_linear", "num_train_timesteps": NUM_TIMESTEPS, "rescale_betas_zero_snr": False}
    wrong = [f"{key} {config[key]!r}" for key, value in expected.items() if config.get(key, value) != value]
    if config.get("trained_betas") is not None:
        wrong.append("trained_betas")
    if prediction_type not in ("epsilon", "v_prediction", "sample"):
        wrong.append(f"prediction_type {prediction_type!r}")
    if wrong:
        raise UserError(
            f"model.path: {path} has {', '.join(wrong)}: expected Stable Diffusion's scaled-linear DDPM betas"
        )
    betas = {"beta_start": config.get("beta_start", 0.00085), "beta_end": config.get("beta_end", 0.012)}
    return {"schedule": {"kind": "ddpm", **betas}, "prediction_type": prediction_type, "preconditioning": "none"}


def public_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A diffusers configuration without what it notes of itself (class, version, path)."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _with_size(settings: dict[str, Any], sample_size: int | None) -> dict[str, Any]:
    network = settings.get("network")
    if sample_size is None or not isinstance(network, dict):
        return settings
    return {**settings, "network": {**network, "sample_size": sample_size}}
