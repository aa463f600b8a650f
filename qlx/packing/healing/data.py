"""Calibration data: real inputs by which a packed model is healed, and some held out from that.

The inputs of a checkpoint's own probe, or the training part of a data set of the user's, prepared as in
the checkpoint's training. Labels play no part, because what is aimed at are the unmerged model's outputs. So
inputs can also be made up: a probe's rows are few, and others are mixed of them (images as in mixup,
arXiv 1710.09412, and moved a little; texts spliced).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qlx.checkpoint import Checkpoint, Task, read_probe
from qlx.errors import InputRefused, Mismatch
from qlx.inputs import Batch, ImagePreprocessor, eval_batches, image_files
from qlx.recipe import DataSection, load_recipe
from qlx.verification import recorded_data

__all__ = ["Calibration", "calibration_data"]

_MOST = 512  # rows that are used
_HELD_OUT = 4  # one row in so many
_ROWS = 16  # of a batch
_MIXES = 15  # rows that are made for each of a probe
_BETA = 0.4  # both parameters of the distribution of the first one's share in a mix of images
_MOVED = 16  # images are moved by one part in so many of their side at most
_LOGITS = 2**25  # values of a batch's outputs: 128 MiB in float32
_RECIPES = (".yaml", ".yml")
_TEXTS = (".jsonl", ".csv", ".txt")
_SOURCES: Mapping[Task, tuple[str, tuple[str, ...]]] = {
    "causal-lm": ("text", ("max_length", "answers")),
    "image-classification": ("images", ()),
    "heatmap": ("tracknet", ("frames", "sigma")),
}
"""By task: how a file or directory of data is read, and what is as it was in training."""

Row = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Calibration:
    """Batches of inputs to learn from and to hold out.

    `held_out_base` are the base's outputs for the held-out batches, where they are known: the probe's.
    `name` says what the data are (`probe`, or a file's name), `digest` is over their content. `counts` are
    rows to learn from and held out, `mixed` how many were made of the former beside them.
    """

    rows: tuple[dict[str, torch.Tensor], ...]
    held_out: tuple[dict[str, torch.Tensor], ...]
    held_out_base: tuple[NDArray[Any], ...] | None
    name: str
    counts: tuple[int, int]
    mixed: int
    digest: str


def calibration_data(
    checkpoint: Checkpoint, directory: Path, file: Path | None, seed: int, classes: int
) -> Calibration:
    """Inputs for a checkpoint from `file` (a recipe, texts, a directory of images) or from its probe.

    `directory` holds the preprocessing files; of `classes` outputs a position depends how many rows
    make a batch. A quarter of the rows, drawn by `seed`, is held out.

    Raises:
        InputRefused: there are fewer than two rows, or the file cannot be read.
        Mismatch: the data are for another task.
    """
    base: NDArray[Any] | None = None
    if file is None:
        rows, base = _probe_rows(checkpoint)
    elif unsorted := _unsorted_images(checkpoint, file):
        prepare = ImagePreprocessor.from_directory(directory)
        rows = [{"pixel_values": prepare([image])} for image in unsorted]
    else:
        rows = _data_rows(_section(checkpoint, file), checkpoint, directory)
    if len(rows) < 2:
        raise InputRefused(
            f"{file or checkpoint.path}: {len(rows)} row{'' if len(rows) == 1 else 's'} of calibration data; "
            "healing needs two at least, "
            "name more with --calibration"
        )
    order = np.random.default_rng(seed).permutation(len(rows))
    count = max(1, len(rows) // _HELD_OUT)
    size = _batch_size(rows, classes)
    learned, held = ([rows[at] for at in part] for part in (order[count:], order[:count]))
    made = _mixed(learned, np.random.default_rng(seed + 1)) if file is None else []
    bases = None if base is None else [base[part] for part in _cut(order[:count], size)]
    return Calibration(
        rows=tuple(_batches([*learned, *made], size)),
        held_out=tuple(_batches(held, size)),
        held_out_base=None if bases is None else tuple(bases),
        name="probe" if file is None else file.name,
        counts=(len(learned), len(held)),
        mixed=len(made),
        digest=_digest(rows),
    )


def _probe_rows(checkpoint: Checkpoint) -> tuple[list[Row], NDArray[Any] | None]:
    record = checkpoint.manifest.probe
    if record is None:
        raise InputRefused(
            f"{checkpoint.path}: carries no probe to heal by; name data with --calibration"
        )
    probe = read_probe(checkpoint.path / record.file)
    rows = [
        {name: values[at : at + 1] for name, values in probe.inputs.items()}
        for at in range(probe.count)
    ]
    return rows, probe.base


def _section(checkpoint: Checkpoint, file: Path) -> DataSection:
    """The data section of a recipe, or one for a file or directory of data itself."""
    if file.suffix.lower() in _RECIPES:
        return load_recipe(file).data
    source, fields = _SOURCES[checkpoint.manifest.task]
    if source != "text" and file.is_file() and file.suffix.lower() in _TEXTS:
        raise Mismatch(
            f"{file}: texts, and {checkpoint.path} is a checkpoint for {checkpoint.manifest.task}; "
            "name a directory of pictures, or a recipe"
        )
    known = {name: getattr(found, name) for name in fields} if (found := _known(checkpoint)) else {}
    return DataSection.model_validate({"source": source, "path": str(file)} | known)


def _unsorted_images(checkpoint: Checkpoint, directory: Path) -> list[Path]:
    """Images that lie in a directory without any of its own, evenly drawn if they are many."""
    if checkpoint.manifest.task != "image-classification" or not directory.is_dir():
        return []
    if any(item.is_dir() and not item.name.startswith(".") for item in directory.iterdir()):
        return []  # a class each; an image beside them is none of theirs
    found = image_files(directory)
    chosen = np.linspace(0, len(found) - 1, min(len(found), _MOST)).astype(int)
    return [found[at] for at in chosen]


def _known(checkpoint: Checkpoint) -> DataSection | None:
    """What training recorded of its own data, if it was qlx's."""
    try:
        return recorded_data(checkpoint)
    except InputRefused:
        return None


def _data_rows(data: DataSection, checkpoint: Checkpoint, directory: Path) -> list[Row]:
    if data.task != checkpoint.manifest.task:
        raise Mismatch(
            f"{checkpoint.path}: a checkpoint for {checkpoint.manifest.task}, and the calibration data "
            f"({data.source}) are for {data.task}"
        )
    limited = data.model_copy(update={"train_limit": min(data.train_limit or _MOST, _MOST)})
    batches = eval_batches(limited, directory, split="train", size=1)
    return [_row(batch) for batch in islice(batches, _MOST)]


def _row(batch: Batch) -> Row:
    return dict(batch.inputs)


def _batch_size(rows: Sequence[Row], classes: int) -> int:
    """Rows of a batch, fewer where their outputs are many."""
    length = max(row["input_ids"].shape[1] if "input_ids" in row else 1 for row in rows)
    return max(1, min(_ROWS, _LOGITS // (length * classes)))


def _cut(chosen: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    return (chosen[at : at + size] for at in range(0, len(chosen), size))


def _batches(rows: Sequence[Row], size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Rows in batches; texts are padded on the right to the longest of theirs."""
    for at in range(0, len(rows), size):
        part = rows[at : at + size]
        yield {name: torch.from_numpy(_stacked([row[name] for row in part])) for name in part[0]}


def _mixed(rows: Sequence[Row], random: np.random.Generator) -> list[Row]:
    """`_MIXES` other rows for each, made of it and of another that `random` draws."""
    made = []
    for _ in range(_MIXES if len(rows) > 1 else 0):
        for row, other in zip(rows, random.permutation(len(rows)), strict=True):
            mix = _spliced if "input_ids" in row else _blended
            made.append(mix(row, rows[other], random))
    return made


def _blended(row: Row, other: Row, random: np.random.Generator) -> Row:
    """A mean of two rows of images [1, channels, height, width], moved a little in both directions."""
    share = np.float32(random.beta(_BETA, _BETA))
    made = {}
    for name, values in row.items():
        limits = [side // _MOVED for side in values.shape[-2:]]
        steps = [int(random.integers(-limit, limit + 1)) for limit in limits]
        made[name] = np.roll(share * values + (1 - share) * other[name], steps, axis=(-2, -1))
    return made


def _spliced(row: Row, other: Row, random: np.random.Generator) -> Row:
    """The beginning of one text [1, T], padded behind, and what follows the same place in another."""
    shorter = min(int(values["attention_mask"].sum()) for values in (row, other))
    cut = int(random.integers(1, max(2, shorter)))
    return {
        name: np.concatenate([values[:, :cut], other[name][:, cut:]], axis=1)
        for name, values in row.items()
    }


def _stacked(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Arrays [1, …] as one; those of unequal length [1, T] get zeros behind, which the mask tells apart."""
    if parts[0].ndim == 2:
        longest = max(part.shape[1] for part in parts)
        parts = [np.pad(part, ((0, 0), (0, longest - part.shape[1]))) for part in parts]
    return np.concatenate(parts)


def _digest(rows: Sequence[Row]) -> str:
    digest = sha256()
    for row in rows:
        for name in sorted(row):
            digest.update(f"{name} {row[name].dtype} {row[name].shape}".encode())
            digest.update(np.ascontiguousarray(row[name]).tobytes())
    return f"sha256:{digest.hexdigest()}"
