"""Labelled images from parquet files, laid out as the library datasets writes them.

A column `image` (or `img`) holds encoded images, bytes or a struct with a field `bytes`; a column
`label` (or `labels`) numbers or names of classes. Names that belong to numbers are in the file's
metadata, where datasets puts them; without them a class is called by its number.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlx.checkpoint import parse_json
from qlx.errors import InputRefused, require

__all__ = ["LabelledImages", "is_image_table", "read_image_table", "table_files"]

LabelledImages = tuple[list[bytes], list[int], tuple[str, ...]]
"""Encoded images, the class of each, and the names of the classes."""

_SUFFIX = ".parquet"
_IMAGE, _LABEL = ("image", "img"), ("label", "labels")


def is_image_table(path: Path) -> bool:
    """Whether a path is a parquet file or a directory of such files."""
    if path.is_dir():
        return any(item.suffix == _SUFFIX for item in path.iterdir())
    return path.suffix == _SUFFIX


def table_files(path: Path, names: Sequence[str]) -> list[Path]:
    """The parquet files of a directory whose name begins with one of `names`; the first that has any."""
    if not path.is_dir():
        return []
    files = sorted(item for item in path.iterdir() if item.suffix == _SUFFIX)
    found = ([file for file in files if file.name.startswith(name)] for name in names)
    return next((some for some in found if some), [])


def read_image_table(files: Sequence[Path]) -> LabelledImages:
    """All rows of some parquet files that belong together.

    Raises:
        InputRefused: not a parquet file, a column is missing or of another type, fewer than two classes,
            or a row without an image or a label; the message names file and row.
        CorruptCheckpoint: its metadata are no JSON.
    """
    images: list[bytes] = []
    values: list[Any] = []
    names: tuple[str, ...] | None = None
    for file in files:
        table = _read(file)
        image, label = (_column(table, choices, file) for choices in (_IMAGE, _LABEL))
        names = names or _class_names(table.schema.metadata or {}, label, file)
        rows = zip(table.column(image).to_pylist(), table.column(label).to_pylist(), strict=True)
        for number, (content, value) in enumerate(rows, 1):
            images.append(_encoded(content, f"{file}: row {number}: {image}"))
            values.append(_class(value, f"{file}: row {number}: {label}"))
    classes = _classes(values, names, files[0])
    numbers = {name: at for at, name in enumerate(classes)}
    labels = [value if isinstance(value, int) else numbers[value] for value in values]
    return images, labels, classes


def _read(file: Path) -> Any:
    parquet, arrow = require("pyarrow.parquet", "train"), require("pyarrow", "train")
    if not file.is_file():
        raise InputRefused(f"{file}: no such file")
    try:
        return parquet.read_table(file)
    except (arrow.ArrowException, OSError) as error:
        raise InputRefused(f"{file}: not a parquet file ({error})") from error


def _column(table: Any, choices: Sequence[str], file: Path) -> str:
    found = [name for name in choices if name in table.column_names]
    if not found:
        raise InputRefused(
            f"{file}: has no column {choices[0]!r} (it has {', '.join(table.column_names)}); rename yours"
        )
    return found[0]


def _class_names(metadata: Mapping[bytes, bytes], label: str, file: Path) -> tuple[str, ...] | None:
    """What datasets knows of the classes' names; None if it knows none."""
    if b"huggingface" not in metadata:
        return None
    fields: Any = parse_json(metadata[b"huggingface"], f"{file}: its metadata")
    for key in ("info", "features", label, "names"):
        fields = fields.get(key) if isinstance(fields, dict) else None
    if fields is not None and not (isinstance(fields, list) and all(map(_is_name, fields))):
        raise InputRefused(f"{file}: the names of the classes in its metadata are no list of texts")
    return None if fields is None else tuple(fields)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _encoded(content: Any, where: str) -> bytes:
    data = content.get("bytes") if isinstance(content, dict) else content
    if not isinstance(data, bytes) or not data:
        raise InputRefused(
            f"{where} holds no encoded image (bytes, or a struct with a field bytes)"
        )
    return data


def _class(value: Any, where: str) -> int | str:
    if isinstance(value, bool) or not (_is_name(value) or (isinstance(value, int) and value >= 0)):
        raise InputRefused(
            f"{where} is {str(value)[:40]!r}; expected the number or name of a class"
        )
    named: int | str = value
    return named


def _classes(
    values: Sequence[int | str], names: tuple[str, ...] | None, file: Path
) -> tuple[str, ...]:
    kinds = {type(value) for value in values}
    if len(kinds) > 1:
        raise InputRefused(f"{file}: some labels are numbers and some names; make them one kind")
    if kinds == {str}:
        classes = tuple(sorted({str(value) for value in values}))
    else:
        count = max((int(value) for value in values), default=-1) + 1
        classes = names or tuple(str(at) for at in range(count))
        if count > len(classes):
            raise InputRefused(f"{file}: label {count - 1}, but {len(classes)} classes have names")
    if len(classes) < 2 or not values:
        raise InputRefused(f"{file}: needs labels of two classes at least")
    return classes
