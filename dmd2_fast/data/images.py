"""8-bit gray and RGB images as PNG: header, integrity, decoding, and the way from pixels to [-1, 1].

Decoders differ in what they let pass: Pillow ignores a wrong checksum and a missing end, DALI refuses both; DALI turns
images by their EXIF, Pillow does not. The checks here come before either, so that both read the same or nothing.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

SIGNATURE = b"\x89PNG\r\n\x1a\n"
HEADER_BYTES = 33  # signature, then the IHDR chunk: length, name, 13 bytes, checksum
COLOR_TYPES = {0: 1, 2: 3}  # PNG's gray and RGB to the number of channels
COLOR_NAMES = {3: "a palette", 4: "gray with alpha", 6: "RGB with alpha"}
MAX_PIXELS = 1 << 26  # a header may claim any size, and decoders allocate what it claims

ImageShape = tuple[int, int, int]


def png_shape(encoded: bytes) -> ImageShape:
    """(C, H, W) from a PNG's first 33 bytes. ValueError says what is not as expected."""
    if len(encoded) < HEADER_BYTES or not encoded.startswith(SIGNATURE) or encoded[12:16] != b"IHDR":
        raise ValueError("not a PNG image")
    if zlib.crc32(encoded[12:29]) != struct.unpack(">I", encoded[29:33])[0]:
        raise ValueError("a PNG header with a wrong checksum")
    width, height, depth, color = struct.unpack(">IIBB", encoded[16:26])
    if depth != 8 or color not in COLOR_TYPES:
        found = COLOR_NAMES.get(color, f"{depth} bits a channel")
        raise ValueError(f"a PNG image with {found}, expected 8-bit gray or RGB")
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"a PNG image of {width} x {height} pixels, expected 1 to {MAX_PIXELS} pixels")
    return COLOR_TYPES[color], height, width


def check_png(encoded: bytes) -> None:
    """Walk the chunks: every checksum right, nothing cut off, nothing behind the end. ValueError says what is wrong."""
    png_shape(encoded)
    position, end = len(SIGNATURE), len(encoded)
    name, packed = b"", []
    while name != b"IEND":
        if position + 12 > end:
            raise ValueError("a PNG image that is cut off")
        length = int.from_bytes(encoded[position : position + 4], "big")
        name = encoded[position + 4 : position + 8]
        last = position + 8 + length
        if last + 4 > end:
            raise ValueError("a PNG image that is cut off")
        if zlib.crc32(encoded[position + 4 : last]) != int.from_bytes(encoded[last : last + 4], "big"):
            raise ValueError(f"a PNG image whose chunk {name.decode('ascii', 'backslashreplace')} has a wrong checksum")
        if name == b"IHDR" and position != len(SIGNATURE):
            raise ValueError("a PNG image with two headers")
        if name == b"IDAT":
            packed.append(encoded[position + 8 : last])
        if name == b"tRNS":
            raise ValueError("a PNG image with a transparent colour, expected 8-bit gray or RGB")
        position = last + 4
    if position != end:
        raise ValueError(f"a PNG image with {end - position} bytes behind its end")
    _check_rows(encoded, b"".join(packed))


def _check_rows(encoded: bytes, packed: bytes) -> None:
    """Every row is there: Pillow fills missing ones with black. Interlaced images are left to the decoders."""
    channels, height, width = png_shape(encoded)
    if encoded[28] != 0:
        return
    expected, stream = height * (1 + width * channels), zlib.decompressobj()
    try:
        rows = stream.decompress(packed, expected + 1)
    except zlib.error as error:
        raise ValueError(f"a PNG image that does not decode ({error})") from error
    if len(rows) != expected:
        raise ValueError(f"a PNG image with {len(rows)} bytes of pixels, expected {expected}")


def decode_png(encoded: bytes) -> NDArray[np.uint8]:
    """(H, W, C) uint8. ValueError where the image does not decode completely."""
    check_png(encoded)
    channels, height, width = png_shape(encoded)
    try:
        with Image.open(io.BytesIO(encoded), formats=("PNG",)) as image:
            pixels = np.asarray(image)
    except Exception as error:  # Pillow's parsers of side chunks raise whatever they meet
        raise ValueError(f"a PNG image that does not decode ({error})") from error
    return pixels.reshape(height, width, channels)


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """PNG of (H, W) gray or (H, W, 3) RGB pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pixel_levels(device: torch.device | str = "cpu") -> Tensor:
    """(256,) f32: u / 127.5 - 1 for each pixel value u.

    Looked up rather than computed, because a GPU divides by multiplying with the rounded reciprocal: this way the
    images are the same bits on every device.
    """
    return (torch.arange(256, dtype=torch.float32) / 127.5 - 1.0).to(device)


def images_from_pixels(pixels: Tensor, levels: Tensor) -> Tensor:
    """(N, H, W, C) uint8 to (N, C, H, W) f32 in [-1, 1], contiguous."""
    channels_first = pixels.permute(0, 3, 1, 2)
    values = levels.index_select(0, channels_first.reshape(-1).to(torch.int32))
    return values.reshape(channels_first.shape)
