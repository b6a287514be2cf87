"""The header of a safetensors file, checked without trusting any of it: what tensors there are, and where.

Written here rather than left to the safetensors package because a member of a shard is read by (offset, size) without
its file, and because a header of a damaged or hostile file must cost neither memory nor time.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

MAX_HEADER_BYTES = 1 << 16
MAX_TENSORS = 64
MAX_DIMENSIONS = 8
MAX_TENSOR_BYTES = 1 << 30
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "U8": torch.uint8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: bytes [begin, end) behind the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.shape}"


def header_bytes(start: bytes, size: int) -> int:
    """Bytes of length field and header, from a file's first 8 bytes and its size. ValueError for an impossible one."""
    if len(start) < 8:
        raise ValueError(f"{size} bytes are too few for a safetensors file")
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER_BYTES or 8 + length > size:
        raise ValueError(
            f"not a safetensors file: its header claims {length} bytes, expected at most "
            f"{max(0, min(MAX_HEADER_BYTES, size - 8))}"
        )
    return 8 + length


def parse_header(header: bytes, size: int) -> dict[str, TensorInfo]:
    """The tensors of a file of `size` bytes that begins with `header` (8 bytes of length, then JSON).

    ValueError says what is not as expected: the JSON, a name twice, an unknown dtype, an absurd shape, tensors that
    overlap, leave gaps or do not end where the file ends.
    """
    try:
        entries = json.loads(header[8:].decode("utf-8"), object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"a safetensors header that is no JSON ({error})") from None
    if not isinstance(entries, dict):
        raise ValueError("a safetensors header that is no JSON object")
    entries.pop("__metadata__", None)
    if not 0 < len(entries) <= MAX_TENSORS:
        raise ValueError(f"{len(entries)} tensors, expected 1 to {MAX_TENSORS}")
    tensors = {name: _tensor(name, entry) for name, entry in entries.items()}
    position = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            raise ValueError(f"tensor {name!r} begins at byte {info.begin}, expected {position}")
        position = info.end
    if len(header) + position != size:
        raise ValueError(f"its tensors take {position} bytes, the file has {size - len(header)}")
    return tensors


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_TENSOR_BYTES


def _tensor(name: str, entry: Any) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"tensor {name!r} is of dtype {str(dtype)[:40]!r}, expected one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_count, shape)):
        raise ValueError(f"tensor {name!r} has the shape {str(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise ValueError(f"tensor {name!r} has the data_offsets {str(offsets)[:80]}")
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if expected > MAX_TENSOR_BYTES or offsets[1] - offsets[0] != expected:
        raise ValueError(f"tensor {name!r} takes {offsets[1] - offsets[0]} bytes, its shape {shape} takes {expected}")
    return TensorInfo(DTYPES[dtype], tuple(shape), *offsets)


def is_finite(content: bytes | memoryview, dtype: torch.dtype) -> bool:
    """Whether a tensor's bytes hold no NaN and no infinity."""
    if dtype == torch.bfloat16:  # numpy has no such type: its exponent is all ones where it is not finite
        return bool(((np.frombuffer(content, np.uint16) & 0x7F80) != 0x7F80).all())
    kinds = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}
    return dtype not in kinds or bool(np.isfinite(np.frombuffer(content, kinds[dtype])).all())
