"""Digests identify bytes; the fingerprint identifies weights, however they are cut into files.

fingerprint(tensors) = SHA-256 over the sorted lines `name dtype shape sha256(data)`. It changes with
any bit of any tensor, name, shape or dtype, and with nothing else: not sharding, order or file names.

A large weight file can have a digest made of the same hashes, those of its tensors: one pass over the
bytes then gives both, on all cores, and a step that keeps a tensor keeps its hash.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qlx.checkpoint.known import Stamp, known_hashes, remember_hashes
from qlx.errors import CorruptCheckpoint
from qlx.weights import TensorInfo, WeightSet, open_weights, read_header

__all__ = [
    "bytes_digest",
    "file_sha256",
    "fingerprint",
    "fingerprint_directory",
    "fingerprint_line",
    "fingerprint_of_lines",
    "fingerprint_weights",
    "tensors_digest",
    "tensors_sha256",
]

_CHUNK = 4 * 2**20
_PIECE = 2**20  # stays in the processor's cache while it is hashed


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


def tensors_sha256(path: Path) -> str:
    """`tensors_digest` of a safetensors file; its tensors are hashed on all cores.

    Raises:
        CorruptCheckpoint: the header does not describe exactly the file's bytes.
    """
    header = read_header(path)
    with open(path, "rb") as file:
        start = file.read(header.data_start)
    return tensors_digest(
        start, header.tensors, _hashes(dict.fromkeys(header.tensors.values(), path))
    )


def tensors_digest(
    start: bytes, tensors: Mapping[str, TensorInfo], hashes: Mapping[str, str]
) -> str:
    """SHA-256 of a weight file's bytes before its data and the SHA-256 of each tensor, in file order.

    `hashes` are hex by tensor name. The strict reading of the header leaves no other bytes.
    """
    digest = hashlib.sha256(start)
    for info in sorted(tensors.values(), key=lambda info: (info.begin, info.end, info.name)):
        digest.update(bytes.fromhex(hashes[info.name]))
    return digest.hexdigest()


def _hashes(places: Mapping[TensorInfo, Path]) -> dict[str, str]:
    """Hex SHA-256 of each tensor's data by name, the largest first, on all cores."""
    order = sorted(places, key=lambda info: -info.nbytes)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        found = pool.map(lambda info: _tensor_sha256(places[info], info), order)
        return {info.name: digest for info, digest in zip(order, found, strict=True)}


def _tensor_sha256(path: Path, info: TensorInfo) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(_PIECE, info.nbytes)))
    with open(path, "rb", buffering=0) as file:
        file.seek(info.begin)
        rest = info.nbytes
        while rest:
            count = file.readinto(buffer[: min(rest, _PIECE)])
            if not count:
                raise CorruptCheckpoint(f"{path}: ended inside tensor {info.name!r}")
            digest.update(buffer[:count])
            rest -= count
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
    """Fingerprint of an opened weight set; files known from before are not read again."""
    hashes: dict[str, str] = {}
    for path, header in weights.headers.items():
        hashes |= _file_hashes(path, header.tensors)
    return fingerprint_of_lines(
        fingerprint_line(info.name, info.dtype, info.shape, hashes[info.name])
        for info in weights.values()
    )


def _file_hashes(path: Path, tensors: Mapping[str, TensorInfo]) -> Mapping[str, str]:
    """Hex SHA-256 of each tensor of a weight file."""
    stamp = Stamp.of(path)
    known = known_hashes(path, tensors)
    if not known:
        known = _hashes(dict.fromkeys(tensors.values(), path))
        remember_hashes(path, stamp, known)
    return known


def fingerprint_directory(directory: Path) -> str:
    """Fingerprint of the weights in a model or adapter directory."""
    return fingerprint_weights(open_weights(directory))
