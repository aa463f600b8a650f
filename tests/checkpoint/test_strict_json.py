"""Strict JSON: the traps other parsers fall into are refused by name."""

from pathlib import Path

import pytest

from qlx.checkpoint import canonical_json, load_object, parse_json
from qlx.errors import CorruptCheckpoint


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1e400}', "1e400 is too large"),
        (b'{"a": -1.5e999}', "too large"),
        (b'{"a": ' + b"9" * 101 + b"}", "101 digits"),
        (b"[" + b"9" * 5000 + b"]", "5000 digits"),
        (b'"\\uD800"', "half a character"),
        (b'{"\\udfff": 1}', "half a character"),
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


@pytest.mark.parametrize("tail", ["", "\\", '"'])
def test_a_string_without_an_end_takes_no_time(tail: str) -> None:
    """Looked at once: a pattern that begins anew at every quote needs hours for this."""
    with pytest.raises(CorruptCheckpoint, match="not JSON"):
        parse_json(b'{"prompt": "' + b'\\"' * 500_000 + tail.encode(), "body")


def test_large_numbers_and_pairs_that_are_fine() -> None:
    text = b'[1000000000000000019884624838656, 1e300, 1e-400, "\\ud83d\\ude00"]'
    assert parse_json(text, "x") == [1000000000000000019884624838656, 1e300, 0.0, "\U0001f600"]


def test_an_object_is_expected(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(CorruptCheckpoint, match=r"x\.json: holds a list"):
        load_object(tmp_path / "x.json")


def test_canonical_spelling() -> None:
    assert canonical_json({"b": 1, "a": "ü"}) == '{\n  "a": "ü",\n  "b": 1\n}\n'.encode()
    with pytest.raises(ValueError, match="Out of range"):
        canonical_json({"a": float("nan")})
