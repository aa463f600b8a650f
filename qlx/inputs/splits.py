"""A recipe's data section to training and evaluation examples: which ones, in which order, always the same."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from qlx.errors import InputRefused, Unsupported
from qlx.inputs.digits import CLASSES, digits
from qlx.inputs.image_tables import is_image_table, read_image_table, table_files
from qlx.inputs.images import as_image, open_image
from qlx.inputs.python_text import python_docstrings, python_sources
from qlx.inputs.tables import read_examples
from qlx.inputs.text import TextCodec, TextExample
from qlx.inputs.tracknet import KeypointSplit, keypoint_split, read_clips

if TYPE_CHECKING:  # the runtime reads no recipe, and starts without the parser of recipes
    from qlx.recipe import DataSection

__all__ = [
    "Encoded",
    "ImageSplit",
    "Loaded",
    "Split",
    "TextSplit",
    "encode_split",
    "load_split",
    "split_digest",
]

Split = Literal["train", "eval"]

_IMAGE_SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
)
_EVAL_NAMES = ("eval", "val", "valid", "validation", "test")
_SHIFTED_COPIES = 2


@dataclass(frozen=True)
class ImageSplit:
    """Images (uint8 arrays [H, W, 3]; or paths or encoded bytes, decoded on use), labels int64 [n], class names."""

    images: Sequence[Any] | NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class TextSplit:
    """Texts as they came from the source, before tokens."""

    examples: tuple[TextExample, ...]

    def __len__(self) -> int:
        return len(self.examples)


@dataclass(frozen=True)
class Encoded:
    """One text as the model sees it: token ids, and labels of the same length (-100: does not count)."""

    ids: list[int]
    labels: list[int]


Loaded = ImageSplit | KeypointSplit | TextSplit


def load_split(data: "DataSection", split: Split) -> Loaded:
    """The examples of a split; the same data section gives the same ones in the same order.

    Limits apply to images here, and to texts after they became token blocks (`encode_split`).

    Raises:
        InputRefused: the path has no usable data.
        Unsupported: a file type that is not read.
    """
    limit = data.train_limit if split == "train" else data.eval_limit
    if data.source == "digits":
        return _limited(_digits_split(data, split), limit)
    if data.source == "images":
        return _limited(_folder_split(data, split), limit)
    if data.source == "tracknet":
        clips = read_clips(Path(data.path or ""))
        chosen = [clips[at] for at in sorted(_indices(len(clips), data, split))]
        return keypoint_split(chosen, data.frames, data.sigma, limit)
    return TextSplit(_part(_texts(data), data, split))


def split_digest(split: Loaded) -> str:
    """`sha256:…` over the content of a split, so that lineage can name the data."""
    digest = hashlib.sha256()
    if isinstance(split, KeypointSplit):
        digest.update(repr(split.names).encode() + split.places.tobytes())
        for item in split.frames:
            digest.update(item[-1].read_bytes())
    elif isinstance(split, ImageSplit):
        digest.update(repr(split.classes).encode() + split.labels.tobytes())
        for image in split.images:
            digest.update(_content(image))
    else:
        for example in split.examples:
            content = (example.prompt or "", example.completion, example.messages)
            digest.update(repr(content).encode())
    return f"sha256:{digest.hexdigest()}"


def _content(image: Any) -> bytes:
    if isinstance(image, Path):
        return image.read_bytes()
    return image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes()


def _limited(split: ImageSplit, limit: int | None) -> ImageSplit:
    if limit is None:
        return split
    return ImageSplit(split.images[:limit], split.labels[:limit], split.classes)


def _indices(count: int, data: "DataSection", split: Split) -> NDArray[np.int64]:
    """The shuffled positions that belong to a split; at least one example goes to each."""
    if count < 2:
        raise InputRefused(
            f"{data.path or data.source}: {count} examples cannot be divided into training and evaluation"
        )
    order = np.random.default_rng([data.seed, 0]).permutation(count)
    held_out = min(max(1, round(count * data.eval_fraction)), count - 1)
    return order[:held_out] if split == "eval" else order[held_out:]


def _digits_split(data: "DataSection", split: Split) -> ImageSplit:
    copies = _SHIFTED_COPIES if data.variant == "shifted" else 1
    images, labels = digits(data.variant, data.seed, copies)
    per_copy = len(labels) // copies
    chosen = _indices(per_copy, data, split)
    if split == "train":
        chosen = np.concatenate([chosen + copy * per_copy for copy in range(copies)])
    return ImageSplit(images[chosen], labels[chosen], CLASSES)


def _folder_split(data: "DataSection", split: Split) -> ImageSplit:
    root = Path(data.path or "")
    if is_image_table(root):
        return _table_split(root, data, split)
    if not root.is_dir():
        raise InputRefused(
            f"{root}: no such directory (source images needs one directory per class, or parquet files)"
        )
    held_out = next((root / name for name in _EVAL_NAMES if (root / name).is_dir()), None)
    if held_out is not None and (root / "train").is_dir():
        part = root / "train" if split == "train" else held_out
        return _shuffled(_folder(part, _classes(root / "train")), data)
    return _chosen(_folder(root, _classes(root)), data, split)


def _chosen(everything: ImageSplit, data: "DataSection", split: Split) -> ImageSplit:
    """The part of images that come undivided."""
    return _ordered(everything, _indices(len(everything), data, split))


def _shuffled(split: ImageSplit, data: "DataSection") -> ImageSplit:
    """Images that come divided, class by class, in an order of which any beginning has all classes."""
    order = np.random.default_rng([data.seed, 0]).permutation(len(split))
    return _ordered(split, order)


def _ordered(split: ImageSplit, order: NDArray[np.int64]) -> ImageSplit:
    return ImageSplit([split.images[at] for at in order], split.labels[order], split.classes)


def _table_split(root: Path, data: "DataSection", split: Split) -> ImageSplit:
    """Images of parquet files: one, or `train*` and `test*` (or another of `_EVAL_NAMES`) in a directory."""
    train, held_out = table_files(root, ("train",)), table_files(root, _EVAL_NAMES)
    if not (train and held_out):
        return _chosen(_table(train or table_files(root, ("",)) or [root]), data, split)
    known = _table(train)
    if split == "train":
        return _shuffled(known, data)
    found = _table(held_out)
    labels = _renumbered(found, known.classes, held_out[0])
    return _shuffled(ImageSplit(found.images, labels, known.classes), data)


def _renumbered(split: ImageSplit, classes: tuple[str, ...], where: Path) -> NDArray[np.int64]:
    """The labels of a split as numbers of other `classes`, by name."""
    unknown = sorted({*split.classes} - {*classes})
    if unknown:
        raise InputRefused(f"{where}: class {unknown[0]!r} does not occur in the training files")
    return np.array([classes.index(split.classes[label]) for label in split.labels], np.int64)


def _table(files: Sequence[Path]) -> ImageSplit:
    images, labels, classes = read_image_table(files)
    as_image(images[0])
    return ImageSplit(images, np.array(labels, np.int64), classes)


def _classes(root: Path) -> tuple[str, ...]:
    names = tuple(
        sorted(
            item.name for item in root.iterdir() if item.is_dir() and not item.name.startswith(".")
        )
    )
    if len(names) < 2:
        raise InputRefused(f"{root}: needs one directory per class, two at least")
    return names


def image_files(directory: Path) -> list[Path]:
    """The images that lie in a directory itself, by the ends of their names, sorted."""
    return sorted(file for file in directory.iterdir() if file.suffix.lower() in _IMAGE_SUFFIXES)


def _folder(root: Path, classes: tuple[str, ...]) -> ImageSplit:
    paths, labels = [], []
    for label, name in enumerate(classes):
        files = image_files(root / name) if (root / name).is_dir() else []
        if not files:
            raise InputRefused(f"{root / name}: no images ({', '.join(sorted(_IMAGE_SUFFIXES))})")
        paths += files
        labels += [label] * len(files)
    open_image(paths[0])
    return ImageSplit(paths, np.array(labels, np.int64), classes)


def _texts(data: "DataSection") -> list[TextExample]:
    if data.source == "python-text":
        return [TextExample(completion=text) for text in python_sources()]
    if data.source == "python-docstrings":
        return [
            TextExample(
                messages=(
                    {"role": "user", "content": ask},
                    {"role": "assistant", "content": answer},
                )
            )
            for ask, answer in python_docstrings()
        ]
    if data.source != "text" or data.path is None:
        raise Unsupported(f"data.source {data.source!r} holds no text")
    return read_examples(Path(data.path))


def _part(
    examples: list[TextExample], data: "DataSection", split: Split
) -> tuple[TextExample, ...]:
    return tuple(examples[at] for at in _indices(len(examples), data, split))


def encode_split(
    split: TextSplit,
    codec: TextCodec,
    data: "DataSection",
    *,
    completion_only: bool,
    limit: int | None = None,
) -> list[Encoded]:
    """Token ids and labels of a split: plain texts are joined and cut into blocks, others stay apart.

    Raises:
        InputRefused: nothing is left to learn from, because `data.max_length` is too small for every text.
    """
    encoded: list[Encoded] = []
    for item in _encode(split.examples, codec, data, completion_only):
        if len(encoded) == limit:
            break
        encoded.append(item)
    if not encoded:
        raise InputRefused(
            f"no text of the data fills or fits data.max_length {data.max_length}; lower it or give more text"
        )
    return encoded


def _encode(
    examples: Sequence[TextExample], codec: TextCodec, data: "DataSection", completion_only: bool
) -> Iterator[Encoded]:
    pending: list[int] = []
    max_length = data.max_length
    for example in examples:
        if example.prompt is not None or example.messages:
            ids, labels = codec.encode(
                example, max_length, completion_only=completion_only, answers=data.answers
            )
            yield Encoded(ids, labels)
            continue
        pending += codec.parts(example)[1]
        whole = len(pending) - len(pending) % max_length
        for start in range(0, whole, max_length):
            block = pending[start : start + max_length]
            yield Encoded(block, list(block))
        pending = pending[whole:]
    if len(pending) > 1:
        yield Encoded(pending, list(pending))
