"""What a sample of a kind of data is: the only place that knows, one class a kind.

A data set gives the encoded bytes of a sample, decodes them, and makes batches of them. Loaders know nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dmd2_fast.data.batch import Batch
from dmd2_fast.data.images import HEADER_BYTES, ImageShape, decode_png, images_from_pixels, pixel_levels, png_shape
from dmd2_fast.data.latents import LatentDataset
from dmd2_fast.data.shards import Member, ShardFolder
from dmd2_fast.errors import DataError

MAX_LABEL_BYTES = 32
# Data this small is decoded once before training starts, so that a damaged image is found then and not hours later.
DECODE_ALL_BYTES = 16 << 20


class Dataset(Protocol):
    """What loaders ask of a kind of data."""

    sample_shape: tuple[int, int, int]
    """(C, H, W) of the samples x0."""
    encoding: str
    """What `encoded` gives: "png", or "raw" where it is the bytes of `decode` already."""

    @property
    def num_samples(self) -> int: ...

    def encoded(self, index: int) -> bytes:
        """One sample's bytes, for a reader that decodes them itself."""
        ...

    def decode(self, index: int) -> NDArray[np.uint8]:
        """One sample as bytes, of one shape for all samples. DataError names what is wrong."""
        ...

    def batch(self, raw: Tensor, indices: Tensor, sample_ids: Tensor) -> Batch:
        """The samples `indices` (N,) from their decoded bytes `raw` (N, ...) uint8, on the device of `raw`."""
        ...

    def close(self) -> None: ...


class ImageDataset:
    """Labelled images: members KEY.png (8-bit gray or RGB, all of one size) and KEY.cls (a class number as text).

    Every header, image header and label is read here; DataError names the file and the member that is not as expected.

    image_shape: (C, H, W).  labels: (num_samples,) int64.
    """

    encoding = "png"

    def __init__(self, folder: str | Path, split: str, *, progress: bool = False) -> None:
        self._shards = ShardFolder(folder, split, progress=progress)
        if not self._shards.samples:
            raise DataError(
                f"{folder}: the {split} shards hold 0 images, expected members like 000000.png, 000000.cls."
            )
        self._images: list[Member] = []
        self._levels: dict[torch.device, Tensor] = {}
        labels: list[int] = []
        shape: ImageShape | None = None
        samples = tqdm(self._shards.samples, desc=f"check {split} samples", delay=2, disable=not progress)
        for sample in samples:
            image, label = self._pair(sample)
            found = self._shape(image)
            if shape is not None and found != shape:
                raise DataError(
                    f"{image}: an image of (channels, height, width) {found}, but {self._images[0]} has {shape}. "
                    "Bring all images to one size before making the shards."
                )
            shape = found
            self._images.append(image)
            labels.append(self._label(label))
        assert shape is not None
        self.image_shape: ImageShape = shape
        self.sample_shape: ImageShape = shape
        self.labels: Tensor = torch.tensor(labels, dtype=torch.int64)
        if sum(image.size for image in self._images) <= DECODE_ALL_BYTES:
            for index in range(self.num_samples):
                self.decode(index)

    @property
    def num_samples(self) -> int:
        return len(self._images)

    def encoded(self, index: int) -> bytes:
        """The bytes of one sample's image as they are in the shard, unchecked."""
        return self._shards.read(self._images[index])

    def decode(self, index: int) -> NDArray[np.uint8]:
        """(H, W, C) uint8 of one sample; DataError naming file and member where it does not decode."""
        member = self._images[index]
        try:
            return decode_png(self._shards.read(member))
        except ValueError as error:
            raise DataError(f"{member}: {error}. Replace or remove the sample.") from error

    def condition(self, indices: Tensor) -> dict[str, Tensor]:
        """The conditions of the samples `indices` (N,), each (N, ...)."""
        return {"class_labels": self.labels[indices]}

    def batch(self, raw: Tensor, indices: Tensor, sample_ids: Tensor) -> Batch:
        """The samples `indices` (N,), whose pixels (N, H, W, C) are given, as one Batch on their device."""
        if raw.device not in self._levels:
            self._levels[raw.device] = pixel_levels(raw.device)
        condition = {name: value.to(raw.device) for name, value in self.condition(indices).items()}
        return Batch(images_from_pixels(raw, self._levels[raw.device]), condition, sample_ids.to(raw.device))

    def close(self) -> None:
        self._shards.close()

    def _pair(self, sample: dict[str, Member]) -> tuple[Member, Member]:
        image, label = sample.get("png"), sample.get("cls")
        if image is None or label is None:
            present = next(iter(sample.values()))
            missing = "image (.png)" if image is None else "label (.cls)"
            raise DataError(f"{present}: the sample has no {missing}. Every sample needs KEY.png and KEY.cls.")
        return image, label

    def _shape(self, image: Member) -> ImageShape:
        head = Member(image.shard, image.name, image.offset, min(image.size, HEADER_BYTES))
        try:
            return png_shape(self._shards.read(head))
        except ValueError as error:
            raise DataError(f"{image}: {error}. Replace or remove the sample.") from error

    def _label(self, label: Member) -> int:
        text = self._shards.read(label).strip() if label.size <= MAX_LABEL_BYTES else b""
        if not text.isdigit() or int(text) >= 1 << 31:
            shown = repr(text.decode("utf-8", "backslashreplace")) if text else f"{label.size} bytes"
            raise DataError(f"{label}: the label is {shown}, expected a class number 0, 1, 2, ...")
        return int(text)


DATASETS: dict[str, type[ImageDataset] | type[LatentDataset]] = {"webdataset": ImageDataset, "latents": LatentDataset}


def open_dataset(
    kind: str, folder: str | Path, split: str, *, fields: Sequence[str] | None = None, progress: bool = False
) -> ImageDataset | LatentDataset:
    """The data set of a kind (config.py's data.kind); `fields` are the tensors to read of latents, default all."""
    if kind not in DATASETS:
        raise DataError(f"data.kind is {kind!r}, expected one of {', '.join(sorted(DATASETS))}.")
    if kind == "latents":
        return LatentDataset(folder, split, fields=fields, progress=progress)
    return ImageDataset(folder, split, progress=progress)
