"""Networks made on all ranks together: built on the meta device and filled one tensor at a time.

Rank 0 reads the file and broadcasts each tensor, in the dtype that DeepSpeed keeps; every rank takes its shard of it
and lets the rest go. So no rank holds more than one whole tensor beside its shards, a file on a network disk is read
once and not by every rank, and a tensor that cannot be read is one error on all ranks. DeepSpeed broadcasts whatever it
partitions, so reading on every rank would save nothing. At ZeRO's stages 1 and 2 every rank keeps the whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .algorithm import Algorithm
from .config import Config, ModelConfig
from .config_deepspeed import is_bf16, shards_weights
from .denoiser import Denoiser
from .engine import Trained, engine_settings
from .errors import UserError
from .fake_score import FakeScore
from .heads import GANHeads
from .networks import build_without_weights, check_shapes, prepare_network, tensor_shapes
from .networks.source import Source, open_source, open_start
from .ranks import Rank, from_main, raise_together

Fill = Callable[[nn.Module, str, Tensor | None], None]


class Partitioner:
    """`(owner, name, value)`: put a value into a module's parameter on the meta device, as ZeRO-3's. Collective.

    Rank 0's value is the one that counts, the others' may be None.
    """

    def __init__(self, config: Config, network: Trained | None, device: torch.device):
        self.settings, self.device = engine_settings(config, network), device
        self.dtype = torch.bfloat16 if is_bf16(config.deepspeed) else torch.float32
        self.first: nn.Parameter | None = None

    def __call__(self, owner: nn.Module, name: str, value: Tensor | None) -> None:
        parameter = self._whole(owner, name, value)
        self._share(parameter)
        owner._parameters[name] = parameter

    def _whole(self, owner: nn.Module, name: str, value: Tensor | None) -> nn.Parameter:
        """The value, or room for it."""
        empty = owner._parameters[name]
        assert empty is not None
        if value is None:
            whole = torch.empty(empty.shape, dtype=self.dtype, device=self.device)
        else:
            whole = value.detach().to(self.device, self.dtype)
        return nn.Parameter(whole, requires_grad=empty.requires_grad)

    def _share(self, parameter: nn.Parameter) -> None:
        """Rank 0's numbers on all ranks, of which each keeps its shard."""
        import deepspeed

        if self.first is None:
            holder = nn.ParameterList([parameter])
            deepspeed.zero.Init(module=holder, config_dict_or_path=self.settings)  # its dtype is the configuration's
            self.first = parameter
        else:
            self.first.convert_to_zero_parameters([parameter])


class Replicator(Partitioner):
    """The same for stages 1 and 2: whole on every rank."""

    def _share(self, parameter: nn.Parameter) -> None:
        if dist.get_world_size() > 1:
            dist.broadcast(parameter.data, 0)


def make_fill(config: Config, network: Trained | None, device: torch.device) -> Partitioner:
    """What fills one of the networks, as the stage of ZeRO wants it."""
    return (Partitioner if shards_weights(config.deepspeed) else Replicator)(config, network, device)


def build_networks(config: Config, algorithm: Algorithm, rank: Rank) -> tuple[Denoiser, FakeScore, Denoiser]:
    """(generator, fake score, teacher), for the engines: sharded, or whole at stages 1 and 2. Collective.

    All start as the teacher's weights, or the first two as those of `run.start_from`; the GAN head from the run's seed.
    Where the algorithm keeps no fake score, there is the head alone.
    """
    sources = _sources(config, algorithm, rank)
    # One for each network: on NVMe each has a folder, which is emptied when it starts.
    fills = [make_fill(config, network, rank.device) for _, network in sources]
    generator, fake, teacher = (
        None if source is None else sharded_denoiser(source, config.model, fill, rank)
        for (source, _), fill in zip(sources, fills, strict=True)
    )
    assert generator is not None and teacher is not None
    return generator, FakeScore(fake, _heads(config, teacher, algorithm, fills[1]), algorithm.own_levels), teacher


def build_base(config: Config, algorithm: Algorithm, rank: Rank) -> tuple[Denoiser, GANHeads | None]:
    """(the teacher, on which adapters come, the GAN head), for `LoRAEngines`. Collective."""
    source = from_main(rank, lambda: open_source(config.model))
    base = sharded_denoiser(source, config.model, make_fill(config, None, rank.device), rank)
    return base, _heads(config, base, algorithm, make_fill(config, config.fake_score, rank.device))


def _heads(config: Config, teacher: Denoiser, algorithm: Algorithm, fill: Fill) -> GANHeads | None:
    if not algorithm.adversarial:
        return None
    shapes = tuple(teacher.network.feature_shape(level) for level in algorithm.levels)
    return sharded_heads(shapes, config.run.seed, fill)


def _sources(config: Config, algorithm: Algorithm, rank: Rank) -> list[tuple[Source | None, Trained | None]]:
    """Where generator, fake score (None: there is none) and teacher come from, with their settings."""
    model, start = config.model, config.run.start_from
    usual = from_main(rank, lambda: open_source(model))
    generator: Source = usual
    fake_score: Source | None = usual
    if start is not None:
        generator = from_main(rank, lambda: open_start(model, start, "generator"))
    if not algorithm.keeps_fake_score:
        fake_score = None
    elif start is not None:
        fake_score = from_main(rank, lambda: open_start(model, start, "fake_score"))
    return [(generator, config.generator), (fake_score, config.fake_score), (usual, None)]


def sharded_denoiser(source: Source, model: ModelConfig, fill: Fill, rank: Rank) -> Denoiser:
    """`load_denoiser`'s, with its parameters as `fill` makes them. Collective; only rank 0 reads the source's files.

    Raises `UserError` on every rank when the file does not fit.
    """
    denoiser = build_without_weights(source.settings)
    unet, place = denoiser.network.unet, str(source.weights or source.folder / "unet")
    owners = {f"{path}.{leaf}" if path else leaf: (owner, leaf) for path, owner in unet.named_modules()
              for leaf in owner._parameters}  # fmt: skip
    shapes = from_main(rank, source.shapes)
    check_shapes(tensor_shapes(unet), shapes, place)
    tensors, error = source.tensors(), None
    for name in shapes:
        value = None
        if rank.is_main and error is None:
            try:
                value = _next(tensors, name)
            except Exception as failure:  # whatever a damaged file makes safetensors raise: the others are waiting
                error = UserError(f"model.path: {place} cannot be read: {failure}")
        fill(*owners[name], value)
    raise_together(error, rank)
    prepare_network(denoiser.network, model)
    return denoiser.eval()


def _next(tensors: Any, name: str) -> Tensor:
    found, value = next(tensors)
    if found != name:
        raise ValueError(f"expected {name}, found {found}")
    return value


def sharded_heads(shapes: tuple[tuple[int, int, int], ...], seed: int, fill: Fill) -> GANHeads:
    """GANHeads with torch's initial weights after `manual_seed(seed)`, drawn layer by layer. Collective."""
    with torch.device("meta"):
        heads = GANHeads(shapes)
    torch.manual_seed(seed)
    for layer in heads.modules():  # in the order in which they were made
        values = [name for name, value in layer._parameters.items() if value is not None]
        if values:
            layer.to_empty(device="cpu", recurse=False)
            layer.reset_parameters()
            for name in values:
                fill(layer, name, layer._parameters[name])
    return heads
