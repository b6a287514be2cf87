"""Loaders: batches in the keyed order, through DALI or through PyTorch, the same bits from both."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dmd2_fast.data.batch import Batch
from dmd2_fast.data.dataset import Dataset, ImageDataset, open_dataset
from dmd2_fast.data.images import images_from_pixels, pixel_levels
from dmd2_fast.data.order import KeyedOrder
from dmd2_fast.errors import DataError

logger = logging.getLogger(__name__)

LOADERS = ("auto", "dali", "plain")
PREFETCH = 2  # iterations read ahead of the one in training


class DataConfig(Protocol):
    """The fields of config.py's data section that are used here."""

    @property
    def kind(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def loader(self) -> str: ...
    @property
    def num_threads(self) -> int: ...


class Loader(ABC):
    """An endless stream of global batches, this rank's share of each.

    iter(loader) yields list[Batch], one Batch for each accumulation step, for start_iteration, start_iteration + 1, ...
    """

    name: str

    def __init__(
        self,
        dataset: Dataset,
        order: KeyedOrder,
        *,
        micro_batch_size: int,
        device: torch.device | str = "cpu",
        start_iteration: int = 0,
        num_threads: int = 2,
    ) -> None:
        self.dataset = dataset
        self.order = order
        self.micro_batch_size = micro_batch_size
        self.device = torch.device(device)
        self.start_iteration = start_iteration
        self.num_threads = num_threads
        self._streams: list[Generator[Tensor, None, None]] = []

    @property
    def num_samples(self) -> int:
        """The number of training samples."""
        return self.dataset.num_samples

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images, or latents."""
        return self.dataset.sample_shape

    def __iter__(self) -> Iterator[list[Batch]]:
        stream = self._raw()
        self._streams.append(stream)
        try:
            for iteration, raw in zip(itertools.count(self.start_iteration), stream, strict=False):
                yield self._batches(iteration, raw)
        finally:
            stream.close()
            if stream in self._streams:
                self._streams.remove(stream)

    def close(self) -> None:
        """End the running iterators, their threads and pipelines, and close the files."""
        while self._streams:
            self._streams.pop().close()
        self.dataset.close()

    @abstractmethod
    def _raw(self) -> Generator[Tensor, None, None]:
        """The decoded bytes of A * M samples, (A * M, ...) uint8 on self.device, for start_iteration and on."""

    def _batches(self, iteration: int, raw: Tensor) -> list[Batch]:
        sample_ids, indices = self.order(iteration)
        return self.dataset.batch(raw, indices, sample_ids).split(self.micro_batch_size)


def dali_installed() -> bool:
    """Whether NVIDIA DALI can be found; it is imported only when a loader uses it."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


def choose_loader(wanted: str) -> str:
    """ "dali" or "plain" for config.py's data.loader. DataError where DALI is asked for and not installed."""
    if wanted not in LOADERS:
        raise DataError(f"data.loader is {wanted!r}, expected one of {', '.join(LOADERS)}.")
    if wanted == "plain":
        return "plain"
    if not dali_installed():
        if wanted == "auto":
            return "plain"
        raise DataError(
            'data.loader is "dali", but NVIDIA DALI is not installed. `pip install nvidia-dali-cuda130` installs it '
            '(nvidia-dali-cuda120 on older drivers; both also run without a GPU), or set data.loader to "plain".'
        )
    try:
        importlib.import_module("nvidia.dali")
    except Exception as error:  # a library it links may be missing: ImportError, OSError, RuntimeError
        if wanted == "auto":
            logger.warning("DALI is installed but does not import (%s): reading with the plain loader", error)
            return "plain"
        raise DataError(
            f'data.loader is "dali", but NVIDIA DALI does not import ({error}). '
            'Reinstall it, or set data.loader to "plain".'
        ) from error
    return "dali"


def _loader_type(name: str) -> type[Loader]:
    if name == "dali":
        from dmd2_fast.data.dali import DaliLoader

        return DaliLoader
    from dmd2_fast.data.plain import PlainLoader

    return PlainLoader


def make_loader(
    data: DataConfig,
    *,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    micro_batch_size: int,
    gradient_accumulation_steps: int = 1,
    device: torch.device | str = "cpu",
    start_iteration: int = 0,
    fields: Sequence[str] | None = None,
) -> Loader:
    """The training split of `data.path` as this rank's Loader; raises DataError for data that cannot be read.

    `fields` are the tensors to read where data.kind is latents; default: all that the samples have.
    """
    name = choose_loader(data.loader)
    dataset = open_dataset(data.kind, data.path, "train", fields=fields, progress=rank == 0)
    order = KeyedOrder(
        dataset.num_samples,
        seed=seed,
        rank=rank,
        world_size=world_size,
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    if rank == 0:
        logger.info("data: %d samples from %s, read with the %s loader", dataset.num_samples, data.path, name)
    return _loader_type(name)(
        dataset,
        order,
        micro_batch_size=micro_batch_size,
        device=device,
        start_iteration=start_iteration,
        num_threads=data.num_threads,
    )


def read_all(path: str | Path, split: str = "train") -> tuple[Tensor, Tensor]:
    """A whole split in file order: images (N, C, H, W) f32 in [-1, 1] and labels (N,) int64.

    `path` is the folder of the shards.
    """
    dataset = ImageDataset(path, split)
    channels, height, width = dataset.image_shape
    pixels = torch.empty((dataset.num_samples, height, width, channels), dtype=torch.uint8)
    for index in range(dataset.num_samples):
        pixels[index] = torch.from_numpy(dataset.decode(index).copy())
    dataset.close()
    return images_from_pixels(pixels, pixel_levels()), dataset.labels
