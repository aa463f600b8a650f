"""Writing weight files whose tensors become known one after the other.

The sizes of packed tensors are known only once they are packed, so a file is gathered in memory up
to `SHARD_BYTES` and then written: memory stays bounded however large the model is.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from qlx.checkpoint import canonical_json
from qlx.weights import INDEX_FILE, SINGLE_FILE, write_tensors

__all__ = ["SHARD_BYTES", "ShardWriter"]

SHARD_BYTES = 512 * 2**20
"""Most bytes of tensors that are held in memory, and so in one file (unless one tensor is larger)."""


class ShardWriter:
    """Collects tensors into `model.safetensors`, or into numbered shards with an index.

    `add` tensors in any order, then `close` once. The files depend only on the order and content
    of what was added.
    """

    def __init__(self, directory: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._directory = directory
        self._limit = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Take tensors that belong together; they end up in one file."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._pending and self._pending_bytes + size > self._limit:
            self._flush()
        self._pending.update(tensors)
        self._pending_bytes += size
        self._total += size

    def _flush(self) -> None:
        write_tensors(self._part(len(self._shards)), self._pending)
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
