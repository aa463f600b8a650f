"""JSON as the format allows it: no duplicate keys, no NaN, bounded size, depth and numbers, one canonical spelling."""

import json
import math
import re
from pathlib import Path
from typing import Any

from qlx.errors import CorruptCheckpoint

__all__ = [
    "MAX_BYTES",
    "MAX_DEPTH",
    "MAX_DIGITS",
    "canonical_json",
    "load_json",
    "load_object",
    "parse_json",
]

MAX_BYTES = 64 * 2**20
MAX_DEPTH = 32
MAX_DIGITS = 100
"""Digits of an integer; Python's own limit is a crash at 4300, and nothing here counts that far."""

_STRINGS = re.compile(rb'"(?:[^"\\]++|\\.?)*+"?', re.DOTALL)
"""A string, or the rest of the text where it has no end. Possessive, so that no byte is looked at twice."""
_BRACKETS = re.compile(rb"[\[\]{}]")
_HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value: sorted keys, two-space indent, UTF-8, final newline.

    Raises:
        ValueError: the value holds NaN or an infinity.
    """
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8") + b"\n"


def load_json(path: Path) -> Any:
    """Parse a JSON file strictly.

    Raises:
        CorruptCheckpoint: too large, too deep, duplicate keys, numbers that are none or too large, text
            that is no Unicode, or not JSON; names file and line.
    """
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    return parse_json(data, str(path))


def load_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file strictly that must hold an object.

    Raises:
        CorruptCheckpoint: see `load_json`, or it holds something else.
    """
    value = load_json(path)
    if not isinstance(value, dict):
        raise CorruptCheckpoint(
            f"{path}: holds a {type(value).__name__} where an object is expected"
        )
    return value


def parse_json(data: bytes, where: str) -> Any:
    """Parse JSON bytes strictly; `where` names the source in errors."""
    if len(data) > MAX_BYTES:
        raise CorruptCheckpoint(f"{where}: larger than {MAX_BYTES // 2**20} MiB, refused")
    _check_depth(data, where)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise CorruptCheckpoint(f"{where}: key {key!r} appears twice")
            result[key] = value
        return result

    def refuse_constant(name: str) -> float:
        raise CorruptCheckpoint(f"{where}: {name} is not a JSON number")

    def integer(text: str) -> int:
        if len(text) > MAX_DIGITS:
            raise CorruptCheckpoint(f"{where}: an integer of {len(text)} digits, refused")
        return int(text)

    def real(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise CorruptCheckpoint(f"{where}: {text[:MAX_DIGITS]} is too large a number")
        return value

    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=unique,
            parse_constant=refuse_constant,
            parse_int=integer,
            parse_float=real,
        )
        if _HALF_CHARACTER.search(data):
            canonical_json(value)
        return value
    except UnicodeDecodeError as error:
        raise CorruptCheckpoint(f"{where}: not UTF-8 (byte {error.start})") from error
    except UnicodeEncodeError as error:
        raise CorruptCheckpoint(f"{where}: holds half a character (\\ud800 to \\udfff)") from error
    except json.JSONDecodeError as error:
        raise CorruptCheckpoint(f"{where}: line {error.lineno}: not JSON ({error.msg})") from error


def _check_depth(data: bytes, where: str) -> None:
    depth = 0
    for match in _BRACKETS.finditer(_STRINGS.sub(b"", data)):
        depth += 1 if match.group() in b"[{" else -1
        if depth > MAX_DEPTH:
            raise CorruptCheckpoint(f"{where}: nested deeper than {MAX_DEPTH} levels, refused")
