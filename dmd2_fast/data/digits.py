"""The 1,797 real handwritten digits that scikit-learn ships, as WebDataset shards.

They are the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, UCI Machine Learning
Repository, 1998): 8x8 pixels with 17 gray levels.

The split: numpy.random.RandomState(0).permutation(1797); its first 360 entries are the test split, the other 1,437 the
training split, both in the permutation's order. That is scikit-learn's
train_test_split(test_size=360, random_state=0). A sample's name is its number in scikit-learn's own order.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dmd2_fast.data.dataset import ImageDataset
from dmd2_fast.data.images import encode_png
from dmd2_fast.data.shards import write_shard
from dmd2_fast.errors import DataError

NUM_TRAIN = 1437
NUM_TEST = 360
SPLIT_SEED = 0
SAMPLES_PER_SHARD = 360


def split_indices() -> dict[str, np.ndarray]:
    """{"train": (1437,), "test": (360,)}: numbers in scikit-learn's order."""
    permutation = np.random.RandomState(SPLIT_SEED).permutation(NUM_TRAIN + NUM_TEST)
    return {"train": permutation[NUM_TEST:], "test": permutation[:NUM_TEST]}


def prepare_digits(folder: str | Path, *, progress: bool = True) -> None:
    """Write train-000000.tar ... and test-000000.tar into `folder`, or check what is there already.

    All or nothing: the shards are written beside `folder` and renamed to it together. DataError where `folder` is not
    empty and does not hold exactly the 1,437 + 360 digits.
    """
    folder = Path(folder).resolve()
    if not folder.name:
        raise DataError(f"{folder} is the root folder, expected a folder for the digits. Choose another path.")
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise DataError(f"{folder} is a file, expected a folder for the digits. Choose another path.")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        if os.path.isdir(folder) and any(folder.iterdir()):
            _check(folder)
            return
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(partial, progress)
        try:
            os.rename(partial, folder)  # replaces an empty folder, fails on any other
        except OSError:
            if not os.path.isdir(folder):
                raise
            _check(folder)  # another process was faster
    except OSError as error:
        raise DataError(f"{folder}: the digits cannot be written ({error.strerror}). Check the path.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(folder: Path, progress: bool) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    splits = split_indices()
    total = sum(len(indices) for indices in splits.values())
    with tqdm(total=total, desc="prepare digits", unit="image", disable=not progress) as bar:

        def members(indices: np.ndarray) -> Iterator[tuple[str, bytes]]:
            for index in indices:
                yield f"{index:06d}.png", encode_png(pixels[index])
                yield f"{index:06d}.cls", str(digits.target[index]).encode()
                bar.update()

        for split, indices in splits.items():
            for shard, first in enumerate(range(0, len(indices), SAMPLES_PER_SHARD)):
                write_shard(folder / f"{split}-{shard:06d}.tar", members(indices[first : first + SAMPLES_PER_SHARD]))


def _check(folder: Path) -> None:
    remedy = f"Remove {folder} (or choose another path) and prepare the digits again."
    for split, expected in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        try:
            dataset = ImageDataset(folder, split)
        except DataError as error:
            raise DataError(f"{folder} does not hold the digits: {error} {remedy}") from error
        dataset.close()
        if dataset.num_samples != expected or dataset.image_shape != (1, 8, 8):
            raise DataError(
                f"{folder} holds {dataset.num_samples} {split} images of shape {dataset.image_shape}, "
                f"expected {expected} digits of shape (1, 8, 8). {remedy}"
            )
