"""Directories that appear whole or not at all.

`new_checkpoint` writes beside the target, syncs every file, renames, and syncs the parent: a kill or
power cut at any instant leaves the old state or the new one. With `force` an existing directory is
exchanged for the new one in one system call.
"""

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qlx.errors import NoRoom, UsageError

__all__ = ["new_checkpoint", "replace_file", "sync_tree"]

_STAGING_MARK = ".qlx-"
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@contextmanager
def new_checkpoint(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a staging directory that becomes `target` when the block ends without an error.

    On any error, interrupts included, the staging directory is removed and `target` is as before.

    Raises:
        UsageError: `target` exists and `force` is not set, or its parent cannot be made.
        NoRoom: the disk filled up while writing.
    """
    target = Path(target).absolute()
    _check_target(target, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f"{_STAGING_MARK}{target.name}-", dir=target.parent))
    try:
        staging.chmod(0o755)
        yield staging
        sync_tree(staging)
        _put_in_place(staging, target, force)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise NoRoom(
                f"{target}: the disk is full; nothing was written (free space or choose another --output)"
            ) from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_target(target: Path, force: bool) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"{target}: exists and is not a directory; choose another --output")
    if target.exists() and not force:
        raise UsageError(
            f"{target}: exists already; choose another --output, or replace it with --force"
        )
    if target.exists() and any(target.iterdir()) and not (target / "qlx.json").is_file():
        raise UsageError(
            f"{target}: is not a qlx checkpoint, so --force will not replace it; remove it yourself"
        )


def _put_in_place(staging: Path, target: Path, force: bool) -> None:
    if target.exists() and force:
        _exchange(staging, target)
    else:
        try:
            os.rename(staging, target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise UsageError(
                    f"{target}: appeared while this command was writing; nothing was changed"
                ) from error
            raise
    _sync(target.parent)


def _exchange(staging: Path, target: Path) -> None:
    """Swap the two directories atomically (renameat2); elsewhere move the old one aside first."""
    libc = ctypes.CDLL(None, use_errno=True)
    renameat2 = getattr(libc, "renameat2", None)
    if renameat2 is not None:
        result = renameat2(
            _AT_FDCWD, os.fsencode(staging), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE
        )
        if result == 0:
            return
        if ctypes.get_errno() not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))
    aside = Path(tempfile.mkdtemp(prefix=f"{_STAGING_MARK}old-", dir=target.parent))
    os.rename(target, aside / target.name)
    os.rename(staging, target)
    shutil.rmtree(aside, ignore_errors=True)


def sync_tree(directory: Path) -> None:
    """Flush every file below `directory`, then each directory, to the disk."""
    for root, _, files in os.walk(directory, topdown=False):
        for name in files:
            path = Path(root) / name
            path.chmod(0o644)
            _sync(path)
        _sync(Path(root))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a kill leaves the old bytes or the new ones, never a mixture."""
    temporary = path.with_name(f"{_STAGING_MARK}{path.name}")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    _sync(path.parent)
