"""Skip-layer guidance: some rows of a batch pass some layers of a UNet by, in the same forward as the others.

A layer that is skipped gives back what it got (Stable Diffusion 3.5's guidance leaves out transformer blocks so). All
layers still run, on all rows: ZeRO-3 meets the same modules in the same order in every pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from ..denoiser import SkipLayers


def can_be_skipped(path: str, layer: nn.Module) -> bool:
    """Whether a layer adds something to its input, so that leaving it out means something."""
    if isinstance(layer, ResnetBlock2D):
        return layer.conv_shortcut is None and layer.upsample is None and layer.downsample is None
    if isinstance(layer, Attention):
        return layer.residual_connection
    return path == "mid_block" or isinstance(layer, Transformer2DModel | BasicTransformerBlock)


def check_layers(unet: nn.Module, layers: tuple[str, ...]) -> None:
    """`ValueError` when a path names no layer of this UNet that can be skipped."""
    known = [path for path, layer in unet.named_modules() if can_be_skipped(path, layer)]
    for path in layers:
        if path not in known:
            shown = ", ".join(known[:6]) + (", ..." if len(known) > 6 else "")
            raise ValueError(f"{path!r} is no layer of this network that can be left out; expected some of {shown}")


@contextlib.contextmanager
def skipping(unet: nn.Module, skip: SkipLayers | None) -> Iterator[None]:
    """Forwards of the UNet inside skip these layers for these rows."""
    with contextlib.ExitStack() as hooks:
        for path in () if skip is None else skip.layers:
            assert skip is not None
            handle = unet.get_submodule(path).register_forward_hook(_past(skip), with_kwargs=True)
            hooks.callback(handle.remove)
        yield


def _past(skip: SkipLayers) -> Any:
    def hook(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> Any:
        x = arguments[0] if arguments else options["hidden_states"]
        whole = output[0] if isinstance(output, tuple) else output
        assert isinstance(whole, Tensor) and whole.shape == x.shape
        mixed = torch.cat([whole[: skip.first], x[skip.first : skip.last].to(whole.dtype), whole[skip.last :]])
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    return hook
