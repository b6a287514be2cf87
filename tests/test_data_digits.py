"""scikit-learn's digits as shards: every pixel, label and the split, against scikit-learn itself."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from data_oracle import make_folder, random_pixels, read_folder
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from dmd2_fast.data import digits, prepare_digits, read_all
from dmd2_fast.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "digits"
    prepare_digits(path, progress=False)
    return path


def listing(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_the_split_is_scikit_learns(folder: Path) -> None:
    data = load_digits()
    train, test = train_test_split(np.arange(1797), test_size=360, random_state=0)
    for split, expected in (("train", train), ("test", test)):
        images, labels, names = read_folder(folder, split)
        assert [int(name) for name in names] == expected.tolist()
        assert labels.tolist() == data.target[expected].tolist()
        # 16 gray levels to 255: u = round(v * 255 / 16), so images differ from v / 8 - 1 by half a level at most.
        assert np.abs((images + 1) * 127.5 - data.images[expected] * 255 / 16).max() <= 0.501
        assert np.array_equal(np.round((images + 1) * 8), data.images[expected])


def test_train_and_test_do_not_overlap(folder: Path) -> None:
    names = {split: read_folder(folder, split)[2] for split in ("train", "test")}
    assert len(names["train"]) == 1437
    assert len(names["test"]) == 360
    assert set(names["train"]) | set(names["test"]) == {f"{index:06d}" for index in range(1797)}


def test_there_are_several_shards_and_nothing_else(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "test-000000.tar", "train-000000.tar", "train-000001.tar", "train-000002.tar", "train-000003.tar",
    ]  # fmt: skip
    assert [path.name for path in folder.parent.iterdir()] == ["digits"]


def test_read_all_equals_reading_by_hand(folder: Path) -> None:
    for split in ("train", "test"):
        images, labels, _ = read_folder(folder, split)
        read_images, read_labels = read_all(folder, split)
        assert read_images.dtype == torch.float32
        assert read_labels.dtype == torch.int64
        assert torch.equal(read_images, torch.from_numpy(images)[:, None])
        assert read_labels.tolist() == labels.tolist()


def test_a_second_call_reuses(folder: Path) -> None:
    before = listing(folder)
    prepare_digits(folder)
    assert listing(folder) == before


def test_the_same_bytes_each_time(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "made" / "on the way"
    prepare_digits(other, progress=False)
    assert {name: content for name, (content, _) in listing(other).items()} == {
        name: content for name, (content, _) in listing(folder).items()
    }


def test_an_interrupted_call_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []

    def stop_at_the_third(path: Path, members: object) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        path.write_bytes(b"")

    monkeypatch.setattr(digits, "write_shard", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        prepare_digits(tmp_path / "digits", progress=False)
    assert len(written) == 2
    assert list(tmp_path.iterdir()) == []


def test_processes_at_the_same_time(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes second finds the folder there: it is checked, and nothing is left behind."""
    ids = iter(range(100, 200))
    monkeypatch.setattr(os, "getpid", lambda: next(ids))
    target = tmp_path / "digits"
    with ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(prepare_digits, target, progress=False) for _ in range(3)]:
            future.result()
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
    assert {name: content for name, (content, _) in listing(target).items()} == {
        name: content for name, (content, _) in listing(folder).items()
    }


def test_an_empty_folder_and_a_link_to_one_are_filled(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    prepare_digits(tmp_path / "link", progress=False)
    assert len(list((tmp_path / "real").glob("*.tar"))) == 5
    assert (tmp_path / "link").is_symlink()


def test_what_is_not_the_digits_is_refused_and_kept(tmp_path: Path, folder: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(DataError, match="is a file"):
        prepare_digits(file, progress=False)
    with pytest.raises(DataError, match="cannot be written"):
        prepare_digits(file / "digits", progress=False)

    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="holds no train shards"):
        prepare_digits(other, progress=False)
    assert (other / "notes.txt").read_text() == "mine"

    wrong = make_folder(tmp_path / "wrong", random_pixels(7))
    with pytest.raises(DataError, match=r"holds 7 train images .* expected 1437"):
        prepare_digits(wrong, progress=False)

    short = tmp_path / "short"
    short.mkdir()
    for path in folder.iterdir():
        (short / path.name).write_bytes(path.read_bytes()[: 40_000 if path.name == "train-000002.tar" else None])
    with pytest.raises(DataError, match=r"train-000002\.tar"):
        prepare_digits(short, progress=False)
