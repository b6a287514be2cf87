"""Operator swapping inside diffusers' UNets: what a UNet is built of, computed by faster operators.

    ResnetBlock2D: norm1 + nonlinearity           group_norm_silu
    ResnetBlock2D: norm2 + nonlinearity           group_norm_silu (with "scale_shift" a product stands between: kept)
    a UNet's conv_norm_out + conv_act             group_norm_silu
    Attention (AttnProcessor, AttnProcessor2_0)   flash-attn where it is installed and fits, else PyTorch's
                                                  scaled_dot_product_attention

Modules change their class, attentions their processor: parameters, state dict keys, hooks and module paths stay, so
ZeRO-3 gathers a normalisation's weights as before, and checkpointing, deepcopy and torch.compile see ordinary modules.
Only diffusers' own classes are swapped; subclasses and other activations are left alone. `restore_operators` undoes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ..ops.norm import group_norm_silu

FLASH_DEVICES = ("cuda",)
FLASH_DTYPES = (torch.bfloat16, torch.float16)
FLASH_MAX_HEAD_DIM = 256


SMALL_PLANE = 64
"""On a CPU, PyTorch's own pair is the faster one for NCHW maps of fewer positions: the kernel goes plane by plane."""


class Swapped(NamedTuple):
    """A place in a network and what computes it now."""

    path: str
    """of the module whose class or processor changed"""
    operator: str
    """"group_norm_silu", "flash_attn" or "scaled_dot_product_attention" """


class GroupNormSiLU(nn.GroupNorm):
    """A GroupNorm that applies the SiLU after it too."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.ndim == 4 and x.shape[2] * x.shape[3] < SMALL_PLANE and x.is_contiguous():
            return F.silu(super().forward(x))
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps)


class AbsorbedSiLU(nn.SiLU):
    """A SiLU that the normalisation before it has applied."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class FusedResnetBlock2D(ResnetBlock2D):
    """diffusers' residual block around `GroupNormSiLU`: (N, C, H, W), (N, D) -> (N, C', H', W')."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        x, h = input_tensor, self.norm1(input_tensor)
        resample = self.upsample or self.downsample
        if resample is not None:
            x, h = resample(x), resample(h)
        h = self.conv1(h)
        if self.time_emb_proj is not None:
            assert temb is not None  # the block was built for one
            temb = self.time_emb_proj(temb if self.skip_time_act else F.silu(temb))[:, :, None, None]
        if self.time_embedding_norm == "scale_shift":
            assert temb is not None
            scale, shift = temb.chunk(2, dim=1)
            h = F.silu(self.norm2(h) * (1 + scale) + shift)
        else:
            h = self.norm2(h if temb is None else h + temb)
        h = self.conv2(self.dropout(h) if self.training else h)
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        h = x + h
        return h if self.output_scale_factor == 1.0 else h / self.output_scale_factor


# DeepSpeed's leaf_module and other tools find modules by the name of their class.
FusedResnetBlock2D.__name__ = ResnetBlock2D.__name__
FusedResnetBlock2D.__qualname__ = ResnetBlock2D.__qualname__
FusedResnetBlock2D.__module__ = ResnetBlock2D.__module__

CLASSES: dict[type, type] = {
    nn.GroupNorm: GroupNormSiLU,
    nn.SiLU: AbsorbedSiLU,
    ResnetBlock2D: FusedResnetBlock2D,
}
ORIGINALS = {fused: original for original, fused in CLASSES.items()}


class FusedAttention:
    """diffusers' attention, softmax(q k^T scale) v, without the matrix of weights in memory. Keeps what it replaced."""

    def __init__(self, original: Any):
        self.original = original
        self.flash = find_flash()

    @property
    def operator(self) -> str:
        return "scaled_dot_product_attention" if self.flash is None else "flash_attn"

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        h, shape = hidden_states, hidden_states.shape
        if len(shape) == 4:  # (N, C, H, W): positions are the sequence
            h = h.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            h = attn.group_norm(h.transpose(1, 2)).transpose(1, 2)
        context = h
        if encoder_hidden_states is not None:
            context = encoder_hidden_states
            if attn.norm_cross:
                context = attn.norm_encoder_hidden_states(context)
        q, k, v = attn.to_q(h), attn.to_k(context), attn.to_v(context)
        q, k, v = (part.unflatten(2, (attn.heads, -1)) for part in (q, k, v))
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        h = attn.to_out[0](self._attend(attn, q, k, v, attention_mask).flatten(2))
        if attn.training:
            h = attn.to_out[1](h)  # dropout
        if len(shape) == 4:
            h = h.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            h = h + hidden_states
        return h if attn.rescale_output_factor == 1.0 else h / attn.rescale_output_factor

    def _attend(self, attn: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """(N, L, heads, D) each, (N, L', heads, D) for k and v -> (N, L, heads, D)."""
        if self.flash is not None and mask is None and fits_flash(q):
            return self.flash(q, k, v, softmax_scale=attn.scale)
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, k.shape[1], len(q))
            mask = mask.unflatten(0, (len(q), attn.heads))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=attn.scale).transpose(1, 2)


def find_flash() -> Callable[..., Tensor] | None:
    """flash-attn's function, or None where it is not installed or does not load."""
    try:
        from flash_attn import flash_attn_func
    except (ImportError, OSError):
        return None
    return flash_attn_func


def fits_flash(query: Tensor) -> bool:
    """Whether flash-attn takes such queries (N, L, heads, D): 16-bit, on a GPU, D a multiple of 8 up to 256."""
    dim = query.shape[-1]
    on_device = query.device.type in FLASH_DEVICES and query.dtype in FLASH_DTYPES
    return on_device and dim % 8 == 0 and dim <= FLASH_MAX_HEAD_DIM


# --- the table --------------------------------------------------------------------------------------------------------


def _is_pair(norm: Any, activation: Any) -> bool:
    return type(norm) is nn.GroupNorm and norm.affine and type(activation) is nn.SiLU


def _swap_block(block: ResnetBlock2D) -> Iterator[tuple[str, str]]:
    names = ["norm1"] if block.time_embedding_norm == "scale_shift" else ["norm1", "norm2"]
    if all(_is_pair(getattr(block, name), block.nonlinearity) for name in names):
        _change(block)
        for name in names:
            _change(getattr(block, name))
            yield name, "group_norm_silu"


def _swap_output(unet: nn.Module) -> Iterator[tuple[str, str]]:
    if _is_pair(getattr(unet, "conv_norm_out", None), getattr(unet, "conv_act", None)):
        _change(unet.conv_norm_out)
        _change(unet.conv_act)
        yield "conv_norm_out", "group_norm_silu"


def _swap_attention(attn: Attention) -> Iterator[tuple[str, str]]:
    if type(attn.processor) in (AttnProcessor, AttnProcessor2_0) and attn.spatial_norm is None:
        attn.processor = FusedAttention(attn.processor)
        yield "", attn.processor.operator


def _change(module: Any) -> None:
    module.__class__ = CLASSES[type(module)]


TABLE: tuple[tuple[type, Callable[[Any], Iterator[tuple[str, str]]]], ...] = (
    (ResnetBlock2D, _swap_block),
    (Attention, _swap_attention),
    (nn.Module, _swap_output),
)
"""Class of a module, and what swaps one: it yields (path inside the module, operator)."""


def swap_operators(unet: nn.Module) -> list[Swapped]:
    """Swap operators inside a diffusers UNet, in place; what was swapped by this call. Works on meta as well."""
    found = []
    for path, module in unet.named_modules():
        for kind, swap in TABLE:
            if type(module) is kind or kind is nn.Module:
                found += [Swapped(f"{path}.{name}".strip("."), operator) for name, operator in swap(module)]
    return found


def restore_operators(unet: nn.Module) -> None:
    """Give every swapped module of a UNet its own class or processor back, in place."""
    for module in unet.modules():
        if type(module) in ORIGINALS:
            module.__class__ = ORIGINALS[type(module)]
        if isinstance(getattr(module, "processor", None), FusedAttention):
            module.processor = module.processor.original


def swapped_operators(unet: nn.Module) -> Counter[str]:
    """How many places each operator computes in a UNet now."""
    count: Counter[str] = Counter()
    for module in unet.modules():
        if isinstance(module, GroupNormSiLU):
            count["group_norm_silu"] += 1
        elif isinstance(getattr(module, "processor", None), FusedAttention):
            count[module.processor.operator] += 1
    return count
