"""The safetensors header, read strictly and without numpy.

The reference reader accepts duplicate keys and knows no checksum; this one refuses every header
whose declared bytes are not exactly the file's bytes, before anything is allocated from it.
Layout (safetensors format): 8 bytes little-endian header length, JSON header, tensor bytes.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlx.errors import CorruptCheckpoint

__all__ = ["DTYPE_BYTES", "Header", "TensorInfo", "read_header"]

DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Bytes of one element, by safetensors dtype name."""

_MAX_HEADER = 100 * 2**20  # the format's own limit
_MAX_RANK = 16


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: `begin` and `end` are absolute byte offsets into the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return self.end - self.begin

    @property
    def count(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A parsed header: tensors by name in file order of their names, free-form metadata, start of data."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int


def read_header(path: Path) -> Header:
    """Parse and check the header of one safetensors file.

    Every tensor's declared size must equal its dtype times its shape, and together they must
    cover the data section exactly: no gap, no overlap, nothing after the end.

    Raises:
        CorruptCheckpoint: anything in the header contradicts itself or the file's length.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise CorruptCheckpoint(
                f"{path}: not a safetensors file ({size} bytes, header length missing)"
            )
        length = int.from_bytes(prefix, "little")
        if length > min(_MAX_HEADER, size - 8):
            raise CorruptCheckpoint(
                f"{path}: the header claims {length} bytes, the file has {size}; it is truncated or not safetensors"
            )
        text = file.read(length)
    entries = _parse(path, text)
    metadata = _metadata(path, entries.pop("__metadata__", {}))
    start = 8 + length
    tensors = {name: _tensor(path, name, entry, start) for name, entry in sorted(entries.items())}
    _check_cover(path, tensors, start, size)
    return Header(tensors, metadata, start)


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [key for key, _ in pairs]
            double = next(key for key in names if names.count(key) > 1)
            raise CorruptCheckpoint(f"{path}: the header names {double!r} twice")
        return result

    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # bytes, syntax, an endless integer; depth
        raise CorruptCheckpoint(
            f"{path}: the safetensors header is not valid JSON ({error})"
        ) from error
    if not isinstance(parsed, dict):
        raise CorruptCheckpoint(f"{path}: the safetensors header is not an object")
    return parsed


def _metadata(path: Path, entry: object) -> dict[str, str]:
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise CorruptCheckpoint(f"{path}: __metadata__ must map names to strings")
    return dict(entry)


def _tensor(path: Path, name: str, entry: object, start: int) -> TensorInfo:
    def refuse(what: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(f"{path}: tensor {name!r}: {what}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise refuse("the entry must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise refuse(f"unknown dtype {dtype!r}")
    if not _is_naturals(shape) or len(shape) > _MAX_RANK:
        raise refuse(f"bad shape {shape!r}")
    if not _is_naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(f"bad data_offsets {offsets!r}")
    if math.prod(shape) * DTYPE_BYTES[dtype] != offsets[1] - offsets[0]:
        raise refuse(f"{dtype}{shape} does not fill its {offsets[1] - offsets[0]} bytes")
    return TensorInfo(name, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _is_naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_cover(path: Path, tensors: Mapping[str, TensorInfo], start: int, size: int) -> None:
    position = start
    for info in sorted(tensors.values(), key=lambda item: (item.begin, item.end)):
        if info.begin != position:
            raise CorruptCheckpoint(
                f"{path}: tensor {info.name!r} leaves a gap or overlaps its neighbour"
            )
        position = info.end
    if position != size:
        raise CorruptCheckpoint(f"{path}: {size} bytes long, but its tensors end at {position}")
