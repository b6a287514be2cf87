"""What the adapters of diffusers' UNets share: one forward over the UNet's public blocks.

A GAN head wants features of the encoder, often without the decoder: `decode_rows` says how many leading rows of the
batch go on through it. State dict keys are the UNet's own, so a folder saved by diffusers loads here and back.

Shapes: N batch, C channels, H x W pixels or latents, p patch size (pixels are folded into channels, `pixel_unshuffle`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..denoiser import Condition, SkipLayers
from .skip import skipping

RECOMPILE_LIMIT = 128
"""Blocks of a class share dynamo's cache: a dozen widths, by half a dozen row counts, with gradients and without."""
DECODER = ("up_blocks.", "conv_norm_out.", "conv_out.")
"""Prefixes of the decoder's parameters in a diffusers UNet; all others belong to the encoder and the middle block."""


class Float32Conv2d(nn.Conv2d):
    """A convolution in f32 whatever its weights are kept in: the last layer, whose output must not be rounded."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return self._conv_forward(x.float(), self.weight.float(), bias)


class UNet(nn.Module):
    """`forward(x (N, C, H, W), t (N,), condition, ...)` -> (output of the first `decode_rows` rows or None, features).

    `levels` names the features wanted: "mid" (the bottleneck, after the middle block) or "down.i" (after down block i).
    `skip`: rows that pass some layers by.
    Subclasses embed time and condition, and say what stands for no condition.
    """

    kind: str
    """The network's name in settings."""

    def __init__(self, unet: nn.Module, patch_size: int = 1, sample_size: int | None = None):
        super().__init__()
        size = unet.config.sample_size if sample_size is None else sample_size
        for name, value in (("sample_size", size), ("patch_size", patch_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}: expected a whole number >= 1")
        factor = 2 ** (len(unet.config.block_out_channels) - 1)
        if sample_size is not None and sample_size % factor:
            raise ValueError(f"sample_size {sample_size}: expected a multiple of {factor}, which the UNet halves it by")
        self.unet = unet
        self.patch_size = patch_size
        self.sample_size = size
        self.channels_last = False
        unet.conv_out.__class__ = Float32Conv2d  # the difference of two predictions trains: see Denoiser

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images, or latents, this network takes."""
        p = self.patch_size
        return self.unet.config.in_channels // p**2, self.sample_size * p, self.sample_size * p

    @property
    def condition_shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Shape of each condition without its batch dimension; None: any length."""
        raise NotImplementedError

    def feature_shape(self, level: str = "mid") -> tuple[int, int, int]:
        """(C, H, W) of the features at a level."""
        channels = self.unet.config.block_out_channels
        index = self._level_index(level)
        size = self.sample_size // 2 ** min(index + 1, len(channels) - 1)
        return channels[index], size, size

    def _level_index(self, level: str) -> int:
        num_levels = len(self.unet.config.block_out_channels)
        names = {"mid": num_levels - 1, **{f"down.{i}": i for i in range(num_levels)}}
        if level not in names:
            raise ValueError(f"levels: this network has no features {level!r}; expected some of {sorted(names)}")
        return names[level]

    @property
    def _blocks(self) -> list[nn.Module]:
        unet = self.unet
        return [*unet.down_blocks, *([] if unet.mid_block is None else [unet.mid_block]), *unet.up_blocks]

    def compile_blocks(self, **options: Any) -> None:
        """torch.compile, with its options, for each block of encoder, middle and decoder; parameters stay.

        Shapes are compiled as they are: rows come in a few sizes, and with symbols for them Inductor fails on the CPU.
        """
        settings = torch._dynamo.config
        settings.recompile_limit = max(settings.recompile_limit, RECOMPILE_LIMIT)
        for block in self._blocks:
            block.compile(**{"dynamic": False, **options})

    @property
    def is_compiled(self) -> bool:
        return any(block._compiled_call_impl is not None for block in self._blocks)

    def unconditional(self, condition: Condition) -> Condition:
        """The condition that stands for none, for the same batch."""
        raise NotImplementedError

    def _embed(self, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor | None]:
        """The embedding (N, D) that every block adds, and what its attention looks at (N, L, D) or None."""
        raise NotImplementedError

    @staticmethod
    def _run(block: nn.Module, *args: object, context: Tensor | None) -> Any:
        """A block with its context, where it attends to one."""
        if getattr(block, "has_cross_attention", False):
            return block(*args, encoder_hidden_states=context)
        return block(*args)

    def _decode(self, h: Tensor, skips: list[Tensor], embedding: Tensor, context: Tensor | None) -> Tensor:
        unet, skips = self.unet, list(skips)
        for block in unet.up_blocks:
            num_skips = len(block.resnets)
            h = self._run(block, h, tuple(skips[-num_skips:]), embedding, context=context)
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
        skip: SkipLayers | None = None,
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        with skipping(self.unet, skip):
            return self._forward(x, t, condition, decode_rows, decode_grad, levels)

    def _forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        decode_rows: int | None,
        decode_grad: bool,
        levels: tuple[str, ...],
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        unet = self.unet
        x = x.to(unet.conv_in.weight.dtype)
        if self.patch_size > 1:
            x = F.pixel_unshuffle(x, self.patch_size)
        if self.channels_last:  # what follows keeps it; the weights stay in the order that ZeRO-3 gathers them in
            x = x.contiguous(memory_format=torch.channels_last)
        embedding, context = self._embed(x, t, condition)
        h = unet.conv_in(x)
        skips, found = [h], {}
        for i, block in enumerate(unet.down_blocks):
            h, residuals = self._run(block, h, embedding, context=context)
            skips.extend(residuals)
            found[f"down.{i}"] = h
        if unet.mid_block is not None:
            h = self._run(unet.mid_block, h, embedding, context=context)
        found["mid"] = h
        features = tuple(found[level] for level in levels)
        rows = len(x) if decode_rows is None else decode_rows
        if rows == 0:
            return None, features
        h, embedding, skips = h[:rows], embedding[:rows], [skip[:rows] for skip in skips]
        context = None if context is None else context[:rows]
        if not decode_grad:
            with torch.no_grad():
                skips = [skip.detach() for skip in skips]
                return self._decode(h.detach(), skips, embedding.detach(), context), features
        return self._decode(h, skips, embedding, context), features
