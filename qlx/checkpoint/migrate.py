"""Opening old format versions: one function per step from a version to the next, kept for ever."""

from collections.abc import Callable, Mapping
from typing import Any

from qlx.checkpoint.manifest import FORMAT_VERSION

__all__ = ["MIGRATIONS", "migrate_value"]

MIGRATIONS: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""From version N to N + 1, by N. Version 1 is the first, so there is nothing to migrate yet."""


def migrate_value(value: dict[str, Any]) -> dict[str, Any]:
    """Bring a parsed manifest of any released version up to the current one."""
    version = value.get("format_version")
    while isinstance(version, int) and version < FORMAT_VERSION and version in MIGRATIONS:
        value = MIGRATIONS[version](value)
        version = value.get("format_version")
    return value
