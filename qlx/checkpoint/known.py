"""The hashes of weight files that have not changed since they were read, so that a base is read once.

A fingerprint takes every byte of the weights; of a base that is used again and again, that is most of
the work of a merge. What was found is kept by the file's identity: device, inode, size, and the times
of its last change of content (mtime) and of any change (ctime, which no program can set back).

A file changed less than a minute ago is not remembered: the clock behind these times is coarse, and a
process that writes through a memory map is noticed only when the system flushes the pages. Digests of
checkpoints are never taken from here; opening one reads its files. Decision: docs/decisions/0007.

`QLX_CACHE` names another directory than `~/.cache/qlx`; `QLX_CACHE=off` reads everything every time.
"""

import contextlib
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

from qlx.checkpoint.strict_json import canonical_json, load_json
from qlx.errors import CorruptCheckpoint

__all__ = ["SETTLED_SECONDS", "Stamp", "known_hashes", "remember_hashes"]

SETTLED_SECONDS = 60.0
"""Age that a file's last change must have before its hashes are remembered; above a page's time in memory."""

_ENTRIES = 1000
_VARIABLE = "QLX_CACHE"
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Stamp:
    """What tells one state of a file from another; times in nanoseconds."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> "Stamp":
        """The stamp of a file as it is now."""
        found = path.stat()
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    @property
    def settled(self) -> bool:
        """Whether the last change is old enough that a later one would show."""
        return time.time() - max(self.modified, self.changed) / 1e9 > SETTLED_SECONDS


def known_hashes(path: Path, names: Iterable[str]) -> Mapping[str, str]:
    """Hex SHA-256 of each tensor's data in a weight file, if it has not changed since; else empty.

    `names` are the tensors the file has; an entry for others is not used.
    """
    place = _place(Stamp.of(path))
    if place is None:
        return {}
    try:
        found = load_json(place)
    except (OSError, CorruptCheckpoint):
        return {}
    good = isinstance(found, dict) and found.keys() == set(names) and all(map(_hex, found.values()))
    return found if good else {}


def _hex(value: object) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def remember_hashes(path: Path, before: Stamp, hashes: Mapping[str, str]) -> None:
    """Keep the hashes of a file's tensors; `before` is its stamp from before it was read.

    Nothing is kept of a file that changed meanwhile or lately, or where the cache cannot be written.
    """
    place = _place(before)
    if place is None or not before.settled or Stamp.of(path) != before:
        return
    with contextlib.suppress(OSError):
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = place.with_suffix(f".{os.getpid()}")
        draft.write_bytes(canonical_json(dict(hashes)))
        os.replace(draft, place)
        _prune(place.parent)


def _place(stamp: Stamp) -> Path | None:
    """Where the entry of a file in this state is, or would be; None if there is no cache."""
    folder = _folder()
    return (
        None if folder is None else folder / ("-".join(f"{n:x}" for n in astuple(stamp)) + ".json")
    )


def _folder() -> Path | None:
    """The directory of the entries; None where it is switched off, or could be another user's."""
    chosen = os.environ.get(_VARIABLE, "")
    if chosen == "off":
        return None
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(chosen or Path(home) / "qlx") / "hashes"
    if not folder.is_absolute():
        return None
    with contextlib.suppress(OSError):
        found = folder.stat()
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            return None
    return folder


def _prune(folder: Path) -> None:
    """Drop the entries written first when there are too many."""
    entries = sorted(folder.glob("*.json"), key=lambda entry: entry.stat().st_mtime_ns)
    for entry in entries[:-_ENTRIES]:
        entry.unlink(missing_ok=True)
