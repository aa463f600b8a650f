"""The weight files of a model directory as one mapping, whether they are one file or many shards."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qlx.errors import CorruptCheckpoint, InputRefused
from qlx.weights.header import Header, TensorInfo, read_header

__all__ = ["ADAPTER_FILE", "INDEX_FILE", "SINGLE_FILE", "WeightSet", "open_weights"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_model.safetensors"

_CHUNK = 4 * 2**20
_MAX_INDEX = 64 * 2**20


@dataclass(frozen=True)
class WeightSet(Mapping[str, TensorInfo]):
    """All tensors of a directory: name to TensorInfo, plus the file each one lives in.

    `files` holds the weight files in a fixed order; `headers` their parsed headers.
    """

    directory: Path
    files: tuple[Path, ...]
    headers: Mapping[Path, Header]
    places: Mapping[str, Path]

    def __getitem__(self, name: str) -> TensorInfo:
        return self.headers[self.places[name]].tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.places))

    def __len__(self) -> int:
        return len(self.places)

    def path_of(self, name: str) -> Path:
        """The file that holds tensor `name`."""
        return self.places[name]

    def read_bytes(self, name: str) -> bytes:
        """The raw little-endian bytes of tensor `name`."""
        return b"".join(self.chunks(name))

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of tensor `name` in pieces of at most 4 MiB, so that hashing needs no more memory."""
        info = self[name]
        with open(self.places[name], "rb") as file:
            file.seek(info.begin)
            remaining = info.nbytes
            while remaining:
                piece = file.read(min(_CHUNK, remaining))
                if not piece:
                    raise CorruptCheckpoint(f"{self.places[name]}: ended inside tensor {name!r}")
                remaining -= len(piece)
                yield piece


def open_weights(directory: Path) -> WeightSet:
    """Open `model.safetensors`, its shards, or an adapter's file in `directory`.

    Raises:
        InputRefused: there is no safetensors weight file (pickled weights are never read).
        CorruptCheckpoint: the index and the shards contradict each other.
    """
    directory = Path(directory)
    for name in (SINGLE_FILE, ADAPTER_FILE):
        if (directory / name).is_file():
            return _gather(directory, [directory / name], None)
    if (directory / INDEX_FILE).is_file():
        mapping = _read_index(directory / INDEX_FILE)
        paths = [directory / shard for shard in sorted(set(mapping.values()))]
        return _gather(directory, paths, mapping)
    raise InputRefused(
        f"{directory}: no {SINGLE_FILE}, {INDEX_FILE} or {ADAPTER_FILE}; "
        "qlx reads safetensors only (convert pickled weights with a tool you trust)"
    )


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    names = dict(pairs)
    if len(names) < len(pairs):
        raise ValueError("a name appears twice")
    return names


def _read_index(path: Path) -> dict[str, str]:
    if path.stat().st_size > _MAX_INDEX:
        raise CorruptCheckpoint(f"{path}: larger than {_MAX_INDEX // 2**20} MiB, refused")
    try:
        mapping = json.loads(path.read_bytes(), object_pairs_hook=_unique)["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path}: not a shard index ({error})") from error
    if not isinstance(mapping, dict) or not all(
        isinstance(shard, str)
        and shard.endswith(".safetensors")
        and "/" not in shard
        and "\\" not in shard
        for shard in mapping.values()
    ):
        raise CorruptCheckpoint(
            f"{path}: weight_map must name .safetensors files of the same directory"
        )
    return mapping


def _gather(directory: Path, paths: list[Path], index: dict[str, str] | None) -> WeightSet:
    headers: dict[Path, Header] = {}
    places: dict[str, Path] = {}
    for path in paths:
        if not path.is_file():
            raise CorruptCheckpoint(f"{path}: the shard index names this file, but it is missing")
        headers[path] = read_header(path)
        for name in headers[path].tensors:
            if name in places:
                raise CorruptCheckpoint(
                    f"{directory}: tensor {name!r} is in {places[name].name} and in {path.name}"
                )
            places[name] = path
    if index is not None:
        expected = {name: directory / shard for name, shard in index.items()}
        wrong = sorted(set(expected.items()) ^ set(places.items()))
        if wrong:
            raise CorruptCheckpoint(
                f"{directory / INDEX_FILE}: does not describe the shards (first: {wrong[0][0]!r})"
            )
    return WeightSet(directory, tuple(paths), headers, places)
