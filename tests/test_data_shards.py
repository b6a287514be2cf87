"""Shards: the index against tarfile, and what can be wrong with a shard, named, at opening, without a hang."""

from __future__ import annotations

import io
import os
import random
import re
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from data_oracle import make_folder, png, random_pixels, sample_members, write_tar

from dmd2_fast.data import read_all
from dmd2_fast.data.dataset import ImageDataset
from dmd2_fast.data.shards import ShardFolder, scan_shard, write_shard
from dmd2_fast.errors import DataError

pytestmark = pytest.mark.timeout(60)


# --- the index -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_index_equals_tarfiles(tmp_path: Path, tar_format: int) -> None:
    rng = np.random.default_rng(0)
    names = ["a.png", "folder/b.cls", "x" * 90 + "/" + "y" * 60 + ".png", "e.json", "empty.cls"]
    if tar_format != tarfile.USTAR_FORMAT:
        names += ["long/" * 40 + "name.png", "größe.png"]
    members = [(name, b"" if name == "empty.cls" else rng.bytes(int(rng.integers(1, 2000)))) for name in names]
    path = write_tar(tmp_path / "train-000000.tar", members, tar_format)
    with tarfile.open(path) as tar:
        expected = [(member.name, member.offset_data, member.size) for member in tar.getmembers()]
    found = scan_shard(path)
    assert [(member.name, member.offset, member.size) for member in found] == expected
    folder = ShardFolder(tmp_path, "train")
    assert [folder.read(member) for member in found] == [content for _, content in members]
    folder.close()


def test_folders_and_hidden_files_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "train-000000.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("./"))
        folder = tarfile.TarInfo("inner")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in [("inner/._000000.png", b"resource fork"), *sample_members(random_pixels(1))]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert [member.name for member in scan_shard(path)] == ["000000.png", "000000.cls"]


def test_written_shards_are_atomic_and_always_the_same(tmp_path: Path) -> None:
    members = sample_members(random_pixels(3))
    for name in ("a.tar", "b.tar"):
        write_shard(tmp_path / name, members)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()] == members

    def interrupted() -> object:
        yield members[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "c.tar", interrupted())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar"]


def test_more_shards_than_files_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmd2_fast.data.shards.MAX_OPEN_SHARDS", 2)
    pixels = random_pixels(6)
    make_folder(tmp_path, pixels, samples_per_shard=1)
    before = len(os.listdir("/proc/self/fd"))
    dataset = ImageDataset(tmp_path, "train")
    for _ in range(2):
        assert all(np.array_equal(dataset.decode(index)[..., 0], pixels[index]) for index in range(6))
    assert len(os.listdir("/proc/self/fd")) == before + 2
    dataset.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert np.array_equal(dataset.decode(5)[..., 0], pixels[5])


# --- what can be wrong -----------------------------------------------------------------------------------------------


def chunk(name: bytes, content: bytes, *, wrong: bool = False) -> bytes:
    checksum = zlib.crc32(name + content) ^ wrong
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


def raw_png(*, width: int = 8, height: int = 8, depth: int = 8, color: int = 0, data: bytes | None = None,
            extra: bytes = b"", wrong: bool = False) -> bytes:  # fmt: skip
    """A PNG made by hand, with one thing wrong."""
    content = zlib.compress((b"\0" + bytes(8)) * 8) if data is None else data
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", content, wrong=wrong) + chunk(b"IEND", b"")


GOOD = sample_members(random_pixels(2))
WRONG_IMAGES = {
    "not PNG": (b"GIF89a" + bytes(60), "not a PNG"),
    "empty": (b"", "not a PNG"),
    "cut off in the header": (raw_png()[:20], "not a PNG"),
    "cut off in the data": (raw_png()[:50], "cut off"),
    "cut off before the end": (raw_png()[:-12], "cut off"),
    "wrong checksum": (raw_png(wrong=True), "chunk IDAT has a wrong checksum"),
    "something behind the end": (raw_png() + b"more", "4 bytes behind its end"),
    "too little data": (raw_png(data=zlib.compress(b"\0" * 30)), "bytes of pixels, expected 72"),
    "whole rows alone": (raw_png(data=zlib.compress(b"\0" * 27)), "27 bytes of pixels, expected 72"),
    "a broken profile": (raw_png(extra=chunk(b"iCCP", b"a\0")), "does not decode"),
    "a second header": (raw_png(data=zlib.compress(b"\0" * 72), extra=chunk(b"IHDR", bytes(13))), "two headers"),
    "no compressed data": (raw_png(data=b"\x78\x9c" + b"\x12\x34" * 20), "bytes of pixels, expected 72"),
    "16 bits": (png(np.zeros((8, 8), np.uint16)), "16 bits"),
    "palette": (raw_png(color=3), "a palette"),
    "alpha": (png(np.zeros((8, 8, 4), np.uint8)), "alpha"),
    "transparent colour": (raw_png(extra=chunk(b"tRNS", b"\0\0")), "transparent colour"),
    "a bomb": (raw_png(width=1 << 20, height=1 << 20), "pixels"),
    "no pixels": (raw_png(width=0), "pixels"),
    "another size": (png(random_pixels(1, (8, 9))[0]), "(1, 8, 9)"),
    "another number of channels": (png(random_pixels(1, (8, 8, 3))[0]), "(3, 8, 8)"),
}


def test_the_hand_made_png_is_right_where_nothing_is_wrong(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-000000.tar", [("1.png", raw_png()), ("1.cls", b"3\n")])
    images, labels = read_all(tmp_path)
    assert images.shape == (1, 1, 8, 8)
    assert bool((images == -1).all())
    assert labels.tolist() == [3]


@pytest.mark.parametrize("case", WRONG_IMAGES)
def test_wrong_images_are_found_at_opening(tmp_path: Path, case: str) -> None:
    content, message = WRONG_IMAGES[case]
    path = write_tar(tmp_path / "train-000001.tar", [*GOOD, ("bad.png", content), ("bad.cls", b"1")])
    with pytest.raises(DataError, match=re.escape(message)) as raised:
        ImageDataset(tmp_path, "train")
    assert str(path) in str(raised.value)
    assert "'bad.png'" in str(raised.value)


@pytest.mark.parametrize(
    "label", [b"", b"three", b"-1", b"1.0", b"1 2", b"\xff\xfe", b"9" * 31, b"0" * 5000, "٣".encode()]
)
def test_labels_that_are_no_class_number(tmp_path: Path, label: bytes) -> None:
    path = write_tar(tmp_path / "train-000000.tar", [*GOOD, ("bad.png", raw_png()), ("bad.cls", label)])
    with pytest.raises(DataError, match=r"expected a class number") as raised:
        ImageDataset(tmp_path, "train")
    assert str(path) in str(raised.value)
    assert "'bad.cls'" in str(raised.value)


def test_missing_and_repeated_members(tmp_path: Path) -> None:
    path = tmp_path / "train-000000.tar"
    for members, message in (
        ([*GOOD, ("bad.png", raw_png())], r"'bad\.png': the sample has no label"),
        ([*GOOD, ("bad.cls", b"1")], r"'bad\.cls': the sample has no image"),
        ([*GOOD, GOOD[0]], r"'000000\.png': the name occurs twice"),
        ([], "0 images"),
    ):
        write_tar(path, members)
        with pytest.raises(DataError, match=message) as raised:
            ImageDataset(tmp_path, "train")
        assert str(tmp_path) in str(raised.value)


def test_missing_folder_file_for_folder_no_shards(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    for path, message in (
        (tmp_path / "none", "there is no folder"),
        (file, "is a file"),
        (tmp_path, "no train shards"),
    ):
        with pytest.raises(DataError, match=message) as raised:
            read_all(path)
        assert str(path) in str(raised.value)


def damaged_tars() -> dict[str, bytes]:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in GOOD:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    whole = buffer.getvalue()
    header = bytearray(whole[:512])

    def with_size(field: bytes) -> bytes:
        changed = bytearray(header)
        changed[124:136] = field
        changed[148:156] = b"%06o\0 " % (sum(changed[:148]) + 8 * 32 + sum(changed[156:]))
        return bytes(changed) + whole[512:]

    def with_type(kind: bytes) -> bytes:
        changed = bytearray(header)
        changed[156:157] = kind
        changed[148:156] = b"%06o\0 " % (sum(changed[:148]) + 8 * 32 + sum(changed[156:]))
        return bytes(changed) + whole[512:]

    return {
        "an empty file": b"",
        "text": b"this is no tar file\n" * 100,
        "gzip": b"\x1f\x8b\x08" + bytes(range(256)) * 10,
        "cut off in a header": whole[:1100],
        "cut off in an image": whole[:600],
        "cut off between members": whole[:1024],
        "no end mark": whole[:4096],
        "a damaged header in the middle": whole[:1024] + b"\xff" * 512 + whole[1536:],
        "a size beyond the file": with_size(b"77777777777\0"),
        "a size of many bytes beyond the file": with_size(b"\x80" + b"\xff" * 11),
        "a negative size": with_size(b"\xff" * 11 + b"\x00"),
        "a size that is no number": with_size(b"12x45678901\0"),
        "a link": with_type(b"2"),
        "a device": with_type(b"3"),
        "a pax record that is cut off": with_type(b"x"),
    }


@pytest.mark.parametrize("case", damaged_tars())
def test_damaged_tars_are_refused(tmp_path: Path, case: str) -> None:
    path = tmp_path / "train-000000.tar"
    path.write_bytes(damaged_tars()[case])
    with pytest.raises(DataError, match=r"not a readable tar file") as raised:
        ImageDataset(tmp_path, "train")
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("size", ["-512", "-1024", "999999999", "1e3", "9" * 5000])
def test_sizes_in_pax_records(tmp_path: Path, size: str) -> None:
    """A negative one would send the walk back to where it was, for ever."""
    path = tmp_path / "train-000000.tar"
    info = tarfile.TarInfo("000000.png")
    info.pax_headers = {"size": size}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info)
    with pytest.raises(DataError, match=r"claims|invalid|limit"):
        scan_shard(path)


def test_what_is_no_plain_file_is_refused_unopened(tmp_path: Path) -> None:
    path = tmp_path / "train-000000.tar"
    os.mkfifo(path)
    with pytest.raises(DataError, match="not a plain file"):
        ImageDataset(tmp_path, "train")
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match="not a plain file"):
        ImageDataset(tmp_path, "train")
    path.rmdir()
    path.symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match="cannot be read"):
        ImageDataset(tmp_path, "train")


def test_a_shard_cut_short_during_the_run(tmp_path: Path) -> None:
    make_folder(tmp_path, random_pixels(3))
    dataset = ImageDataset(tmp_path, "train")
    os.truncate(tmp_path / "train-000000.tar", 700)
    with pytest.raises(DataError, match=r"train-000000\.tar: member '000002\.png'.*cut short"):
        dataset.decode(2)


def test_one_damaged_byte_never_changes_an_image_unnoticed(tmp_path: Path) -> None:
    """400 shards, each with one random byte changed: the same images, or a DataError, and no other end."""
    pixels = random_pixels(3)
    path = tmp_path / "train-000000.tar"
    whole = write_tar(path, sample_members(pixels), tarfile.USTAR_FORMAT).read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[rng.randrange(6 * 512 + 3 * 1024)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            dataset = ImageDataset(tmp_path, "train")
        except DataError:
            refused += 1
            continue
        assert dataset.num_samples == 3
        assert all(np.array_equal(dataset.decode(index)[..., 0], pixels[index]) for index in range(3))
        dataset.close()
    assert refused > 200  # the rest fell into padding or into a label
