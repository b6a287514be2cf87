"""diffusers' UNet2DConditionModel, conditioned on text embeddings (SD1.5, SDXL), as the network of a denoiser."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ..denoiser import Condition
from .unet import UNet


class TextUNet(UNet):
    """Condition: `prompt_embeds` (N, L, D), and with SDXL's `text_time` also `pooled_prompt_embeds` (N, P) and
    `time_ids` (N, 6): original height and width, top and left of the crop, target height and width, in pixels.
    With `num_class_embeds`, also `class_labels` (N,) int64, of which the last class stands for none.

    What stands for no prompt: zeros for SDXL, and `null_prompt_embeds` (L, D), the empty prompt's, otherwise.
    """

    kind = "unet2d_condition"

    def __init__(self, unet: UNet2DConditionModel, patch_size: int = 1, sample_size: int | None = None):
        super().__init__(unet, patch_size, sample_size)
        config = unet.config
        if config.in_channels != config.out_channels:
            raise ValueError(
                f"UNet2DConditionModel: in_channels {config.in_channels}, out_channels {config.out_channels}: expected "
                "one number (inpainting and depth models are not supported)"
            )
        if config.center_input_sample or any("Skip" in n for n in (*config.down_block_types, *config.up_block_types)):
            raise ValueError("UNet2DConditionModel: skip blocks and center_input_sample are not supported")
        wrong = [
            f"{name} {getattr(config, name)!r}"
            for name in ("class_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")
            if getattr(config, name) is not None
        ]
        if config.addition_embed_type not in (None, "text_time"):
            wrong.append(f"addition_embed_type {config.addition_embed_type!r}")
        if not isinstance(config.cross_attention_dim, int):
            wrong.append(f"cross_attention_dim {config.cross_attention_dim!r}")
        if wrong:
            raise ValueError(f"UNet2DConditionModel: {', '.join(wrong)}: expected what SD1.5 and SDXL have")
        self.pooled = config.addition_embed_type == "text_time"
        self.null_label = None if config.num_class_embeds is None else config.num_class_embeds - 1
        self.null_prompt_embeds: Tensor | None = None

    @classmethod
    def from_config(cls, config: dict, patch_size: int = 1, sample_size: int | None = None) -> TextUNet:
        """Random weights from UNet2DConditionModel's keyword arguments."""
        return cls(UNet2DConditionModel(**config), patch_size, sample_size)

    @property
    def condition_shapes(self) -> dict[str, tuple[int | None, ...]]:
        config = self.unet.config
        shapes: dict[str, tuple[int | None, ...]] = {"prompt_embeds": (None, config.cross_attention_dim)}
        if self.pooled:
            num_ids = 6
            width = config.projection_class_embeddings_input_dim - num_ids * config.addition_time_embed_dim
            shapes |= {"pooled_prompt_embeds": (width,), "time_ids": (num_ids,)}
        if self.null_label is not None:
            shapes["class_labels"] = ()
        return shapes

    def unconditional(self, condition: Condition) -> Condition:
        """The condition of the same batch without its prompts; `time_ids` stay. `ValueError` when nothing says how."""
        if self.null_label is not None:
            condition = {**condition, "class_labels": torch.full_like(condition["class_labels"], self.null_label)}
        if self.pooled:
            empty = {name: torch.zeros_like(condition[name]) for name in ("prompt_embeds", "pooled_prompt_embeds")}
            return {**condition, **empty}
        prompts = condition["prompt_embeds"]
        if self.null_prompt_embeds is None:
            raise ValueError("null_prompt_embeds is None: expected the embedding (L, D) of the empty prompt")
        return {**condition, "prompt_embeds": self.null_prompt_embeds.to(prompts).expand_as(prompts)}

    def _embed(self, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        unet, context = self.unet, condition["prompt_embeds"].to(x.dtype)
        embedding = unet.time_embedding(unet.time_proj(t).to(x.dtype))
        if self.null_label is not None:
            embedding = embedding + unet.class_embedding(condition["class_labels"]).to(x.dtype)
        if self.pooled:
            pooled = condition["pooled_prompt_embeds"]
            times = unet.add_time_proj(condition["time_ids"].flatten()).reshape(len(pooled), -1)
            embedding = embedding + unet.add_embedding(torch.cat([pooled, times], 1).to(x.dtype))
        return embedding if unet.time_embed_act is None else unet.time_embed_act(embedding), context
