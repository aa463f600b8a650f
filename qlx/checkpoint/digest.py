"""Digests identify bytes; the fingerprint identifies weights, however they are cut into files.

fingerprint(tensors) = SHA-256 over the sorted lines `name dtype shape sha256(data)`. It changes with
any bit of any tensor, name, shape or dtype, and with nothing else: not sharding, order or file names.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from qlx.weights import WeightSet, open_weights

__all__ = [
    "bytes_digest",
    "file_sha256",
    "fingerprint",
    "fingerprint_directory",
    "fingerprint_line",
    "fingerprint_of_lines",
    "fingerprint_weights",
]

_CHUNK = 4 * 2**20


def bytes_digest(data: bytes) -> str:
    """`sha256:<hex>` of some bytes."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in 4 MiB pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def fingerprint(entries: Iterable[tuple[str, str, tuple[int, ...], Iterable[bytes]]]) -> str:
    """Fingerprint of tensors given as (name, safetensors dtype, shape, pieces of little-endian data)."""
    lines = []
    for name, dtype, shape, pieces in entries:
        data = hashlib.sha256()
        for piece in pieces:
            data.update(piece)
        lines.append(fingerprint_line(name, dtype, shape, data.hexdigest()))
    return fingerprint_of_lines(lines)


def fingerprint_line(name: str, dtype: str, shape: tuple[int, ...], sha256: str) -> str:
    """What one tensor adds to a fingerprint; `sha256` is the hex digest of its data."""
    return f"{name!r} {dtype} {list(shape)} {sha256}\n"


def fingerprint_of_lines(lines: Iterable[str]) -> str:
    """The fingerprint of tensors of which `fingerprint_line` gave these lines, in any order."""
    return bytes_digest("".join(sorted(lines)).encode("utf-8"))


def fingerprint_weights(weights: WeightSet) -> str:
    """Fingerprint of an opened weight set."""
    return fingerprint(
        (info.name, info.dtype, info.shape, weights.chunks(info.name)) for info in weights.values()
    )


def fingerprint_directory(directory: Path) -> str:
    """Fingerprint of the weights in a model or adapter directory."""
    return fingerprint_weights(open_weights(directory))
