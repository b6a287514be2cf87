"""ZeRO-3's parameters from outside: a rank's shards and f32 masters, and whole tensors made of all ranks' shards.

Weights may be kept on the device, in the CPU's memory or on NVMe (`zero_optimization.offload_param`), masters on the
device or in the CPU's memory (`offload_optimizer`). A shard is a rank's flat part of one parameter, padded on the last
ranks.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .networks.unet import DECODER, UNet

HOLDER = -1
"""Stands for a module that uses a parameter; DeepSpeed numbers its own from 0."""
BUCKET_ELEMENTS = 1 << 25
"""Elements of one all-gather: a bucket more than what the caller keeps is alive while whole tensors are made."""


@contextlib.contextmanager
def opened(parameter: nn.Parameter, write: bool = False) -> Iterator[Tensor]:
    """This rank's shard of a parameter, in memory while the context lasts; `write` puts changes back to NVMe."""
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus

    tensor, swapper = parameter.ds_tensor, parameter.nvme_swapper
    if tensor.status == PartitionedParamStatus.INFLIGHT:
        swapper.synchronize_reads()
    stored = tensor.status == PartitionedParamStatus.NOT_AVAILABLE
    if stored:
        swapper.swap_in([parameter], async_op=False)
    try:
        yield tensor.detach()
    finally:
        if stored and write:
            swapper.swap_out_and_release([parameter])
        elif stored:
            swapper.remove_partition_and_release_buffers([parameter])


def is_stored(parameter: nn.Parameter) -> bool:
    """Whether the shard lies on NVMe, so that an `opened` one is gone after its context."""
    return parameter.ds_tensor.final_location is not None


def gather(parameters: list[nn.Parameter], shards: list[Tensor] | None = None) -> Iterator[Tensor]:
    """Whole tensors, in the parameters' shapes and on their device, from every rank's `shards` (default: the weights').

    Collective; every rank takes all of them. With one rank a whole tensor can be the shard itself.
    """
    world_size = dist.get_world_size()
    for bucket in _buckets(parameters, shards):
        device = bucket[0][0].device
        with contextlib.ExitStack() as stack:
            parts = []
            for parameter, given in bucket:
                part = stack.enter_context(opened(parameter)) if given is None else given
                parts.append(part.clone() if given is None and is_stored(parameter) else part)
                stack.close()
        if world_size == 1:
            wholes = [part.flatten().to(device) for part in parts]
        else:
            mine = torch.cat([part.flatten().to(device) for part in parts])
            ranks = torch.empty(world_size * mine.numel(), dtype=mine.dtype, device=device)
            dist.all_gather_into_tensor(ranks, mine)
            ranks = ranks.view(world_size, -1)
            wholes = [part.flatten() for part in ranks.split([part.numel() for part in parts], dim=1)]
            del ranks, mine
        for (parameter, _), whole in zip(bucket, wholes, strict=True):
            yield whole[: parameter.ds_numel].view(parameter.ds_shape)


def _buckets(
    parameters: list[nn.Parameter], shards: list[Tensor] | None
) -> Iterator[list[tuple[nn.Parameter, Tensor | None]]]:
    """Parameters with their given shards, some together: of one dtype, and not much more than BUCKET_ELEMENTS."""
    given: list[Any] = [None] * len(parameters) if shards is None else shards
    bucket: list[tuple[nn.Parameter, Tensor | None]] = []
    size, last = 0, None
    for parameter, part in zip(parameters, given, strict=True):
        dtype = parameter.dtype if part is None else part.dtype
        if bucket and (dtype != last or size + parameter.ds_numel > BUCKET_ELEMENTS):
            yield bucket
            bucket, size = [], 0
        bucket.append((parameter, part))
        size, last = size + parameter.ds_numel, dtype
    if bucket:
        yield bucket


def write_shards(parameters: dict[str, nn.Parameter], shards: dict[str, Tensor]) -> None:
    """Put these shards into a module's parameters, wherever those are kept. Collective."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    with torch.no_grad():
        for name, parameter in parameters.items():
            with opened(parameter, write=True) as part:
                part.copy_(shards[name])
        # DeepSpeed keeps small parameters gathered between passes (its persistence threshold): no forward fetches them.
        whole = [p for p in parameters.values() if p.ds_status == ZeroParamStatus.AVAILABLE]
        for parameter, value in zip(whole, gather(whole), strict=True):
            parameter.data.copy_(value)


@contextlib.contextmanager
def held(module: nn.Module) -> Iterator[None]:
    """A part of a ZeRO-3 engine's module stays gathered inside, whatever passes through it: for a double backward.

    Collective. Gradients are reduced and sharded as ever.
    """
    import deepspeed

    parameters = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
    with deepspeed.zero.GatheredParameters(parameters):
        for parameter in parameters:
            parameter.ds_active_sub_modules.add(HOLDER)  # hooks release what no module is using
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.ds_active_sub_modules.discard(HOLDER)


def copied_shard(parameter: nn.Parameter) -> Tensor:
    with opened(parameter) as part:
        return part.clone()


def masters(engine: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """(trained parameter, this rank's f32 master weights), where the optimizer keeps them: on the device or the CPU."""
    optimizer = engine.optimizer
    for parameters, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        sizes = [parameter.ds_tensor.ds_numel for parameter in parameters]
        yield from zip(parameters, flat.detach()[: sum(sizes)].split(sizes), strict=True)


class ShardedWeights:
    """A ZeRO-3 engine's weights from outside; a rank's parts are its shards, by the parameters' names."""

    def __init__(self, engine: Any):
        self.engine, self.parameters = engine, dict(engine.module.named_parameters())

    def masters(self) -> dict[str, Tensor]:
        """This rank's f32 weights: the optimizer's where it has any."""
        trained = dict(masters(self.engine))
        return {
            name: trained[parameter] if parameter in trained else copied_shard(parameter).float()
            for name, parameter in self.parameters.items()
        }

    def copied(self) -> dict[str, Tensor]:
        """A copy of this rank's parts."""
        return {name: copied_shard(parameter) for name, parameter in self.parameters.items()}

    def write(self, parts: dict[str, Tensor]) -> None:
        """Put these parts into the module. Collective."""
        write_shards(self.parameters, parts)

    def whole(self, parts: dict[str, Tensor] | None = None, keep: bool = True) -> dict[str, Tensor]:
        """The weights (or what `parts` make), whole, f32, on the CPU; {} where `keep` is false. Collective."""
        return whole_on_cpu(self.parameters, parts, keep)


def whole_on_cpu(
    parameters: dict[str, nn.Parameter], shards: dict[str, Tensor] | None = None, keep: bool = True
) -> dict[str, Tensor]:
    """Weights (or what `shards` make), whole, f32, on the CPU, where `keep` is true; else {}. Collective."""
    wholes = gather(list(parameters.values()), None if shards is None else [shards[name] for name in parameters])
    # Never a view of weights that go on changing, as a single rank's shards are.
    found = {}
    for name, whole in zip(parameters, wholes, strict=True):
        if keep:
            found[name] = whole.to("cpu", torch.float32, copy=True)
    return found


def in_decoder(name: str) -> bool:
    """Whether a parameter, named from a denoiser or a fake score, belongs to its UNet's decoder."""
    return name.rpartition("unet.")[2].startswith(DECODER)


class WholeNetwork:
    """A network for passes that do not update it: hook-free, with all its weights gathered at once while in use.

    ZeRO-3's hooks cost more than the arithmetic of a small network, and gather a large one anew for every forward. Here
    one all-gather serves any number of forwards, and gradients reach the input as through any plain module.
    """

    def __init__(self, module: nn.Module):
        self.module = copy.deepcopy(module).to("meta").requires_grad_(False).eval()
        for ours, theirs in zip(self.module.modules(), module.modules(), strict=True):
            if isinstance(theirs, UNet) and theirs.is_compiled:
                ours.compile_blocks()  # which a copy leaves out
        self.slots = [
            (owner, leaf, f"{path}.{leaf}" if path else leaf)
            for path, owner in self.module.named_modules()
            for leaf in owner._parameters
            if owner._parameters[leaf] is not None
        ]
        self.buffers = dict(module.named_buffers())
        for path, owner in self.module.named_modules():
            for leaf in owner._buffers:
                owner._buffers[leaf] = self.buffers[f"{path}.{leaf}" if path else leaf]

    @contextlib.contextmanager
    def gathered(self, parameters: dict[str, nn.Parameter], decode: bool = True) -> Iterator[nn.Module]:
        """The module with the weights of a ZeRO-3 module's `parameters` inside; without a decoder's, to encode alone.

        Collective.
        """
        slots = [slot for slot in self.slots if decode or not in_decoder(slot[2])]
        placeholders = [owner._parameters[leaf] for owner, leaf, _ in slots]
        weights = gather([parameters[name] for _, _, name in slots])
        try:
            for (owner, leaf, _), weight in zip(slots, weights, strict=True):
                owner._parameters[leaf] = weight
            yield self.module
        finally:
            for (owner, leaf, _), placeholder in zip(slots, placeholders, strict=True):
                owner._parameters[leaf] = placeholder


class Traces:
    """The orders in which ZeRO-3 meets a module's parts, one for each kind of pass.

    ZeRO-3 records the first pass through a module and prefetches the next one's weights by it. A pass that goes on
    where the recorded one ended (a backward, a decoder) makes it drop the record and fetch module by module; one that
    ends earlier leaves weights gathered that nobody uses. With a coordinator for each kind, neither happens.
    """

    def __init__(self, engine: Any):
        optimizer = engine.optimizer
        self.offload = getattr(optimizer, "parameter_offload", optimizer)  # an engine without optimizer is its own
        self.coordinators: dict[str, Any] = {}

    @contextlib.contextmanager
    def of(self, kind: str) -> Iterator[None]:
        """Passes inside, and their backward, are of this kind; outside they are updates. No pass may be under way."""
        usual = self.offload.param_coordinator
        if kind not in self.coordinators:
            self.coordinators[kind] = _like(usual)
        self.offload.param_coordinator = self.coordinators[kind]
        try:
            yield
            # What only a backward took up has no step of this engine that would let it go.
            self.offload.release_backward_leftovers()
        finally:
            self.offload.param_coordinator = usual


def _like(coordinator: Any) -> Any:
    """A coordinator of the same settings, stream and weights in flight, with nothing recorded."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import ZeRoTraceMode

    other = copy.copy(coordinator)
    other._clear_trace_structures()
    other._PartitionedParameterCoordinator__trace_mode = ZeRoTraceMode.INVALID
    other._PartitionedParameterCoordinator__step_id = 0
    return other
