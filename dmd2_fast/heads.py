"""GAN heads on features of a UNet's encoder.

One head a level (DMD2: the bottleneck alone): 4x4 convolutions of stride 2, each with GroupNorm and SiLU, down to 4x4,
then one convolution over what is left, GroupNorm, SiLU and a projection to one logit. SDXL 1280 x 32 x 32, SD1.5
1280 x 8 x 8, EDM ImageNet-64 768 x 8 x 8 give the published heads. Source: Yin et al. 2024, section 4.3, figure 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MAX_GROUPS = 32
MIN_VALUES_PER_GROUP = 8


def num_groups(channels: int) -> int:
    """Groups of a head's GroupNorm: at 1 x 1 each must hold several values, or the normalised value says nothing."""
    groups = min(MAX_GROUPS, max(1, channels // MIN_VALUES_PER_GROUP))
    while channels % groups:
        groups -= 1
    return groups


class GANHead(nn.Module):
    """Features (N, C, H, W) of one level -> logits (N, 1) f32; H = W, a power of two or at most 4."""

    def __init__(self, channels: int, size: int):
        super().__init__()

        def block(kernel: int, stride: int, padding: int) -> list[nn.Module]:
            conv = nn.Conv2d(channels, channels, kernel, stride=stride, padding=padding)
            return [conv, nn.GroupNorm(num_groups(channels), channels), nn.SiLU()]

        layers: list[nn.Module] = []
        while size > 4:
            if size % 2:
                raise ValueError(f"GAN head: features of size {size} x {size}; expected a power of two")
            layers += block(4, 2, 1)
            size //= 2
        self.layers = nn.Sequential(*layers, *block(size, size, 0))
        self.projection = nn.Conv2d(channels, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.projection(self.layers(features)).flatten(1).float()


class GANHeads(nn.Module):
    """One `GANHead` for each level: a tuple of features -> logits (N, levels) f32."""

    def __init__(self, shapes: tuple[tuple[int, int, int], ...]):
        super().__init__()
        for channels, height, width in shapes:
            if height != width:
                raise ValueError(f"GAN head: features of {channels} x {height} x {width}; expected a square")
        self.heads = nn.ModuleList(GANHead(channels, height) for channels, height, _ in shapes)

    def forward(self, features: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([head(feature) for head, feature in zip(self.heads, features, strict=True)], dim=1)
