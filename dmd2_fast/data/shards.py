"""WebDataset shards: tar files whose members 000123.png and 000123.cls together are one sample.

A shard is indexed once, by walking its tar headers, and read at random through (offset, size): nothing is unpacked.
The walk is our own rather than tarfile's because tarfile stops silently at a damaged header in the middle of an
archive and accepts one without an end, and either would quietly train on part of the data.
"""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from dmd2_fast.errors import DataError

BLOCK = 512
MAX_NAME_BYTES = 1 << 16
MAX_OPEN_SHARDS = 128  # further shards are opened for each read, well below the usual limit of 1,024 files
FILE_TYPES = (b"0", b"\0", b"7")
OTHER_TYPES = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a named pipe",
    b"S": "a sparse file",
}


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside a shard."""

    shard: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}: member {self.name!r}"


# --- writing ---------------------------------------------------------------------------------------------------------


def write_shard(path: str | Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write one tar, atomically: under another name first, so that an interrupted write leaves no file at `path`.

    Times, owners and modes are constant: the same members give the same bytes.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for name, content in members:
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    info.mode = 0o644
                    tar.addfile(info, io.BytesIO(content))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


# --- indexing --------------------------------------------------------------------------------------------------------


def _number(field: bytes) -> int:
    """A tar header's number: octal text, or big-endian binary where the first bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") - (1 << (8 * len(field) - 1))
    digits = field.strip(b"\0 ")
    if not digits.isalnum() and digits:
        raise ValueError(field)
    return int(digits or b"0", 8)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _pax_records(content: bytes) -> dict[str, str]:
    """The records "LENGTH KEY=VALUE\\n" of a pax extended header."""
    records = {}
    while content:
        length_text, _, _ = content.partition(b" ")
        length = int(length_text)
        if not len(length_text) < length <= len(content):
            raise ValueError("a pax record of impossible length")
        key, equals, value = content[len(length_text) + 1 : length].rstrip(b"\n").partition(b"=")
        if not equals:
            raise ValueError("a pax record without '='")
        records[key.decode("utf-8", "backslashreplace")] = value.decode("utf-8", "backslashreplace")
        content = content[length:]
    return records


def file_size(path: Path) -> int:
    """The file's size. Opening a named pipe would wait for ever, so what is no plain file is refused unopened."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check the path and its permissions.") from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: not a plain file, expected a tar file (a WebDataset shard).")
    return status.st_size


def scan_shard(path: str | Path) -> list[Member]:
    """The members of one tar, from its headers alone, in file order. Hidden files and folders are left out.

    Raises DataError for anything but a whole, well-formed tar of plain files.
    """
    path = Path(path)
    size = file_size(path)
    remedy = "The shard is damaged or was not written to its end: make it again or take it out of the folder."
    try:
        with open(path, "rb") as file:
            return _scan(path, file, size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check its permissions.") from error
    except ValueError as error:
        raise DataError(f"{path}: not a readable tar file: {error}. {remedy}") from error


def _scan(path: Path, file: io.BufferedReader, file_size: int) -> list[Member]:
    members: list[Member] = []
    offset = 0
    long_name: str | None = None
    long_size: int | None = None
    while True:
        file.seek(offset)
        header = file.read(BLOCK)
        place = f"at byte {offset}"
        if len(header) < BLOCK:
            raise ValueError(f"it ends {place} of {file_size} without tar's end mark")
        if not any(header):
            return members
        size, kind = _parse_header(header, place)
        name = long_name if long_name is not None else _header_name(header)
        if kind in FILE_TYPES and long_size is not None:
            size = long_size
        start = offset + BLOCK
        if size < 0 or start + size > file_size:
            raise ValueError(f"member {name!r} {place} claims {size} bytes, the file holds {file_size - start} more")
        if kind in (b"L", b"x"):
            if size > MAX_NAME_BYTES:
                raise ValueError(f"a name {place} of {size} bytes")
            content = file.read(size)
            if kind == b"L":
                long_name = _text(content)
            else:
                records = _pax_records(content)
                long_name = records.get("path", long_name)
                long_size = int(records["size"]) if "size" in records else long_size
        elif kind in OTHER_TYPES:
            raise ValueError(f"member {name!r} is {OTHER_TYPES[kind]}, expected plain files")
        else:
            if kind in FILE_TYPES and not name.rpartition("/")[2].startswith(".") and not name.endswith("/"):
                members.append(Member(path, name, start, size))
            long_name = long_size = None
        # Sizes are never negative here, so the walk always moves forward and always ends.
        offset = start + (size + BLOCK - 1) // BLOCK * BLOCK


def _parse_header(header: bytes, place: str) -> tuple[int, bytes]:
    """(size, type) of a header whose checksum holds."""
    try:
        checksum = _number(header[148:156])
        size = _number(header[124:136])
    except ValueError:
        checksum, size = -1, 0
    if checksum != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
        raise ValueError(f"no tar header {place}")
    return size, header[156:157]


def _header_name(header: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500])
    # GNU's own format keeps times where ustar has the prefix; only "ustar\0" says that a prefix is there.
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name


# --- a split: several shards -----------------------------------------------------------------------------------------


class ShardFolder:
    """The shards `folder/split-*.tar` as one list of samples, in the order of file names and then of members.

    samples: one {extension: Member} for each key, the key being the member's name up to the first dot.
    """

    def __init__(self, folder: str | Path, split: str, *, progress: bool = False) -> None:
        self.folder = Path(folder)
        self.split = split
        self.shards = find_shards(self.folder, split)
        self.samples: list[dict[str, Member]] = []
        for shard in tqdm(self.shards, desc=f"index {split} shards", unit="shard", delay=2, disable=not progress):
            self.samples.extend(_group_by_key(scan_shard(shard)))
        self._files: dict[Path, int] = {}

    def read(self, member: Member) -> bytes:
        """A member's content. Safe to call from several threads."""
        kept = self._files.get(member.shard)
        try:
            file = kept if kept is not None else os.open(member.shard, os.O_RDONLY)
            content = os.pread(file, member.size, member.offset)
        except OSError as error:
            raise DataError(f"{member}: cannot be read ({error.strerror}).") from error
        if kept is None and (len(self._files) >= MAX_OPEN_SHARDS or self._files.setdefault(member.shard, file) != file):
            os.close(file)
        if len(content) != member.size:
            raise DataError(
                f"{member}: {len(content)} of {member.size} bytes could be read: the shard was cut short since the "
                "run began. Make it again, and leave shards alone while a run reads them."
            )
        return content

    def close(self) -> None:
        """Close the open files; a later read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])


def find_shards(folder: Path, split: str) -> list[Path]:
    """The shards of a split, sorted by name; DataError where the folder or the shards are missing."""
    if not os.path.exists(folder):
        raise DataError(
            f"data.path: there is no folder {folder}. Expected a folder with {split}-000000.tar, ...; "
            "`dmd2-fast prepare` makes one."
        )
    if not os.path.isdir(folder):
        raise DataError(f"data.path: {folder} is a file, expected a folder with {split}-000000.tar, ...")
    try:
        shards = sorted(path for path in folder.iterdir() if path.match(f"{split}-*.tar"))
    except OSError as error:
        raise DataError(f"data.path: {folder} cannot be read ({error.strerror}).") from error
    if not shards:
        raise DataError(f"data.path: {folder} holds no {split} shards, expected {split}-000000.tar, ...")
    return shards


def _group_by_key(members: Iterable[Member]) -> list[dict[str, Member]]:
    samples: dict[str, dict[str, Member]] = {}
    for member in members:
        parent, slash, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        sample = samples.setdefault(parent + slash + stem, {})
        if extension in sample:
            raise DataError(f"{member}: the name occurs twice. Give every sample of a shard its own name.")
        sample[extension] = member
    return list(samples.values())
