"""A base whose files hold codes, seen as the plain weights it stands for.

The layouts of `qlx.quant.STORED_BACKENDS` keep a weight in several tensors. Here each is one tensor
under its plain name, with the dtype of its scales (or, of bitsandbytes', the one it had before), and
its parts are out of sight; so a merge plans and streams such a base like any other, and writes plain
weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from qlx.models import stored_codes
from qlx.quant import PackedTensor, StoredQuantization
from qlx.weights import TensorInfo, WeightSet, open_weights, read_tensors

__all__ = ["CodedWeights", "open_base"]


@dataclass(frozen=True)
class CodedWeights(WeightSet):
    """The tensors of a directory, each coded weight as one of the dtype and shape it has unpacked."""

    stored: StoredQuantization

    @cached_property
    def coded(self) -> dict[str, TensorInfo]:
        """The weights held as codes, as if they were stored unpacked; offsets mean nothing."""
        files = {name: self.headers[path].tensors.get(name) for name, path in self.places.items()}
        infos = {name: info for name, info in files.items() if info is not None}
        names = self.stored.weight_names(infos)
        states = read_tensors(self.directory, self.stored.state_names(infos))
        return {name: self.stored.plain_info(infos, name, states) for name in names}

    @cached_property
    def _hidden(self) -> frozenset[str]:
        parts = {part for name in self.coded for part in self.stored.part_names(name)}
        return frozenset(parts - self.coded.keys())

    def __getitem__(self, name: str) -> TensorInfo:
        if name in self._hidden:
            raise KeyError(name)
        return self.coded[name] if name in self.coded else super().__getitem__(name)

    def __iter__(self) -> Iterator[str]:
        return (name for name in super().__iter__() if name not in self._hidden)

    def __len__(self) -> int:
        return len(self.places) - len(self._hidden & self.places.keys())

    def packed(self, name: str) -> PackedTensor:
        """The codes of weight `name`.

        Raises:
            CorruptCheckpoint: its parts do not fit each other.
        """
        parts = [part for part in self.stored.part_names(name) if part in self.places]
        return self.stored.read(read_tensors(self.directory, parts), name)


def open_base(directory: Path) -> WeightSet:
    """The weights of a base by their plain names, whether its files hold them or codes for them.

    Raises:
        Unsupported: codes of a kind that cannot be read.
    """
    weights = open_weights(directory)
    stored = stored_codes(directory)
    if stored is None:
        return weights
    firsts = {name: stored.part_names(name)[0] for name in stored.weight_names(weights)}
    places = {**weights.places, **{name: weights.places[first] for name, first in firsts.items()}}
    return CodedWeights(weights.directory, weights.files, weights.headers, places, stored)
