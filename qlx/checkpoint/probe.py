"""The probe: a few real inputs and the outputs of the model that training saw, kept for replay.

File layout (`probe.safetensors`): `input.<name>` for each model input, `output.<name>` for each set of
logits, `labels` if known, and the task in the metadata.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlx.errors import CorruptCheckpoint
from qlx.weights import read_arrays, read_header, write_arrays

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

__all__ = ["PROBE_FILE", "Probe", "read_probe", "write_probe"]

PROBE_FILE = "probe.safetensors"
_OUTPUTS = ("reference", "base", "native", "own")


@dataclass(frozen=True)
class Probe:
    """Inputs and reference outputs, all fp32 logits of shape [n, classes], [n, T, vocabulary] or [n, K, h, w].

    Attributes:
        task: the task the inputs belong to.
        inputs: `pixel_values` f32 [n, 3 · frames, H, W], or `input_ids` and `attention_mask` i64 [n, T].
        reference: the unmerged model as trained, computed in fp32.
        base: the same with the adapter disabled; what "no effect" would look like.
        native: the unmerged model in training's own compute dtype; its distance to `reference` is
            the noise floor.
        own: the outputs of the checkpoint this file lies in, where that one is lossy by nature.
        labels: i64 [n] or [n, T], -100 where there is nothing to predict; of heatmaps f32 [n, K, 5], see
            `qlx.inputs.Batch`.
    """

    task: str
    inputs: "Mapping[str, Array]"
    reference: "Array"
    base: "Array | None" = None
    native: "Array | None" = None
    own: "Array | None" = None
    labels: "Array | None" = None

    @property
    def count(self) -> int:
        """Number of inputs."""
        return int(self.reference.shape[0])

    @property
    def mask(self) -> "Array | None":
        """Boolean [n, T] of real (not padding) positions, or None for tasks without padding."""
        mask = self.inputs.get("attention_mask")
        return None if mask is None else mask.astype(bool)


def write_probe(path: Path, probe: Probe) -> None:
    """Write a probe; the same probe gives the same bytes."""
    arrays = {f"input.{name}": array for name, array in probe.inputs.items()}
    for name in _OUTPUTS:
        array = getattr(probe, name)
        if array is not None:
            arrays[f"output.{name}"] = array
    if probe.labels is not None:
        arrays["labels"] = probe.labels
    write_arrays(path, arrays, {"task": probe.task})


def read_probe(path: Path) -> Probe:
    """Read a probe file; `path` may be the file or the checkpoint directory it lies in.

    Raises:
        CorruptCheckpoint: it has no reference outputs or no inputs, or their lengths differ.
    """
    path = Path(path)
    if path.is_dir():
        path = path / PROBE_FILE
    if not path.is_file():
        raise CorruptCheckpoint(f"{path}: there is no probe file")
    arrays = read_arrays(path)
    inputs = {
        name.removeprefix("input."): array
        for name, array in arrays.items()
        if name.startswith("input.")
    }
    outputs = {name: arrays.get(f"output.{name}") for name in _OUTPUTS}
    reference = outputs.pop("reference")
    if reference is None or not inputs:
        raise CorruptCheckpoint(f"{path}: a probe needs inputs and output.reference")
    lengths = {array.shape[0] for name, array in arrays.items()}
    if len(lengths) != 1:
        raise CorruptCheckpoint(
            f"{path}: inputs and outputs are of different lengths {sorted(lengths)}"
        )
    task = read_header(path).metadata.get("task", "")
    return Probe(task, inputs, reference, labels=arrays.get("labels"), **outputs)
