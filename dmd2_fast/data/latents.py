"""Latents and text embeddings, as `dmd2-fast prepare` writes them: members KEY.safetensors, and dataset.json beside.

dataset.json is written last, so a folder that has it is whole. A folder of prompts alone has no latents.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dmd2_fast.data.batch import Batch
from dmd2_fast.data.shards import Member, ShardFolder
from dmd2_fast.data.tensors import MAX_HEADER_BYTES, TensorInfo, header_bytes, is_finite, parse_header
from dmd2_fast.errors import DataError

DESCRIPTION = "dataset.json"
UNCONDITIONAL = "unconditional.safetensors"
LATENTS = "latents"
NOISE = "noise"
"""In a teacher's noise-image pairs: what the sampler started from."""
CONDITIONS = ("prompt_embeds", "pooled_prompt_embeds", "time_ids", "class_labels")
"""Fields that networks are conditioned on. What is neither one of them nor the latents is in Batch.extra."""
FIRST_READ = 1024  # holds the header of a few tensors: one read a sample
CHECK_ALL_BYTES = 16 << 20
"""Data this small is read once before training starts, so that a value that is not finite is found then."""
MAX_SIDE = 1 << 16


class LatentDataset:
    """Samples KEY.safetensors of one split, all with the same tensors of the same shapes and dtypes.

    Every header is read and checked here; DataError names the file and the member that is not as expected.

    sample_shape: (C, h, w) of the latents, also where the data are prompts alone.
    fields: names of the tensors that are read.  shapes, dtypes: of each of them, without batch dimension.
    unconditional: {name: tensor} f32 without batch dimension, what stands for no prompt.
    """

    encoding = "raw"

    def __init__(
        self, folder: str | Path, split: str, *, fields: Sequence[str] | None = None, progress: bool = False
    ) -> None:
        self.folder = Path(folder)
        self._shards = ShardFolder(folder, split, progress=progress)
        self.sample_shape = read_description(self.folder).sample_shape
        self.unconditional = read_unconditional(self.folder)
        if not self._shards.samples:
            raise DataError(
                f"{folder}: the {split} shards hold 0 samples, expected members like 000000000.safetensors."
            )
        self._members: list[Member] = []
        self._layouts: list[dict[str, TensorInfo]] = []
        self._starts: list[int] = []
        self._known: dict[tuple[bytes, int], dict[str, TensorInfo]] = {}
        for sample in tqdm(self._shards.samples, desc=f"check {split} samples", delay=2, disable=not progress):
            self._add(sample, fields)
        first = self._layouts[0]
        self.fields = tuple(sorted(first) if fields is None else fields)
        self.shapes = {name: first[name].shape for name in self.fields}
        self.dtypes = {name: first[name].dtype for name in self.fields}
        if self.shapes.get(LATENTS, self.sample_shape) != self.sample_shape:
            raise DataError(
                f"{self._members[0]}: latents of (channels, height, width) {self.shapes[LATENTS]}, but {DESCRIPTION} "
                f"says {self.sample_shape}. Prepare the data again."
            )
        self._check_unconditional()
        self._spans = self._places()
        if self.num_samples * self._spans[-1][1] <= CHECK_ALL_BYTES:
            for index in range(self.num_samples):
                self.encoded(index)

    @property
    def num_samples(self) -> int:
        return len(self._members)

    def encoded(self, index: int) -> bytes:
        """The bytes of one sample's fields, one after the other. DataError where a value is not finite."""
        member, layout, start = self._members[index], self._layouts[index], self._starts[index]
        content = memoryview(self._shards.read(member))[start:]
        parts = {name: content[layout[name].begin : layout[name].end] for name in self.fields}
        for name, part in parts.items():
            if not is_finite(part, self.dtypes[name]):
                raise DataError(f"{member}: tensor {name!r} holds values that are not finite. Remove the sample.")
        return b"".join(parts.values())

    def decode(self, index: int) -> NDArray[np.uint8]:
        """(B,) uint8, the bytes of `encoded`."""
        return np.frombuffer(self.encoded(index), np.uint8)

    def batch(self, raw: Tensor, indices: Tensor, sample_ids: Tensor) -> Batch:
        """The samples `indices` (N,), whose bytes (N, B) are given, as one Batch; floats become f32."""
        tensors = {}
        for name, (begin, end) in zip(self.fields, self._spans, strict=True):
            # The clone is aligned, as a view of another dtype must be, and no longer the reader's buffer.
            values = raw[:, begin:end].clone(memory_format=torch.contiguous_format).view(self.dtypes[name])
            values = values.reshape(len(raw), *self.shapes[name])
            tensors[name] = values.float() if values.is_floating_point() else values
        return Batch(
            x0=tensors.pop(LATENTS, None),
            condition={name: tensors.pop(name) for name in CONDITIONS if name in tensors},
            sample_ids=sample_ids.to(raw.device),
            shape=self.sample_shape,
            extra=tensors,
        )

    def close(self) -> None:
        self._shards.close()

    def _check_unconditional(self) -> None:
        for name, value in self.unconditional.items():
            if tuple(value.shape) != self.shapes.get(name, value.shape) or not bool(torch.isfinite(value).all()):
                raise DataError(
                    f"{self.folder / UNCONDITIONAL}: tensor {name!r} of shape {tuple(value.shape)}, expected finite "
                    f"values of the samples' shape {self.shapes.get(name)}. Prepare the data again."
                )

    def _places(self) -> list[tuple[int, int]]:
        spans, position = [], 0
        for name in self.fields:
            info = self._layouts[0][name]
            spans.append((position, position := position + info.end - info.begin))
        return spans

    def _add(self, sample: dict[str, Member], fields: Sequence[str] | None) -> None:
        member = sample.get("safetensors")
        if member is None:
            raise DataError(f"{next(iter(sample.values()))}: the sample has no KEY.safetensors.")
        start, layout = self._layout(member)
        first = self._layouts[0] if self._layouts else layout
        for name in sorted(layout.keys() | first.keys()) if fields is None else fields:
            for owner, tensors in ((member, layout), (next(iter(self._members), member), first)):
                if name not in tensors:
                    why = "which other samples have" if fields is None else "which this run reads"
                    raise DataError(f"{owner}: the sample has no tensor {name!r}, {why}. Prepare the data again.")
            if (layout[name].dtype, layout[name].shape) != (first[name].dtype, first[name].shape):
                raise DataError(
                    f"{member}: tensor {name!r} is {layout[name]}, but {self._members[0]} has {first[name]}. "
                    "Samples of different shapes cannot be one batch: prepare the data again."
                )
        self._members.append(member)
        self._layouts.append(layout)
        self._starts.append(start)

    def _layout(self, member: Member) -> tuple[int, dict[str, TensorInfo]]:
        try:
            head = self._head(member, FIRST_READ)
            length = header_bytes(head, member.size)
            if length > len(head):
                head = self._head(member, MAX_HEADER_BYTES + 8)
            known = (head[:length], member.size)
            if known not in self._known:
                self._known[known] = parse_header(*known)
            return length, self._known[known]
        except ValueError as error:
            raise DataError(f"{member}: {error}. Replace or remove the sample.") from None

    def _head(self, member: Member, size: int) -> bytes:
        return self._shards.read(Member(member.shard, member.name, member.offset, min(member.size, size)))


@dataclass(frozen=True)
class Description:
    """What dataset.json says of the samples."""

    sample_shape: tuple[int, int, int]
    """(C, h, w), also where there are no latents."""
    shapes: dict[str, tuple[int, ...]]
    """Of each field, without batch dimension."""


def read_description(folder: str | Path) -> Description:
    """dataset.json of a folder. DataError where it is missing or says something else."""
    path = Path(folder) / DESCRIPTION
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        shape, fields = found["sample_shape"], found["fields"]
        shapes = {name: tuple(field["shape"]) for name, field in fields.items()}
        sides = [*shape, *(side for known in shapes.values() for side in known)]
        if len(shape) != 3 or not all(type(side) is int and 0 < side <= MAX_SIDE for side in sides):
            raise ValueError(f"sample_shape {str(shape)[:80]}, fields {str(fields)[:200]}")
    except FileNotFoundError:
        raise DataError(
            f"data.path: {folder} has no {DESCRIPTION}, which `dmd2-fast prepare` writes when everything else is "
            "there: start it again with the same arguments, and it goes on."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); expected sample_shape [channels, height, "
            "width] and fields. Prepare the data again."
        ) from error
    return Description(tuple(shape), shapes)


def read_unconditional(folder: str | Path) -> dict[str, Tensor]:
    """What stands for no prompt: {name: tensor without batch dimension}, f32. DataError where it cannot be read."""
    import safetensors
    import safetensors.torch

    path = Path(folder) / UNCONDITIONAL
    try:
        return {name: value.float() for name, value in safetensors.torch.load_file(path).items()}
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Prepare the data again.") from error
