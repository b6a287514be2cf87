"""Shards written and read with tarfile and Pillow alone, for the tests: nothing here uses dmd2_fast.data."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Settings:
    """The data section of a configuration, as loaders see it."""

    path: str
    loader: str = "plain"
    kind: str = "webdataset"
    num_threads: int = 2


def png(pixels: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **options)
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], tar_format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def random_pixels(num_images: int, shape: tuple[int, ...] = (8, 8), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_images, *shape), dtype=np.uint8)


def sample_members(pixels: np.ndarray, first: int = 0) -> list[tuple[str, bytes]]:
    """KEY.png and KEY.cls of each image; labels count up modulo 10."""
    members = []
    for index, image in enumerate(pixels, first):
        members += [(f"{index:06d}.png", png(image)), (f"{index:06d}.cls", str(index % 10).encode())]
    return members


def make_folder(folder: Path, pixels: np.ndarray, samples_per_shard: int = 5, split: str = "train") -> Path:
    for shard, first in enumerate(range(0, len(pixels), samples_per_shard)):
        part = pixels[first : first + samples_per_shard]
        write_tar(folder / f"{split}-{shard:06d}.tar", sample_members(part, first))
    return folder


def read_folder(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(N, ...) f32 pixels in [-1, 1], labels and names of a split, in file order."""
    images, labels, names = [], [], []
    for path in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            content = {member.name: tar.extractfile(member).read() for member in tar.getmembers()}
        for name in content:
            if name.endswith(".png"):
                images.append(np.asarray(Image.open(io.BytesIO(content[name]))))
                labels.append(int(content[name[:-3] + "cls"]))
                names.append(name[:-4])
    return np.stack(images).astype(np.float32) / np.float32(127.5) - np.float32(1), np.array(labels), names
