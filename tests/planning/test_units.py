"""Sizes and counts: read as written, refused when they cannot be meant."""

import pytest

from qlx.errors import UsageError
from qlx.planning import format_bytes, format_count, parse_bytes, parse_count


@pytest.mark.parametrize(
    ("text", "size"),
    [("16GB", 16 * 10**9), ("16 GiB", 16 * 2**30), ("1.5mb", 1_500_000), ("512B", 512)],
)
def test_bytes_are_read_with_decimal_and_binary_units(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("text", "count"), [("7B", 7 * 10**9), ("0.6b", 6 * 10**8), ("86M", 86 * 10**6), ("42", 42)]
)
def test_counts_are_read(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "text", ["", "GB", "16", "-1GB", "16 G B", "0GB", "16XB", "1e9B", "0.1B", "9" * 400 + "GB"]
)
def test_bytes_that_cannot_be_meant_are_refused(text):
    with pytest.raises(UsageError, match="cannot read"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["", "B", "7Q", "-7B", "0", "7 B B", "0.1", "9" * 400])
def test_counts_that_cannot_be_meant_are_refused(text):
    with pytest.raises(UsageError, match="cannot read"):
        parse_count(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(9.44e9, "9.44 GB"), (999_950_000, "1.00 GB"), (81_200, "81.2 KB"), (17, "17 B"), (0, "0 B")],
)
def test_bytes_are_written_with_three_digits(size, text):
    assert format_bytes(size) == text


def test_counts_are_written_with_three_digits():
    assert [format_count(n) for n in (6.74e9, 494e6, 12)] == ["6.74B", "494M", "12"]
