"""Writing weight files whose tensors become known one after the other.

The sizes of packed tensors are known only once they are packed, and a file begins with all of them. So
tensors wait in a file without a header, up to `SHARD_BYTES`, and are then copied behind one: no more than
one tensor is in memory, however large the model is.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from qlx.checkpoint import canonical_json
from qlx.weights import INDEX_FILE, SINGLE_FILE, torch_dtype_name, write_raw

__all__ = ["SHARD_BYTES", "ShardWriter"]

SHARD_BYTES = 512 * 2**20
"""Most bytes of tensors in one file (unless those that belong together are more)."""

_WAITING = ".waiting"
_PIECE = 2**20  # bytes that are copied at once
_Entry = tuple[str, tuple[int, ...], Callable[[], Iterator[bytes]]]


class ShardWriter:
    """Collects tensors into `model.safetensors`, or into numbered shards with an index.

    `add` tensors in any order, then `close` once. The files depend only on the order and content
    of what was added.
    """

    def __init__(self, directory: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._directory = directory
        self._limit = shard_bytes
        self._pending: dict[str, _Entry] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors that belong together; they end up in one file."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._pending and self._pending_bytes + size > self._limit:
            self._flush()
        with open(self._waiting, "ab") as file:
            for name, tensor in tensors.items():
                place = (self._pending_bytes, tensor.nbytes)
                file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
                kind, shape = torch_dtype_name(tensor.dtype), tuple(tensor.shape)
                self._pending[name] = (kind, shape, self._pieces(*place))
                self._pending_bytes += tensor.nbytes
        self._total += size

    @property
    def _waiting(self) -> Path:
        return self._directory / _WAITING

    def _pieces(self, begin: int, size: int) -> Callable[[], Iterator[bytes]]:
        """Reads a tensor that waits."""

        def read() -> Iterator[bytes]:
            with open(self._waiting, "rb") as file:
                file.seek(begin)
                for done in range(0, size, _PIECE):
                    yield file.read(min(_PIECE, size - done))

        return read

    def _flush(self) -> None:
        write_raw(self._part(len(self._shards)), self._pending, {"format": "pt"})
        self._waiting.unlink(missing_ok=True)
        self._shards.append(sorted(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _part(self, index: int) -> Path:
        return self._directory / f"part-{index:05d}.safetensors"

    def close(self) -> None:
        """Write what is pending and give the files their final names."""
        if self._pending or not self._shards:
            self._flush()
        count = len(self._shards)
        if count == 1:
            self._part(0).rename(self._directory / SINGLE_FILE)
            return
        weight_map = {}
        for index, names in enumerate(self._shards):
            final = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            self._part(index).rename(self._directory / final)
            weight_map.update(dict.fromkeys(names, final))
        listing = {
            "metadata": {"total_size": self._total},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (self._directory / INDEX_FILE).write_bytes(canonical_json(listing))
