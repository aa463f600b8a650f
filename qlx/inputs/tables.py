"""Text examples from the user's files: jsonl, csv or parquet, read without running or downloading anything."""

import codecs
import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlx.errors import InputRefused, Unsupported, require
from qlx.inputs.chat import Message
from qlx.inputs.text import TextExample

__all__ = ["read_examples"]

_LONGEST_FIELD = 2**31 - 1
"""Characters of a csv file's field; the csv module's own limit is 131 072, less than a long text has."""
_ROLES = ("system", "user", "assistant")


def read_examples(path: Path) -> list[TextExample]:
    """Examples of a file, by its columns: `messages`, or `prompt` and `completion`, or `text`.

    Raises:
        InputRefused: not readable, no known columns, or a row is wrong; the message names the row.
        Unsupported: the file name ends with none of .jsonl, .csv, .parquet.
    """
    path = Path(path)
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    if path.suffix not in readers:
        raise Unsupported(f"{path}: text data must be a .jsonl, .csv or .parquet file")
    if not path.is_file():
        raise InputRefused(f"{path}: no such file")
    examples = [
        _example(row, f"{path}: row {number}")
        for number, row in enumerate(readers[path.suffix](path), 1)
    ]
    if not examples:
        raise InputRefused(f"{path}: holds no examples")
    return examples


def _jsonl(path: Path) -> Iterator[Mapping[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                what = f"not UTF-8 text (byte {error.start} of the line)"
                raise InputRefused(f"{path}: line {number}: {what}; save it as UTF-8") from error
            except json.JSONDecodeError as error:
                what = f"not JSON ({error.msg}, column {error.colno})"
                raise InputRefused(f"{path}: line {number}: {what}") from error
            except (ValueError, RecursionError) as error:
                raise InputRefused(f"{path}: line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise InputRefused(f"{path}: line {number}: each line must be an object")
            yield row


def _csv(path: Path) -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(_LONGEST_FIELD)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from csv.DictReader(file, strict=True)
    except UnicodeDecodeError as error:
        raise InputRefused(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error
    except csv.Error as error:
        raise InputRefused(f"{path}: not a csv file ({error})") from error


def _parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    parquet, arrow = require("pyarrow.parquet", "train"), require("pyarrow", "train")
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise InputRefused(f"{path}: not a parquet file ({error})") from error


def _example(row: Mapping[str, Any], where: str) -> TextExample:
    if "messages" in row:
        return TextExample(messages=_messages(row["messages"], where))
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return TextExample(messages=_messages([*prompt, *completion], where))
        return TextExample(
            prompt=_text(prompt, "prompt", where), completion=_text(completion, "completion", where)
        )
    if "text" in row:
        return TextExample(completion=_text(row["text"], "text", where))
    columns = ", ".join(map(repr, row)) or "none"
    raise InputRefused(
        f"{where}: needs the columns messages, or prompt and completion, or text (it has {columns})"
    )


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise InputRefused(f"{where}: {column} must be text")
    if not value and column != "prompt":
        raise InputRefused(f"{where}: {column} is empty; leave the row out")
    return _whole(value, column, where)


def _whole(value: str, column: str, where: str) -> str:
    """JSON can say half of a character, which no tokenizer takes."""
    half = next((letter for letter in value if "\ud800" <= letter <= "\udfff"), None)
    if half is not None:
        raise InputRefused(
            f"{where}: {column} holds half of a character (\\u{ord(half):04x}); write it whole"
        )
    return value


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise InputRefused(f"{where}: messages must be a list of role and content")
    for message in value:
        roles = isinstance(message, dict) and message.get("role") in _ROLES
        if not roles or not isinstance(message.get("content"), str):
            raise InputRefused(
                f"{where}: each message needs a role ({', '.join(_ROLES)}) and a text content"
            )
        _whole(message["content"], "content", where)
    if value[-1]["role"] != "assistant":
        raise InputRefused(
            f"{where}: the last message must be the assistant's; it is what is learned"
        )
    return tuple({"role": message["role"], "content": message["content"]} for message in value)
