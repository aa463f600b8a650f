"""Strict JSON: the traps other parsers fall into are refused by name."""

import pytest

from qlx.checkpoint import canonical_json, parse_json
from qlx.errors import CorruptCheckpoint


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b"[" * 33 + b"]" * 33, "deeper"),
        (b"[" * 1_000_000, "deeper"),
        (b'{"a":\n oops}', "line 2"),
        (b'"\xff"', "UTF-8"),
        (b"", "not JSON"),
    ],
)
def test_refused(data: bytes, says: str) -> None:
    with pytest.raises(CorruptCheckpoint, match=says):
        parse_json(data, "file")


def test_brackets_inside_strings_do_not_count_as_depth() -> None:
    text = '{"a": "' + "[" * 100 + '\\"' + "{" * 100 + '"}'
    assert parse_json(text.encode(), "x") == {"a": "[" * 100 + '"' + "{" * 100}


def test_canonical_spelling() -> None:
    assert canonical_json({"b": 1, "a": "ü"}) == '{\n  "a": "ü",\n  "b": 1\n}\n'.encode()
    with pytest.raises(ValueError, match="Out of range"):
        canonical_json({"a": float("nan")})
