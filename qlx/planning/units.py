"""Sizes and counts as people write them ("16GB", "7B") and as the rest of the package wants them."""

import re

from qlx.errors import UsageError

_BYTES = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_MOST = 2.0**63
_NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def _parse(text: str, units: dict[str, int], example: str) -> int:
    match = _NUMBER.fullmatch(text)
    factor = units.get(match[2].upper()) if match else None
    value = float(match[1]) * factor if match and factor else 0.0
    if not 0.5 < value < _MOST:
        raise UsageError(f"cannot read {text[:40]!r} as {example}")
    return round(value)


def parse_bytes(text: str) -> int:
    """Bytes of a size with a decimal (GB) or binary (GiB) unit.

    Raises:
        UsageError: no positive number with a known unit.
    """
    return _parse(text, _BYTES, "a size such as 16GB or 512MiB")


def parse_count(text: str) -> int:
    """Parameters of a count such as "7B" or "600M".

    Raises:
        UsageError: no positive number with K, M, B, T or nothing behind it.
    """
    return _parse(text, _COUNTS, "a parameter count such as 7B or 600M")


def format_bytes(size: float) -> str:
    """A size in decimal units with three significant digits: 9.44 GB, 812 KB."""
    for unit in ("TB", "GB", "MB", "KB"):
        if size >= 0.9995 * _BYTES[unit]:
            return f"{_three_digits(size / _BYTES[unit])} {unit}"
    return f"{size:.0f} B"


def format_count(count: float) -> str:
    """A parameter count with three significant digits: 6.74B, 494M."""
    for unit in ("T", "B", "M", "K"):
        if count >= 0.9995 * _COUNTS[unit]:
            return f"{_three_digits(count / _COUNTS[unit])}{unit}"
    return f"{count:.0f}"


def _three_digits(value: float) -> str:
    decimals = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{decimals}f}"
