"""Low-rank adapters on one frozen base: the generator and the fake score are the base with an adapter each.

A targeted layer W x becomes W x + (alpha / rank) B A x (Hu et al. 2021, "LoRA", section 4.1), in layers made by peft;
the teacher is the base with no adapter bound. Which adapter is bound belongs to a call, not to the base: `SharedBase`
binds it for the forward and again for the recompute of activation checkpointing, whatever has run in between.

The adapters' weights are no part of the base for ZeRO-3: all those of one adapter belong to its `AdaptedDenoiser`, so
one hook and one all-gather serve a pass, instead of one for each of a thousand small layers.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..config_schema import LoRAConfig
from ..denoiser import Condition, Denoiser
from ..errors import ConfigError
from . import check_shapes

ADAPTERS = ("generator", "fake_score")
SEPARATOR = "-"
"""Stands for the dots of a layer's path in the name of an adapter's parameter, which belongs to one module."""
METADATA_KEY = "lora_adapter_metadata"
"""Where diffusers looks, in a safetensors file's metadata, for an adapter's rank and alpha (as JSON)."""


def _takes_adapter(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear | nn.Conv2d)


def _is_target(name: str, layer: nn.Module, lora: LoRAConfig) -> bool:
    """Whether a layer gets an adapter: peft's rule, by the end of its path."""
    return _takes_adapter(layer) and any(name == end or name.endswith("." + end) for end in lora.targets)


def _ending(name: str) -> str:
    """The end of a path from its last word on: "to_q", "to_out.0"."""
    parts = name.split(".")
    word = max(i for i, part in enumerate(parts) if not part.isdigit())
    return ".".join(parts[word:])


def check_targets(unet: nn.Module, lora: LoRAConfig) -> None:
    """`ConfigError` when a target names no linear layer or convolution of this network."""
    names = [name for name, layer in unet.named_modules() if _takes_adapter(layer)]
    for target in lora.targets:
        if not any(name == target or name.endswith("." + target) for name in names):
            raise ConfigError(
                f"model.lora.targets: {target!r} is the end of no linear layer's or convolution's name in this "
                f"network; expected some of {', '.join(sorted({_ending(name) for name in names}))}."
            )


class SharedBase:
    """The frozen denoiser under both adapters. Not a module: nothing that holds it owns its weights.

    Calls go to `module`: the denoiser as it is, or a copy of it for as long as an engine keeps its weights gathered.
    """

    def __init__(self, denoiser: Denoiser, lora: LoRAConfig, adapters: tuple[str, ...] = ADAPTERS):
        self.denoiser = self.module = denoiser
        self.lora, self.adapters = lora, adapters
        self.active: list[str] = []  # this very list is every layer's list of active adapters
        self.checkpointed: list[nn.Module] = []

    def inject(self, copy: nn.Module | None = None) -> None:
        """Put the adapters' layers into the denoiser, and the same ones into a hook-free `copy` of it.

        A is drawn by torch's generator: seed it alike on all ranks. B is zero.
        """
        unet = self.denoiser.network.unet
        check_targets(unet, self.lora)
        shapes = [_whole_shape(layer) for layer in unet.modules() if _takes_adapter(layer)]
        self._inject(unet, shapes)
        if copy is not None:
            twin = copy.network.unet
            with torch.random.fork_rng(devices=[]):
                self._inject(twin, shapes)
            for layer, original in zip(_layers(twin), _layers(unet), strict=True):
                layer.lora_A, layer.lora_B = original.lora_A, original.lora_B

    def _inject(self, unet: nn.Module, shapes: list[torch.Size]) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(
            r=self.lora.rank, lora_alpha=self.lora.alpha, target_modules=list(self.lora.targets), lora_dropout=0.0
        )
        with _shaped_weights(unet, shapes), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # the first adapter's
            for adapter in self.adapters:
                inject_adapter_in_model(config, unet, adapter_name=adapter)
        for layer in _layers(unet):
            layer._active_adapter = self.active
        self.checkpointed += [module for module in unet.modules() if hasattr(module, "gradient_checkpointing")]

    def parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """An adapter's weights as peft and diffusers name them: "<path in the UNet>.lora_A.weight"."""
        return {
            f"{path}.{part}.weight": getattr(layer, part)[adapter].weight
            for path, layer in self.denoiser.network.unet.named_modules()
            if hasattr(layer, "lora_A")
            for part in ("lora_A", "lora_B")
        }

    @contextlib.contextmanager
    def bound(self, adapter: str | None) -> Iterator[None]:
        """The base's layers add this adapter, or none, inside."""
        before = list(self.active)
        self.active[:] = [] if adapter is None else [adapter]
        try:
            yield
        finally:
            self.active[:] = before

    def __call__(self, adapter: str | None, x_t: Tensor, t: Tensor, condition: Condition, **options: Any):
        """The denoiser's forward with this adapter, or none."""
        for module in self.checkpointed:
            if module.gradient_checkpointing and not isinstance(module._gradient_checkpointing_func, _BoundCheckpoint):
                module._gradient_checkpointing_func = _BoundCheckpoint(self, module._gradient_checkpointing_func)
        with self.bound(adapter):
            return self.module(x_t, t, condition, **options)


def _whole_shape(layer: nn.Module) -> torch.Size:
    """The shape of a layer's weight, also where ZeRO-3 has left a placeholder in its place."""
    weight = layer._parameters["weight"]
    assert weight is not None
    return getattr(weight, "ds_shape", weight.shape)


@contextlib.contextmanager
def _shaped_weights(unet: nn.Module, shapes: list[torch.Size]) -> Iterator[None]:
    """Weights of these shapes and of no size inside, for peft to look at."""
    layers = [layer for layer in unet.modules() if _takes_adapter(layer)]
    weights = [layer._parameters["weight"] for layer in layers]
    try:
        for layer, weight, shape in zip(layers, weights, shapes, strict=True):
            assert weight is not None
            stub = torch.zeros((), dtype=weight.dtype).expand(shape)
            layer._parameters["weight"] = nn.Parameter(stub, requires_grad=False)
        yield
    finally:
        for layer, weight in zip(layers, weights, strict=True):
            layer._parameters["weight"] = weight


def _layers(unet: nn.Module) -> list[Any]:
    return [layer for layer in unet.modules() if hasattr(layer, "lora_A")]


class _BoundCheckpoint:
    """A checkpoint function whose recompute uses the adapter of the forward, not the one bound at backward time."""

    def __init__(self, base: SharedBase, checkpoint: Any):
        self.base, self.checkpoint = base, checkpoint

    def __call__(self, function: Any, *arguments: Any) -> Any:
        adapter = next(iter(self.base.active), None)

        def bound(*inputs: Any) -> Any:
            with self.base.bound(adapter):
                return function(*inputs)

        return self.checkpoint(bound, *arguments)


class AdaptedDenoiser(Denoiser):
    """The base with one adapter; its parameters are the adapter's alone. Called like any `Denoiser`."""

    def __init__(self, base: SharedBase, adapter: str):
        nn.Module.__init__(self)
        denoiser = base.denoiser
        self.schedule, self.prediction_type = denoiser.schedule, denoiser.prediction_type
        self.preconditioning = denoiser.preconditioning
        self.base, self.adapter = base, adapter
        self.__dict__["network"] = denoiser.network  # seen, not owned: its parameters are not this module's
        for name, parameter in base.parameters(adapter).items():
            self.register_parameter(name.replace(".", SEPARATOR), parameter.requires_grad_(True))

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition, **options: Any):
        return self.base(self.adapter, x_t, t, condition, **options)


def adapter_state_dict(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights named as an `AdaptedDenoiser`'s parameters, under the names that diffusers loads: "unet.<path>..."."""
    return {"unet." + name.replace(SEPARATOR, "."): value for name, value in state.items()}


@torch.no_grad()
def merge_adapter(unet: nn.Module, state: dict[str, Tensor], lora: LoRAConfig, source: str) -> None:
    """W + (alpha / rank) B A into the weights of a plain UNet, from an `adapter_state_dict`; `UserError` names what
    does not fit."""
    expected: dict[str, tuple[int, ...]] = {}
    layers = {name: layer for name, layer in unet.named_modules() if _is_target(name, layer, lora)}
    for name, layer in layers.items():
        assert isinstance(layer.weight, Tensor)
        out_features, in_features, *kernel = layer.weight.shape
        expected[f"unet.{name}.lora_A.weight"] = (lora.rank, in_features, *kernel)
        expected[f"unet.{name}.lora_B.weight"] = (out_features, lora.rank, *[1] * len(kernel))
    check_shapes(expected, {name: tuple(value.shape) for name, value in state.items()}, source)
    for name, layer in layers.items():
        a, b = (state[f"unet.{name}.{part}.weight"].to(layer.weight) for part in ("lora_A", "lora_B"))
        layer.weight.add_((b.flatten(1) @ a.flatten(1)).view_as(layer.weight), alpha=lora.alpha / lora.rank)


def adapter_metadata(lora: LoRAConfig) -> dict[str, str]:
    """The safetensors metadata with which diffusers loads `adapter_state_dict`: it takes alpha = rank otherwise."""
    values = {"unet.r": lora.rank, "unet.lora_alpha": lora.alpha, "unet.target_modules": list(lora.targets)}
    return {METADATA_KEY: json.dumps(values)}
