"""What surrounds the UNet in a diffusers pipeline: text encoders, SDXL's size conditions, the image codec.

Everything comes from the pipeline's own folder or hub id, as safetensors. The values are those of diffusers'
StableDiffusionXLPipeline.encode_prompt, StableDiffusionPipeline.encode_prompt and AutoencoderKL.

Shapes: N prompts or images, L tokens (77), D width of their embeddings, P width of the pooled one, f the VAE's factor.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .denoiser import Condition
from .errors import UserError
from .networks.source import is_hub_id

NAMES = {"sd15": ("",), "sdxl": ("", "_2")}
"""Endings of the folders tokenizer and text_encoder, by model.kind."""


def time_ids(
    original_size: tuple[int, int], crop_top_left: tuple[int, int], target_size: tuple[int, int], num: int | None = None
) -> Tensor:
    """SDXL's size condition (6,) f32, or (num, 6): each argument (height, width) or (top, left) in pixels."""
    values = torch.tensor([*original_size, *crop_top_left, *target_size], dtype=torch.float32)
    return values if num is None else values.repeat(num, 1)


class TextEncoders:
    """The tokenizers and text encoders of a pipeline: one of each for SD1.5, two for SDXL."""

    def __init__(self, kind: str, tokenizers: Sequence[Any], encoders: Sequence[nn.Module]):
        self.kind, self.tokenizers = kind, list(tokenizers)
        self.encoders = [encoder.eval().requires_grad_(False) for encoder in encoders]

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        kind: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> TextEncoders:
        """From a pipeline's folder or hub id; `kind` is model.kind. `UserError` where it has no such parts."""
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        if kind not in NAMES:
            raise UserError(f'model.kind is "{kind}", which has no text encoders: expected one of {", ".join(NAMES)}')
        tokenizers, encoders = [], []
        for ending in NAMES[kind]:
            model = CLIPTextModelWithProjection if ending else CLIPTextModel
            tokenizers.append(_part(path, f"tokenizer{ending}", CLIPTokenizer.from_pretrained))
            encoders.append(_part(path, f"text_encoder{ending}", model.from_pretrained, dtype=dtype).to(device))
        return cls(kind, tokenizers, encoders)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        """Embeddings in the encoders' dtype; longer prompts are cut to L tokens, shorter ones padded.

        sdxl: prompt_embeds (N, L, D), both encoders' penultimate hidden states side by side, and pooled_prompt_embeds
        (N, P), the projection of the second. sd15: prompt_embeds (N, L, D), the last hidden state.
        """
        outputs = [self._run(*pair, prompts) for pair in zip(self.tokenizers, self.encoders, strict=True)]
        if self.kind == "sd15":
            return {"prompt_embeds": outputs[0].last_hidden_state}
        embeds = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": outputs[-1].text_embeds}

    def unconditional(self) -> Condition:
        """What stands for no prompt, of one sample (N = 1): zeros for SDXL, the empty prompt for SD1.5."""
        empty = self.encode([""])
        return empty if self.kind == "sd15" else {name: torch.zeros_like(value) for name, value in empty.items()}

    @staticmethod
    def _run(tokenizer: Any, encoder: nn.Module, prompts: Sequence[str]) -> Any:
        tokens = tokenizer(
            list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
            return_tensors="pt",
        )  # fmt: skip
        return encoder(tokens.input_ids.to(next(encoder.parameters()).device), output_hidden_states=True)


class LatentCodec:
    """The pipeline's AutoencoderKL, between images in [-1, 1] and the latents that the UNet knows.

    latents = (encoded - shift) * scale / std, with the VAE's scaling_factor and, where its config has them,
    shift_factor or latents_mean and latents_std. It runs in f32 where the config says force_upcast, whatever dtype is
    asked for.
    """

    def __init__(self, vae: Any):
        self.vae, config = vae.eval().requires_grad_(False), vae.config
        self.factor: int = latent_factor(config)
        self._scale, self._shift = float(config.scaling_factor), torch.tensor(float(config.get("shift_factor") or 0))
        self._std = torch.ones(())
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            self._shift = torch.tensor(config.latents_mean, dtype=torch.float32).reshape(1, -1, 1, 1)
            self._std = torch.tensor(config.latents_std, dtype=torch.float32).reshape(1, -1, 1, 1)

    @classmethod
    def load(
        cls, path: str | os.PathLike, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> LatentCodec:
        """From a pipeline's folder or hub id; `UserError` where it has no VAE."""
        from diffusers import AutoencoderKL

        vae = _part(path, "vae", AutoencoderKL.from_pretrained, torch_dtype=torch.float32)
        if not vae.config.get("force_upcast", True):
            vae = vae.to(dtype)
        return cls(vae.to(device))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] to (N, C, H / f, W / f) f32: the mean of the VAE's Gaussian, not a draw from it."""
        mean = self.vae.encode(images.to(self.vae.dtype)).latent_dist.mode().float()
        return (mean - self._shift.to(mean.device)) * self._scale / self._std.to(mean.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) to (N, 3, h f, w f) f32, about in [-1, 1], not clamped."""
        return self.decode_with_gradient(latents)

    def decode_with_gradient(self, latents: Tensor) -> Tensor:
        """`decode`, differentiable."""
        values = latents.float() * self._std.to(latents.device) / self._scale + self._shift.to(latents.device)
        return self.vae.decode(values.to(self.vae.dtype)).sample.float()


def latent_factor(vae_config: Any) -> int:
    """Pixels a latent, each way."""
    return 2 ** (len(vae_config["block_out_channels"]) - 1)


def latent_shape(path: str | os.PathLike, resolution: int) -> tuple[int, int, int]:
    """(C, h, w) of the latents of square images, from the VAE's config alone. `UserError` where it has no VAE."""
    from diffusers import AutoencoderKL

    config = _part(path, "vae", AutoencoderKL.load_config, weights=False)
    side = resolution // latent_factor(config)
    return config["latent_channels"], side, side


def _part(path: str | os.PathLike, name: str, load: Callable[..., Any], *, weights: bool = True, **options: Any) -> Any:
    """`load` of one subfolder of a pipeline; `UserError` in one line for whatever diffusers or transformers raise."""
    if not Path(path).is_dir() and not is_hub_id(path):
        raise UserError(
            f"model.path: there is no folder {str(path)!r}: expected a diffusers pipeline's, with {name}/ in it, or a "
            "hub id such as stabilityai/stable-diffusion-xl-base-1.0"
        )
    if Path(path).is_dir() and not (Path(path) / name).is_dir():
        raise UserError(f"model.path: {path} has no {name}/: expected a whole diffusers pipeline")
    if weights and not name.startswith("tokenizer"):
        options["use_safetensors"] = True  # pickled weights run code
    try:
        with _quiet():
            return load(str(path), subfolder=name, **options)
    except Exception as error:  # missing or damaged files: OSError, ValueError, SafetensorError, RuntimeError ...
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        where = f"{path}/{name}" if Path(path).is_dir() else f"{name} of the hub's {path}"
        raise UserError(f"model.path: {where} cannot be loaded: {first}") from error


@contextmanager
def _quiet():
    """Without the libraries' advice (accelerate, torchvision) and their bars for loading a few tensors."""
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels, bars = [logger.level for logger in loggers], transformers_logging.is_progress_bar_enabled()
    try:
        transformers_logging.disable_progress_bar()
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
