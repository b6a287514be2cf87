"""diffusers' UNet2DModel, class-conditional, as the network of a denoiser."""

from __future__ import annotations

import torch
from diffusers import UNet2DModel
from torch import Tensor

from ..denoiser import Condition
from .unet import UNet


class UNet2D(UNet):
    """Condition: `class_labels` (N,) int64, of which the last class stands for none."""

    kind = "unet2d"

    def __init__(self, unet: UNet2DModel, patch_size: int = 1, sample_size: int | None = None):
        super().__init__(unet, patch_size, sample_size)
        config = unet.config
        if config.in_channels != config.out_channels or config.in_channels % patch_size**2:
            raise ValueError(
                f"in_channels {config.in_channels} and out_channels {config.out_channels}: expected one number, "
                f"divisible by patch_size^2 = {patch_size**2}"
            )
        if config.center_input_sample or any("Skip" in n for n in (*config.down_block_types, *config.up_block_types)):
            raise ValueError("UNet2DModel: skip blocks and center_input_sample are not supported")
        if config.time_embedding_type != "positional" or config.class_embed_type is not None:
            raise ValueError("UNet2DModel: expected time_embedding_type 'positional' and class_embed_type null")
        self.null_label = None if config.num_class_embeds is None else config.num_class_embeds - 1

    @classmethod
    def from_config(cls, config: dict, patch_size: int = 1, sample_size: int | None = None) -> UNet2D:
        """Random weights from UNet2DModel's keyword arguments."""
        return cls(UNet2DModel(**config), patch_size, sample_size)

    @property
    def condition_shapes(self) -> dict[str, tuple[int | None, ...]]:
        return {"class_labels": ()}

    def unconditional(self, condition: Condition) -> Condition:
        """The condition of the same batch without its class: the last class embedding stands for none."""
        return {"class_labels": torch.full_like(condition["class_labels"], self.null_label)}

    def _embed(self, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, None]:
        unet = self.unet
        embedding = unet.time_embedding(unet.time_proj(t).to(x.dtype))
        if unet.class_embedding is not None:
            embedding = embedding + unet.class_embedding(condition["class_labels"]).to(x.dtype)
        return embedding, None
