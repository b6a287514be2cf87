"""What `dmd2-fast prepare` starts from: images with captions in a folder, or prompts in a file; none of it trusted.

A caption is NAME.txt beside the image, or the image's line in metadata.jsonl as Hugging Face's imagefolder has it:
{"file_name": "a.jpg", "text": "..."}. What cannot be used is an `Input` with its `problem`, never an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from tqdm import tqdm

from dmd2_fast.data.images import MAX_PIXELS
from dmd2_fast.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
METADATA = "metadata.jsonl"
CAPTION_KEYS = ("text", "caption", "prompt")
MAX_CAPTION_BYTES = 1 << 16

# Larger images are refused below, with a reason of our own.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True, slots=True)
class Input:
    """One image with its caption, or one prompt."""

    name: str
    """The image relative to its folder, or the line of a file."""
    prompt: str = ""
    path: Path | None = None
    """The image's file; None for a prompt alone."""
    num_bytes: int = 0
    problem: str | None = None
    """Why it cannot be used, or None."""


class _UnusableError(Exception):
    """Why a file cannot be used."""


def digest(inputs: Iterable[Input]) -> str:
    """A hash of names, sizes of files and captions: other inputs have another one."""
    found = hashlib.sha256()
    for item in inputs:
        for part in (item.name, item.prompt, str(item.num_bytes), item.problem or ""):
            content = part.encode("utf-8", "surrogatepass")
            found.update(len(content).to_bytes(8, "little") + content)
    return found.hexdigest()


# --- images with captions --------------------------------------------------------------------------------------------


def list_images(folder: str | Path, *, progress: bool = False) -> list[Input]:
    """Every image below a folder, sorted by name, and what metadata.jsonl names beside. DataError without any.

    Hidden files are passed over. Links to files are followed, links to folders are not.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"--images: {folder} {what}, expected a folder of images with captions.")
    inputs: list[Input] = []
    captions = _read_metadata(folder / METADATA, inputs)
    for relative, is_link in tqdm(_walk(folder), desc="list images", unit="image", delay=2, disable=not progress):
        if is_link:
            inputs.append(Input(relative, problem="a link to a folder, which is not followed"))
        elif relative in captions or relative.lower().endswith(EXTENSIONS):
            inputs.append(_image(folder, relative, captions.pop(relative, None)))
    inputs += [Input(name, problem=f"{METADATA} names it, but there is no such file") for name in captions]
    if all(item.path is None for item in inputs):
        raise DataError(
            f"--images: {folder} holds no image with a caption, expected {', '.join(EXTENSIONS)} files, each with a "
            f".txt file of the same name or a line in {METADATA}."
            + "".join(f" The first of {len(inputs)}: {item.name}: {item.problem}." for item in inputs[:1])
        )
    return inputs


def _walk(folder: Path) -> Iterator[tuple[str, bool]]:
    """(name relative to `folder`, whether it is a link to a folder), sorted within each folder."""
    for parent, folders, files in os.walk(folder):
        base = os.path.relpath(parent, folder)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if os.path.islink(os.path.join(parent, name)):
                yield os.path.normpath(os.path.join(base, name)), True
        for name in sorted(files):
            if not name.startswith("."):
                yield os.path.normpath(os.path.join(base, name)), False


def _image(folder: Path, relative: str, caption: str | None) -> Input:
    path = folder / relative
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise _UnusableError("not a plain file")
        caption = _caption(path.with_suffix(".txt")) if caption is None else caption
        return Input(relative, _one_line(caption), path, status.st_size)
    except OSError as error:
        return Input(relative, problem=f"cannot be read ({error.strerror})")
    except _UnusableError as problem:
        return Input(relative, problem=str(problem))


def _caption(path: Path) -> str:
    try:
        status = path.stat()
    except FileNotFoundError:
        raise _UnusableError(f"no caption: neither {path.name!r} nor a line in {METADATA}") from None
    if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever
        raise _UnusableError(f"its caption {path.name!r} is not a plain file")
    if status.st_size > MAX_CAPTION_BYTES:
        raise _UnusableError(f"its caption has {status.st_size} bytes, expected at most {MAX_CAPTION_BYTES}")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _UnusableError(f"its caption is not UTF-8 ({error.reason} at byte {error.start})") from None


def _one_line(caption: str) -> str:
    """The text with every run of white space as one blank. `_UnusableError` when nothing is left."""
    text = " ".join(caption.split())
    if not text:
        raise _UnusableError("its caption is empty")
    return text


def _read_metadata(path: Path, inputs: list[Input]) -> dict[str, str]:
    """{file_name: caption} of the usable lines of metadata.jsonl; the others go to `inputs` with their problem."""
    captions: dict[str, str] = {}
    if not path.is_file():
        return captions
    for number, line in _lines(path):
        try:
            name, caption = _metadata_line(line)
            if name in captions:
                raise _UnusableError(f"file_name {name!r} occurs twice")
            captions[name] = caption
        except _UnusableError as problem:
            inputs.append(Input(f"{METADATA}, line {number}", problem=str(problem)))
    return captions


def _metadata_line(line: bytes) -> tuple[str, str]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _UnusableError(f"not JSON ({error})") from None
    name = record.get("file_name") if isinstance(record, dict) else None
    if not isinstance(name, str):
        raise _UnusableError('expected an object with "file_name"')
    caption = next((record[key] for key in CAPTION_KEYS if key in record), None)
    if not isinstance(caption, str) or len(caption) > MAX_CAPTION_BYTES:
        raise _UnusableError(f"{name!r} has no caption: expected a text under {' or '.join(CAPTION_KEYS)}")
    return os.path.normpath(name), caption


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, content) of every line that is not blank; a byte-order mark is dropped. DataError when unreadable."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check the path and its permissions.") from error


# --- prompts ---------------------------------------------------------------------------------------------------------


def list_prompts(file: str | Path) -> list[Input]:
    """The prompts of a text file, one a line, blank lines passed over. DataError without any."""
    path, inputs = Path(file), []
    if path.exists() and not path.is_file():
        raise DataError(f"--prompts: {path} is not a plain file, expected a text file with one prompt a line.")
    for number, line in _lines(path):
        name = f"line {number}"
        try:
            if len(line) > MAX_CAPTION_BYTES:
                raise _UnusableError(f"{len(line)} bytes, expected at most {MAX_CAPTION_BYTES}")
            inputs.append(Input(name, _one_line(line.decode("utf-8"))))
        except UnicodeDecodeError as error:
            inputs.append(Input(name, problem=f"not UTF-8 ({error.reason} at byte {error.start})"))
        except _UnusableError as problem:
            inputs.append(Input(name, problem=str(problem)))
    if all(item.problem is not None for item in inputs):
        raise DataError(f"--prompts: {path} holds no prompt, expected one a line, as UTF-8.")
    return inputs


# --- decoding --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Square:
    """An image brought to its training size."""

    pixels: NDArray[np.uint8]
    """(R, R, 3)."""
    original_size: tuple[int, int]
    """(height, width) in the file, upright."""
    crop_top_left: tuple[int, int]
    """Where the square lay in the resized image."""


def read_square(path: Path, resolution: int) -> Square:
    """An image, upright, its shorter side resized to R = `resolution` (Lanczos), its middle cut out.

    Transparent parts become white. ValueError says why the image cannot be used.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if not 0 < width * height <= MAX_PIXELS:
                raise ValueError(f"an image of {width} x {height} pixels, expected 1 to {MAX_PIXELS} pixels")
            upright = _rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError as error:
        raise ValueError(f"a too large image ({error})") from None
    except ValueError as error:
        raise ValueError(str(error) or "an image that does not decode") from None
    except OSError as error:
        raise ValueError(f"an image that does not decode ({error.strerror or error})") from None
    except Exception as error:  # Pillow's parsers raise whatever they met
        raise ValueError(f"an image that does not decode ({type(error).__name__}: {error})") from None
    width, height = upright.size
    scale = resolution / min(width, height)
    size = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"an image of {width} x {height} pixels: too long for its width")
    left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    resized = upright.resize(size, Image.Resampling.LANCZOS).crop((left, top, left + resolution, top + resolution))
    return Square(np.asarray(resized), (height, width), (top, left))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # converting would clip
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"an image of mode {image.mode}, expected 8 or 16 bits a channel")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
