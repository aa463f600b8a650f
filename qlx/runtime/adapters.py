"""Adapters beside a graph: low-rank updates that a run is given as inputs, chosen by name.

For each adapted module the graph has inputs with defaults, `<module>.lora_A` [rows, in, rank] and
`<module>.lora_B` [rows, rank, out]: the module's output gets (x · A) · B added. Where an adapter needs it,
`<module>.lora_scale` and `<module>.lora_bias` [rows, 1, out] rescale the output by 1 + scale (DoRA) and add to
it. The defaults have rank 0 or are zero, so that without an adapter the graph is its base to the bit. `rows` is
1, or the batch's size where its rows have adapters of their own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from qlx.checkpoint import Checkpoint, file_sha256
from qlx.errors import CorruptCheckpoint, UsageError

__all__ = ["ADAPTER_PARTS", "ADAPTER_SUFFIX", "AdapterChoice", "Adapters", "ChosenAdapter"]

Array = NDArray[Any]
Values = dict[str, ort.OrtValue]

AdapterChoice = str | Sequence[str | None] | None
"""An adapter's name, None for the base alone, or one of these for each row of a batch."""

ADAPTER_SUFFIX = ".onnx_adapter"
"""Ending of an adapter's file, after its name."""

ADAPTER_PARTS = (".lora_A", ".lora_B", ".lora_scale", ".lora_bias")
"""Endings of the names of adapter inputs."""


@dataclass(frozen=True)
class ChosenAdapter:
    """Inputs to add to a run: those of one adapter, or stacked ones for a batch of `rows` rows."""

    inputs: Mapping[str, ort.OrtValue]
    rows: int | None = None

    def for_batch(self, rows: int) -> Mapping[str, ort.OrtValue]:
        """The inputs for a batch.

        Raises:
            UsageError: the batch has another number of rows than adapters were named for.
        """
        if self.rows is not None and self.rows != rows:
            raise UsageError(f"adapters are named for {self.rows} rows, the batch has {rows}")
        return self.inputs


class Adapters:
    """The adapters of an opened ONNX checkpoint; each is read when it is first asked for, and kept.

    Args:
        checkpoint: verified, of kind `onnx`.
        session: over its graph.
    """

    def __init__(self, checkpoint: Checkpoint, session: ort.InferenceSession) -> None:
        self._checkpoint = checkpoint
        self._shapes = {
            item.name: item.shape
            for item in session.get_overridable_initializers()
            if item.name.endswith(ADAPTER_PARTS)
        }
        self._read: dict[str, Values] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters there are."""
        return tuple(sorted(self._checkpoint.manifest.adapters))

    def choose(self, choice: "AdapterChoice | ChosenAdapter") -> ChosenAdapter:
        """The inputs that make a run use an adapter, or several of them in one batch.

        Rows whose adapter has a lower rank than others', or does not touch a module, are filled with zeros.

        Raises:
            UsageError: there is no adapter of that name, or a list names none.
            CorruptCheckpoint: an adapter's file is damaged or does not fit the graph.
        """
        if isinstance(choice, ChosenAdapter):
            return choice
        if choice is None or isinstance(choice, str):
            return ChosenAdapter({} if choice is None else self._values(choice))
        if not choice:
            raise UsageError("name an adapter, or None, for at least one row")
        if len(set(choice)) == 1:
            return ChosenAdapter(self.choose(choice[0]).inputs, len(choice))
        rows = [{} if name is None else self._values(name) for name in choice]
        return ChosenAdapter(_stacked(rows), len(choice))

    def _values(self, name: str) -> Values:
        if name not in self._read:
            self._read[name] = self._load(name)
        return self._read[name]

    def _load(self, name: str) -> Values:
        self._checkpoint.with_adapter(name)  # refuses an unknown name
        manifest = self._checkpoint.manifest
        file = manifest.adapters[name].file
        path = self._checkpoint.path / file
        if file_sha256(path) != manifest.files[file].sha256:
            raise CorruptCheckpoint(f"{path}: changed since the model was opened; open it again")
        try:
            values: Values = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
        except RuntimeError as error:
            raise CorruptCheckpoint(f"{path}: onnxruntime cannot read it ({error})") from error
        self._check(path, values)
        return values

    def _check(self, path: Path, values: Values) -> None:
        """Every tensor has its input, every A its B of the same rank."""
        if not values:
            raise CorruptCheckpoint(f"{path}: holds no tensor; export the adapters again")
        for name, value in values.items():
            wanted, found = self._shapes.get(name), value.shape()
            if not _fits(wanted, found) or value.data_type() != "tensor(float)":
                raise CorruptCheckpoint(
                    f"{path}: tensor {name!r} {found} is not what the graph takes "
                    f"({wanted or 'no such input'}); export the adapters again"
                )
        for module in sorted({name.rpartition(".")[0] for name in values}):
            a, b = (values.get(f"{module}.lora_{part}") for part in "AB")
            ranks = {a.shape()[2] if a else 0, b.shape()[1] if b else 0}
            if len(ranks) > 1:
                raise CorruptCheckpoint(
                    f"{path}: A and B of {module!r} are not of one rank; export the adapters again"
                )


def _fits(wanted: Sequence[int | str] | None, found: Sequence[int]) -> bool:
    """Whether a tensor for one row has the shape of an input [rows, ...], where a name is any size."""
    return (
        wanted is not None
        and len(found) == len(wanted)
        and found[0] == 1
        and all(
            isinstance(size, str) or size == there
            for size, there in zip(wanted, found, strict=True)
        )
    )


def _stacked(rows: Sequence[Values]) -> Values:
    """One input for each that any row has, [rows, ...], filled up with zeros."""
    arrays = [{name: value.numpy() for name, value in row.items()} for row in rows]
    names = sorted({name for row in arrays for name in row})
    return {name: ort.OrtValue.ortvalue_from_numpy(_stack(name, arrays)) for name in names}


def _stack(name: str, rows: Sequence[Mapping[str, Array]]) -> Array:
    shapes = [row[name].shape for row in rows if name in row]
    stacked = np.zeros((len(rows), *np.max(shapes, axis=0)[1:]), np.float32)
    for at, row in enumerate(rows):
        if name in row:
            _, height, width = row[name].shape
            stacked[at, :height, :width] = row[name][0]
    return stacked
