"""diffusers' UNet2DModel, class-conditional, as the network of a denoiser.

The forward is written over the UNet's public blocks, because a GAN head wants features of the encoder, often without
the decoder: `decode_rows` says how many leading rows of the batch go on through the decoder. State dict keys are the
UNet's own, so a folder saved by diffusers loads here and back.

Shapes: N batch, C channels, H x W pixels, p patch size (pixels are folded into channels, `pixel_unshuffle`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor, nn

from ..denoiser import Condition


class Float32Conv2d(nn.Conv2d):
    """A convolution in f32 whatever its weights are kept in: the last layer, whose output must not be rounded."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return self._conv_forward(x.float(), self.weight.float(), bias)


class UNet2D(nn.Module):
    """`forward(x (N, C, H, W), t (N,), condition, ...)` -> (output of the first `decode_rows` rows or None, features).

    `levels` names the features wanted: "mid" (the bottleneck, after the middle block) or "down.i" (after down block i).
    """

    def __init__(self, unet: UNet2DModel, patch_size: int = 1):
        super().__init__()
        self.unet = unet
        self.patch_size = patch_size
        config = unet.config
        for name, value in (("sample_size", config.sample_size), ("patch_size", patch_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}: expected a whole number >= 1")
        if config.in_channels != config.out_channels or config.in_channels % patch_size**2:
            raise ValueError(
                f"in_channels {config.in_channels} and out_channels {config.out_channels}: expected one number, "
                f"divisible by patch_size^2 = {patch_size**2}"
            )
        if config.center_input_sample or any("Skip" in n for n in (*config.down_block_types, *config.up_block_types)):
            raise ValueError("UNet2DModel: skip blocks and center_input_sample are not supported")
        if config.time_embedding_type != "positional" or config.class_embed_type is not None:
            raise ValueError("UNet2DModel: expected time_embedding_type 'positional' and class_embed_type null")
        unet.conv_out.__class__ = Float32Conv2d  # the difference of two predictions trains: see Denoiser
        self.null_label = None if config.num_class_embeds is None else config.num_class_embeds - 1

    @classmethod
    def from_config(cls, config: dict, patch_size: int = 1) -> UNet2D:
        """Random weights from UNet2DModel's keyword arguments."""
        return cls(UNet2DModel(**config), patch_size)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images this network takes."""
        config, p = self.unet.config, self.patch_size
        return config.in_channels // p**2, config.sample_size * p, config.sample_size * p

    def feature_shape(self, level: str = "mid") -> tuple[int, int, int]:
        """(C, H, W) of the features at a level."""
        channels = self.unet.config.block_out_channels
        index = self._level_index(level)
        size = self.unet.config.sample_size // 2 ** min(index + 1, len(channels) - 1)
        return channels[index], size, size

    def _level_index(self, level: str) -> int:
        num_levels = len(self.unet.config.block_out_channels)
        names = {"mid": num_levels - 1, **{f"down.{i}": i for i in range(num_levels)}}
        if level not in names:
            raise ValueError(f"levels: this network has no features {level!r}; expected some of {sorted(names)}")
        return names[level]

    def unconditional(self, condition: Condition) -> Condition:
        """The condition of the same batch without its class: the last class embedding stands for none."""
        return {"class_labels": torch.full_like(condition["class_labels"], self.null_label)}

    def _embedding(self, t: Tensor, condition: Condition, dtype: torch.dtype) -> Tensor:
        unet = self.unet
        embedding = unet.time_embedding(unet.time_proj(t).to(dtype))
        if unet.class_embedding is not None:
            embedding = embedding + unet.class_embedding(condition["class_labels"]).to(dtype)
        return embedding

    def _decode(self, h: Tensor, skips: list[Tensor], embedding: Tensor) -> Tensor:
        unet, skips = self.unet, list(skips)
        for block in unet.up_blocks:
            num_skips = len(block.resnets)
            h = block(h, tuple(skips[-num_skips:]), embedding)
            del skips[-num_skips:]
        h = unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))
        return F.pixel_shuffle(h, self.patch_size) if self.patch_size > 1 else h

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        decode_rows: int | None = None,
        decode_grad: bool = True,
        levels: tuple[str, ...] = (),
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        unet, dtype = self.unet, self.unet.conv_in.weight.dtype
        x = x.to(dtype)
        if self.patch_size > 1:
            x = F.pixel_unshuffle(x, self.patch_size)
        embedding = self._embedding(t, condition, dtype)
        h = unet.conv_in(x)
        skips, found = [h], {}
        for i, block in enumerate(unet.down_blocks):
            h, residuals = block(h, embedding)
            skips.extend(residuals)
            found[f"down.{i}"] = h
        if unet.mid_block is not None:
            h = unet.mid_block(h, embedding)
        found["mid"] = h
        features = tuple(found[level] for level in levels)
        rows = len(x) if decode_rows is None else decode_rows
        if rows == 0:
            return None, features
        h, embedding, skips = h[:rows], embedding[:rows], [skip[:rows] for skip in skips]
        if not decode_grad:
            with torch.no_grad():
                return self._decode(h.detach(), [skip.detach() for skip in skips], embedding.detach()), features
        return self._decode(h, skips, embedding), features
