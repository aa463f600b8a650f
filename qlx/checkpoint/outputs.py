"""Where a command may write: never into or over what it reads, nor into any checkpoint.

Asked before any work is done, by every command that writes: an output directory by `check_output`,
a single file (a report, a picture) by `check_file`. A file that the manifest does not list makes a
checkpoint unreadable, so the directory of a checkpoint is closed for everything but its replacement.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from qlx.checkpoint.manifest import MANIFEST_FILE
from qlx.checkpoint.model_config import CONFIG_FILE
from qlx.checkpoint.store import is_checkpoint, read_manifest
from qlx.errors import InputRefused, UsageError

__all__ = ["check_apart", "check_file", "check_output"]

_MODEL_FILES = (CONFIG_FILE, "adapter_config.json", "*.safetensors")


def check_output(
    target: Path, inputs: Iterable[str | Path | None] = (), *, force: bool = False
) -> Path:
    """Check that `target` can become a new directory, or with `force` replace a checkpoint.

    `inputs` are what the command reads: directories, names of bases (a hub name is none of this
    machine's directories and passes), or None. Of a checkpoint among them the recorded base counts too.

    Returns:
        The absolute path without links.

    Raises:
        UsageError: it exists, or holds anything but a checkpoint's own files; it is, holds or lies
            inside an input; it lies inside a checkpoint; it cannot be made there.
    """
    target = Path(target)
    place = _real(target)
    check_apart(target, inputs)
    if target.is_symlink() or (place.exists() and not place.is_dir()):
        raise UsageError(f"{target}: exists and is not a directory; choose another --output")
    if place.exists() and not force:
        raise UsageError(
            f"{target}: exists already; choose another --output, or replace it with --force"
        )
    if place.exists():
        _check_ours(target, place)
    _check_outside(target, place, "--output")
    _check_writable(target, place)
    return place


def check_apart(target: Path, inputs: Iterable[str | Path | None], what: str = "--output") -> None:
    """Check that what is written (or removed) at `target` touches none of `inputs`, as of `check_output`.

    Raises:
        UsageError: it is, holds or lies inside one of them; the advice is to choose another `what`.
    """
    place = _real(target)
    for given in _existing(inputs):
        source, advice = _real(given), f"choose another {what}"
        if place == source:
            raise UsageError(f"{target}: the output is the input {given}; {advice}")
        if source.is_relative_to(place):
            raise UsageError(f"{target}: holds the input {given}; {advice}")
        if place.is_relative_to(source):
            raise UsageError(f"{target}: lies inside the input {given}; {advice}")


def check_file(target: Path, inputs: Iterable[str | Path | None] = ()) -> None:
    """Check that a file can be written at `target`; devices and pipes always can.

    `inputs` are the files that this call reads or writes besides, and the directories and bases it reads.

    Raises:
        UsageError: it is or lies inside one of `inputs`, lies inside a checkpoint or among the files of
            any model, or its directory does not exist or cannot be written.
    """
    target, inputs = Path(target), tuple(inputs)
    if target.exists() and not target.is_file() and not target.is_dir():
        return
    place = _real(target)
    if any(_real(given) == place for given in inputs if given is not None):
        raise UsageError(f"{target}: this file has another use in the same call; choose another")
    if not place.parent.is_dir() or place.is_dir():
        what = "is a directory" if place.is_dir() else f"there is no directory {target.parent}"
        raise UsageError(f"{target}: {what}; name a file in a directory that exists")
    _check_outside(target, place, "place")
    check_apart(target, inputs, "place")
    _check_no_model(target, place.parent)
    _check_writable(target, place)


def _real(path: str | Path) -> Path:
    """The absolute path without links; unlike `Path.resolve` it has an answer for links in a circle."""
    return Path(os.path.realpath(path))


def _existing(inputs: Iterable[str | Path | None]) -> Iterator[Path]:
    """The inputs that are here, and the bases that checkpoints among them record."""
    for path in (Path(given) for given in inputs if given is not None):
        if path.exists():
            yield path
        if is_checkpoint(path):
            base = read_manifest(path)[0].base
            if base is not None and Path(base.name).is_dir():
                yield Path(base.name)


def _check_ours(target: Path, place: Path) -> None:
    """A directory to replace is empty, or a checkpoint (damaged or not) with nothing of anybody else's in it."""
    entries = sorted(place.iterdir())
    if not entries:
        return
    if not is_checkpoint(place):
        raise UsageError(
            f"{target}: is not a qlx checkpoint, so --force will not replace it; remove it yourself"
        )
    try:
        own = {MANIFEST_FILE, *read_manifest(place)[0].files}
    except InputRefused as error:
        raise UsageError(
            f"{target}: its {MANIFEST_FILE} is not as this qlx writes it, so --force will not replace it; "
            "remove it yourself"
        ) from error
    for entry in entries:
        if entry.name not in own or entry.is_symlink() or not entry.is_file():
            raise UsageError(
                f"{target}: holds {entry.name}, which qlx did not write, so --force will not replace it; "
                "move that away, or remove it all yourself"
            )


def _check_outside(target: Path, place: Path, what: str) -> None:
    holder = next((above for above in place.parents if os.path.isfile(above / MANIFEST_FILE)), None)
    if holder is not None:
        raise UsageError(
            f"{target}: lies inside the checkpoint {holder}, which another file would make unreadable; "
            f"choose another {what}"
        )


def _check_no_model(target: Path, directory: Path) -> None:
    """A report beside a model's files could replace one of them: its place is elsewhere."""
    found = next((file.name for mark in _MODEL_FILES for file in directory.glob(mark)), None)
    if found is not None:
        raise UsageError(
            f"{target}: lies among the files of a model ({found}); choose another place"
        )


def _check_writable(target: Path, place: Path) -> None:
    """Look at the nearest directory above that exists; what is missing below it can then be made."""
    above = next(path for path in place.parents if path.exists())
    if not above.is_dir():
        raise UsageError(f"{target}: {above} is not a directory; choose another place")
    if not os.access(above, os.W_OK | os.X_OK, effective_ids=True):
        raise UsageError(f"{target}: the directory {above} is not writable; choose another place")
