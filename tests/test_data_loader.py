"""Loaders: every batch against tarfile and Pillow, DALI against plain bit for bit, resume, ends and errors."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_oracle import Settings, make_folder, png, random_pixels, read_folder, sample_members, write_tar
from test_data_order import oracle_indices
from test_data_shards import raw_png

from dmd2_fast.data import Batch, Loader, dali_installed, make_loader, prepare_digits
from dmd2_fast.errors import DataError

pytestmark = pytest.mark.timeout(120)
NEEDS_DALI = pytest.mark.skipif(not dali_installed(), reason="NVIDIA DALI is not installed")
BOTH = ("plain", pytest.param("dali", marks=NEEDS_DALI))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "digits"
    prepare_digits(path, progress=False)
    return path


def take(loader: Loader, count: int) -> list[list[Batch]]:
    """The first iterations of a loader, which is closed then."""
    batches = list(itertools.islice(loader, count))
    loader.close()
    return batches


def joined(iterations: list[list[Batch]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All images, labels and sample ids, one after the other."""
    flat = [batch for iteration in iterations for batch in iteration]
    return (
        torch.cat([batch.x0 for batch in flat]),
        torch.cat([batch.condition["class_labels"] for batch in flat]),
        torch.cat([batch.sample_ids for batch in flat]),
    )


def assert_same(a: list[list[Batch]], b: list[list[Batch]]) -> None:
    assert [len(iteration) for iteration in a] == [len(iteration) for iteration in b]
    for left, right in zip(joined(a), joined(b), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("name", BOTH)
def test_batches_equal_reading_by_hand(digits: Path, name: str) -> None:
    """Two ranks, two accumulation steps, from before to after the end of the first epoch."""
    images, labels, _ = read_folder(digits, "train")
    batch, start, count = 2 * 2 * 16, 20, 6  # the epoch ends at position 1,437, in iteration 22
    for rank in (0, 1):
        loader = make_loader(
            Settings(str(digits), name), seed=5, rank=rank, world_size=2, micro_batch_size=16,
            gradient_accumulation_steps=2, start_iteration=start,
        )  # fmt: skip
        assert (loader.name, loader.num_samples, loader.sample_shape) == (name, 1437, (1, 8, 8))
        for iteration, micro_batches in enumerate(take(loader, count), start):
            assert len(micro_batches) == 2
            for step, micro in enumerate(micro_batches):
                ids = [(rank * 2 + step) * 16 + i for i in range(16)]
                first = iteration * batch + ids[0]
                indices = oracle_indices(range(first, first + 16), 1437, 5)
                assert micro.sample_ids.tolist() == ids
                assert micro.condition["class_labels"].tolist() == labels[indices].tolist()
                assert torch.equal(micro.x0, torch.from_numpy(images[indices])[:, None])
                assert (micro.x0.dtype, micro.sample_ids.dtype) == (torch.float32, torch.int64)
                assert micro.condition["class_labels"].dtype == torch.int64
                assert micro.x0.is_contiguous()
                assert len(micro) == 16


@NEEDS_DALI
@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3), (13, 7), (5, 31, 3)])
def test_dali_equals_plain_bit_for_bit(tmp_path: Path, shape: tuple[int, ...]) -> None:
    pixels = random_pixels(23, shape)
    make_folder(tmp_path, pixels)
    batches = {
        name: take(make_loader(Settings(str(tmp_path), name), seed=1, micro_batch_size=8), 9)
        for name in ("dali", "plain")
    }
    assert_same(batches["dali"], batches["plain"])
    x0 = joined(batches["dali"])[0]
    channels_last = np.atleast_3d(pixels[0]).shape
    assert x0.shape == (72, channels_last[2], *channels_last[:2])


@pytest.mark.parametrize("name", BOTH)
def test_what_decoders_are_tempted_to_change(tmp_path: Path, name: str) -> None:
    """A gamma, a resolution and an orientation in the file leave the pixels alone."""
    from PIL import Image, PngImagePlugin

    pixels = random_pixels(4, (6, 9, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    info = PngImagePlugin.PngInfo()
    info.add(b"gAMA", (22000).to_bytes(4, "big"))
    info.add_text("comment", "text")
    options = ({}, {"exif": exif}, {"pnginfo": info}, {"dpi": (7, 300), "compress_level": 0})
    members = []
    for index, (image, extra) in enumerate(zip(pixels, options, strict=True)):
        members += [(f"{index}.png", png(image, **extra)), (f"{index}.cls", str(index).encode())]
    write_tar(tmp_path / "train-000000.tar", members)
    x0, labels, _ = joined(take(make_loader(Settings(str(tmp_path), name), seed=0, micro_batch_size=4), 1))
    expected = pixels.astype(np.float32).transpose(0, 3, 1, 2) / np.float32(127.5) - np.float32(1)
    assert torch.equal(x0, torch.from_numpy(expected)[labels])


@pytest.mark.parametrize("name", BOTH)
def test_every_split_gives_the_same_global_batches(digits: Path, name: str) -> None:
    """1 x 64, 2 x 32 and 2 x 16 with accumulation 2, over the end of an epoch; also shares of another order."""

    def global_batches(world_size: int, micro: int, accumulation: int) -> list[list[Batch]]:
        ranks = [
            take(
                make_loader(
                    Settings(str(digits), name), seed=2, rank=rank, world_size=world_size, micro_batch_size=micro,
                    gradient_accumulation_steps=accumulation, start_iteration=21,
                ),
                3,
            )
            for rank in range(world_size)
        ]  # fmt: skip
        return [[batch for rank in ranks for batch in rank[iteration]] for iteration in range(3)]

    whole = joined(global_batches(1, 64, 1))
    assert whole[2].tolist() == list(range(64)) * 3
    for split in ((2, 32, 1), (2, 16, 2), (1, 16, 4)):
        for left, right in zip(whole, joined(global_batches(*split)), strict=True):
            assert torch.equal(left, right)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_resume_equals_no_interruption(tmp_path: Path, name: str, num_threads: int) -> None:
    make_folder(tmp_path, random_pixels(22))  # an epoch of 2.75 iterations
    data = Settings(str(tmp_path), name, num_threads=num_threads)
    whole = take(make_loader(data, seed=3, micro_batch_size=4, gradient_accumulation_steps=2), 9)
    for start in (1, 2, 3, 6):
        loader = make_loader(data, seed=3, micro_batch_size=4, gradient_accumulation_steps=2, start_iteration=start)
        assert_same(take(loader, 9 - start), whole[start:])


@pytest.mark.parametrize("name", BOTH)
def test_a_loader_can_be_iterated_again_and_twice_at_once(tmp_path: Path, name: str) -> None:
    make_folder(tmp_path, random_pixels(9))
    loader = make_loader(Settings(str(tmp_path), name), seed=0, micro_batch_size=4)
    first, second = iter(loader), iter(loader)
    pairs = [(next(first), next(second)) for _ in range(4)]
    assert_same([a for a, _ in pairs], [b for _, b in pairs])
    assert_same(list(itertools.islice(loader, 4)), [a for a, _ in pairs])
    kept = pairs[0][0][0].x0.clone()
    next(first)
    assert torch.equal(pairs[0][0][0].x0, kept)  # a batch is the caller's: reading on does not overwrite it
    loader.close()
    with pytest.raises(StopIteration):
        next(first)


def threads_and_files() -> tuple[set[str], int]:
    """The process's threads by number, once those that are ending have ended, and its number of open files."""
    gc.collect()
    before: set[str] = set()
    deadline = time.monotonic() + 10
    while (now := set(os.listdir("/proc/self/task"))) != before and time.monotonic() < deadline:
        before = now
        time.sleep(0.3)
    return now, len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("name", BOTH)
def test_close_ends_threads_and_files(tmp_path: Path, name: str) -> None:
    make_folder(tmp_path, random_pixels(40, (32, 32)))
    take(make_loader(Settings(str(tmp_path), name), seed=0, micro_batch_size=8), 2)  # whatever is started once for all
    threads, files = threads_and_files()
    for _ in range(3):
        loader = make_loader(Settings(str(tmp_path), name), seed=0, micro_batch_size=8)
        stream = iter(loader)
        next(stream)
        assert set(os.listdir("/proc/self/task")) - threads
        loader.close()
        loader.close()
    after = threads_and_files()
    assert after[0] <= threads
    assert after[1] == files


@pytest.mark.parametrize("name", BOTH)
def test_seeds_and_epochs_have_their_own_order(tmp_path: Path, name: str) -> None:
    make_folder(tmp_path, random_pixels(10))
    orders = {}
    for seed in (0, 1):
        loader = make_loader(Settings(str(tmp_path), name), seed=seed, micro_batch_size=10)
        for epoch, labels in enumerate(joined(take(loader, 3))[1].split(10)):
            orders[seed, epoch] = tuple(labels.tolist())  # the ten samples have the labels 0 to 9
    assert all(sorted(order) == list(range(10)) for order in orders.values())
    assert len(set(orders.values())) == 6


# --- which loader ----------------------------------------------------------------------------------------------------


def test_without_dali(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    make_folder(tmp_path, random_pixels(4))
    monkeypatch.setattr("dmd2_fast.data.loader.dali_installed", lambda: False)
    with caplog.at_level(logging.INFO, logger="dmd2_fast"):
        assert make_loader(Settings(str(tmp_path), "auto"), seed=0, micro_batch_size=2).name == "plain"
    assert "4 samples" in caplog.text
    assert "read with the plain loader" in caplog.text
    with pytest.raises(DataError, match="pip install nvidia-dali-cuda130"):
        make_loader(Settings(str(tmp_path), "dali"), seed=0, micro_batch_size=2)


def test_dali_that_does_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    make_folder(tmp_path, random_pixels(4))
    monkeypatch.setattr("dmd2_fast.data.loader.dali_installed", lambda: True)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # makes the import fail
    with caplog.at_level(logging.WARNING, logger="dmd2_fast"):
        assert make_loader(Settings(str(tmp_path), "auto"), seed=0, micro_batch_size=2).name == "plain"
    assert "does not import" in caplog.text
    with pytest.raises(DataError, match="does not import"):
        make_loader(Settings(str(tmp_path), "dali"), seed=0, micro_batch_size=2)


@NEEDS_DALI
def test_auto_is_dali_where_it_is_installed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_folder(tmp_path, random_pixels(4))
    with caplog.at_level(logging.INFO, logger="dmd2_fast"):
        assert make_loader(Settings(str(tmp_path), "auto"), seed=0, micro_batch_size=2).name == "dali"
    assert "read with the dali loader" in caplog.text


def test_importing_the_data_imports_neither_dali_nor_scikit_learn() -> None:
    code = "import sys, dmd2_fast.data; print([name for name in sys.modules if name.startswith(('nvidia', 'sklearn'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout.strip() == "[]"


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"loader": "fast"}, {"kind": "folder"}])
def test_unknown_settings(tmp_path: Path, change: dict[str, str]) -> None:
    make_folder(tmp_path, random_pixels(4))
    with pytest.raises(DataError, match=next(iter(change.values()))):
        make_loader(replace(Settings(str(tmp_path)), **change), seed=0, micro_batch_size=2)


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("wrong", ["data", "checksum"])
def test_a_damaged_image_of_a_large_data_set_is_named_when_read(
    tmp_path: Path, name: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large data is not decoded at opening; its damaged image is an error when its turn comes, from both loaders."""
    monkeypatch.setattr("dmd2_fast.data.dataset.DECODE_ALL_BYTES", 0)
    damaged = raw_png(data=b"\x78\x9c" + b"\x12\x34" * 20) if wrong == "data" else raw_png(wrong=True)
    members = [*sample_members(random_pixels(30)), ("bad.png", damaged), ("bad.cls", b"0")]
    path = write_tar(tmp_path / "train-000000.tar", members)
    turn = oracle_indices(range(31), 31, 4).index(30) // 2
    loader = make_loader(Settings(str(tmp_path), name), seed=4, micro_batch_size=2)
    given = 0
    with pytest.raises(DataError, match=re.escape(f"{path}: member 'bad.png'")):
        for _ in loader:
            given += 1
    assert turn - 3 <= given <= turn  # reading ahead may find it a little earlier, never later
    loader.close()


@pytest.mark.parametrize("name", BOTH)
def test_a_shard_that_shrinks_during_the_run(tmp_path: Path, name: str) -> None:
    make_folder(tmp_path, random_pixels(40), samples_per_shard=40)
    loader = make_loader(Settings(str(tmp_path), name), seed=0, micro_batch_size=4)
    stream = iter(loader)
    next(stream)
    os.truncate(tmp_path / "train-000000.tar", 2000)
    with pytest.raises(DataError, match=r"train-000000\.tar: member .* cut short"):
        for _ in range(10):
            next(stream)
    loader.close()


# --- Batch -----------------------------------------------------------------------------------------------------------


def test_batch_to_changes_floating_values_only() -> None:
    condition = {"class_labels": torch.tensor([1, 2]), "prompt_embeds": torch.ones(2, 3)}
    batch = Batch(x0=torch.full((2, 1, 2, 2), 0.1), condition=condition, sample_ids=torch.tensor([4, 5]))
    moved = batch.to("cpu", torch.bfloat16)
    assert torch.equal(moved.x0, torch.full((2, 1, 2, 2), 0.1, dtype=torch.bfloat16))
    assert moved.condition["prompt_embeds"].dtype == torch.bfloat16
    assert torch.equal(moved.condition["class_labels"], condition["class_labels"])
    assert torch.equal(moved.sample_ids, batch.sample_ids)
    assert batch.to("meta").x0.device.type == "meta"
    assert batch.to("cpu").x0.dtype == torch.float32
