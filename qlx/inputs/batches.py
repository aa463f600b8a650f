"""Examples to model inputs: padded batches of arrays, the same for torch and for onnxruntime."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qlx.inputs.images import ImagePreprocessor, open_image
from qlx.inputs.splits import Encoded, ImageSplit, Split, encode_split, load_split
from qlx.inputs.text import IGNORED, TextCodec
from qlx.inputs.tracknet import KeypointSplit

if TYPE_CHECKING:  # the runtime reads no recipe, and starts without the parser of recipes
    from qlx.recipe import DataSection

__all__ = [
    "EVAL_ROWS",
    "Batch",
    "eval_batches",
    "image_batches",
    "keypoint_batch",
    "keypoint_batches",
    "pad_batch",
    "rows_for",
    "text_batches",
]

EVAL_ROWS = 32
"""Examples that are scored at once."""
_MOST_LOGITS = 2**26
"""Most logits of texts that are scored at once: 256 MiB of float32, a few times over while they are scored."""


@dataclass(frozen=True)
class Batch:
    """Model inputs by name, and labels: int64 [n], or [n, T] with -100 where nothing is predicted.

    Of heatmaps float32 [n, K, 5]: x, y, visibility, width and height, in pixels of the frame on disk.
    """

    inputs: dict[str, NDArray[Any]]
    labels: NDArray[Any]

    def __len__(self) -> int:
        return len(self.labels)


def pad_batch(items: Sequence[Encoded], pad_id: int, length: int | None = None) -> Batch:
    """Pad on the right to the longest item (or to `length`): ids, mask and labels int64 [n, T]."""
    width = length or max(len(item.ids) for item in items)
    ids = np.full((len(items), width), pad_id, np.int64)
    labels = np.full((len(items), width), IGNORED, np.int64)
    mask = np.zeros((len(items), width), np.int64)
    for row, item in enumerate(items):
        ids[row, : len(item.ids)] = item.ids
        labels[row, : len(item.ids)] = item.labels
        mask[row, : len(item.ids)] = 1
    return Batch({"input_ids": ids, "attention_mask": mask}, labels)


def text_batches(items: Sequence[Encoded], pad_id: int, size: int) -> Iterator[Batch]:
    """Batches in the given order."""
    for start in range(0, len(items), size):
        yield pad_batch(items[start : start + size], pad_id)


def rows_for(items: Sequence[Encoded], codec: TextCodec) -> int:
    """How many texts to score at once: `EVAL_ROWS`, or fewer where their logits would take too much memory."""
    longest, vocabulary = max(len(item.ids) for item in items), codec.tokenizer.get_vocab_size()
    return max(1, min(EVAL_ROWS, _MOST_LOGITS // (longest * int(vocabulary))))


def image_batches(split: ImageSplit, preprocessor: ImagePreprocessor, size: int) -> Iterator[Batch]:
    """Batches in the given order: `pixel_values` float32 [n, 3, H, W]."""
    for start in range(0, len(split), size):
        stop = min(start + size, len(split))
        pixels = preprocessor([split.images[at] for at in range(start, stop)])
        yield Batch({"pixel_values": pixels}, split.labels[start:stop])


def keypoint_batches(
    split: KeypointSplit, preprocessor: ImagePreprocessor, size: int
) -> Iterator[Batch]:
    """Batches in the given order, decoded one at a time."""
    for start in range(0, len(split), size):
        yield keypoint_batch(split, preprocessor, range(start, min(start + size, len(split))))


def keypoint_batch(
    split: KeypointSplit, preprocessor: ImagePreprocessor, items: Sequence[int]
) -> Batch:
    """Some items: `pixel_values` float32 [n, 3 · frames, H, W] and labels float32 [n, K, 5]."""
    clips = [[open_image(frame) for frame in split.frames[at]] for at in items]
    places = split.places[list(items)]
    sizes = np.array([clip[-1].size for clip in clips], np.float32)[:, None, :]
    sizes = np.broadcast_to(sizes, (*places.shape[:2], 2))
    return Batch({"pixel_values": preprocessor(clips)}, np.concatenate([places, sizes], axis=-1))


def eval_batches(
    data: "DataSection",
    directory: Path,
    *,
    split: Split = "eval",
    size: int = EVAL_ROWS,
    completion_only: bool = True,
) -> Iterator[Batch]:
    """The examples a data section holds out, prepared with the files of a model or checkpoint directory.

    Raises:
        InputRefused: the data or the preprocessing files are missing.
    """
    loaded = load_split(data, split)
    if isinstance(loaded, ImageSplit):
        yield from image_batches(loaded, ImagePreprocessor.from_directory(directory), size)
        return
    if isinstance(loaded, KeypointSplit):
        prepare = ImagePreprocessor.from_directory(directory)
        yield from keypoint_batches(loaded, prepare, size)
        return
    codec = TextCodec.from_directory(directory)
    limit = data.eval_limit if split == "eval" else data.train_limit
    items = encode_split(loaded, codec, data, completion_only=completion_only, limit=limit)
    yield from text_batches(items, codec.pad_id, min(size, rows_for(items, codec)))
