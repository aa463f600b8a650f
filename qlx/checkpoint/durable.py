"""Directories and files that appear whole or not at all.

`new_checkpoint` writes beside the target, syncs every file, renames, and syncs the parent: a kill or
power cut at any instant leaves the old state or the new one. With `force` an existing directory is
exchanged for the new one in one system call.

What a kill leaves beside the target is a staging directory `.qlx-NAME-…`. Its writer holds a lock on
it for as long as it lives (flock: the system releases it with the process), so the next writer of the
same name can tell what is left over from what is being written, and removes only the former.
"""

import ctypes
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qlx.checkpoint.outputs import check_output
from qlx.errors import NoRoom, UsageError

__all__ = ["held", "naming", "new_checkpoint", "replace_file", "sync_tree"]

_STAGING_MARK = ".qlx-"
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def new_checkpoint(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a staging directory that becomes `target` when the block ends without an error.

    On any error, interrupts included, the staging directory is removed and `target` is as before;
    errors that name the staging directory are reworded to name `target`.

    Raises:
        UsageError: `target` may not be written, see `check_output`.
        NoRoom: the disk filled up while writing.
    """
    shown, target = Path(target), check_output(Path(target), force=force)
    with _beside(target, shown) as staging:
        staging.chmod(0o755)
        yield staging
        sync_tree(staging)
        _put_in_place(staging, target, force)


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a kill leaves the old bytes or the new ones, never a mixture.

    A link is followed; a device or pipe is written to.

    Raises:
        UsageError: the directory of `path` cannot be written.
        NoRoom: the disk filled up while writing.
    """
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    target = Path(os.path.realpath(path))
    with _beside(target, path) as staging:
        (staging / "file").write_bytes(data)
        _sync(staging / "file")
        os.rename(staging / "file", target)
        _sync(target.parent)


@contextmanager
def _beside(target: Path, shown: Path) -> Iterator[Path]:
    """An empty directory beside `target` that is locked while the block runs and removed after it."""
    try:
        staging, lock = _make_staging(target, shown)
        try:
            with naming(staging, shown):
                yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            os.close(lock)
    except OSError as error:
        if error.errno in _FULL:
            raise NoRoom(
                f"{shown}: the disk is full; nothing was written (free space or choose another place)"
            ) from error
        raise


def _make_staging(target: Path, shown: Path) -> tuple[Path, int]:
    """A new staging directory and the descriptor that holds its lock.

    Where the file system has no locks, there is none, and nobody can take it for left over either.
    """
    prefix = f"{_STAGING_MARK}{target.name}-"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target.parent, prefix)
        while True:
            staging = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
            with suppress(FileNotFoundError, BlockingIOError):  # taken for left over by another
                return staging, _locked(staging, required=False)
    except OSError as error:
        if error.errno in _FULL:
            raise
        raise UsageError(
            f"{shown}: cannot be written in {target.parent} ({error.strerror}); choose another place"
        ) from error


def _remove_stale(parent: Path, prefix: str) -> None:
    """Remove the staging directories of this name whose writers are dead."""
    staging = re.compile(re.escape(prefix) + r"[a-z0-9_]{8}")  # as tempfile names them
    for name in filter(staging.fullmatch, os.listdir(parent)):
        with suppress(OSError):
            lock = _locked(parent / name, required=True)
            shutil.rmtree(parent / name, ignore_errors=True)
            os.close(lock)


def _locked(directory: Path, *, required: bool) -> int:
    """A descriptor of `directory` that holds its lock, or if not `required` may fail to where there are none.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the directory is gone, or there are no locks.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _lock(descriptor, required)
        os.stat(directory)  # it may have been removed before it was locked
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _lock(descriptor: int, required: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if required or isinstance(error, BlockingIOError):
            raise


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory while the block runs, so that no other command works in it.

    Raises:
        UsageError: a living process holds it.
    """
    try:
        lock = _locked(directory, required=False)
    except BlockingIOError as error:
        raise UsageError(
            f"{directory}: another command is writing there; wait for it, or choose another --output"
        ) from error
    try:
        yield
    finally:
        os.close(lock)


@contextmanager
def naming(temporary: Path, shown: str | Path) -> Iterator[None]:
    """Let errors of the block speak of `shown` where they name `temporary`, which is gone when they are read."""
    try:
        yield
    except Exception as error:
        error.args = tuple(_renamed(part, temporary, shown) for part in error.args)
        if isinstance(error, OSError):
            error.filename = _renamed(error.filename, temporary, shown)
        raise


def _renamed(part: object, temporary: Path, shown: str | Path) -> object:
    if isinstance(part, str | Path):
        return str(part).replace(str(temporary), str(shown))
    return part


def _put_in_place(staging: Path, target: Path, force: bool) -> None:
    if target.exists() and force:
        check_output(target, force=True)  # again: a note may have been put there since
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
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.qlx-old-", dir=target.parent))
    os.rename(target, aside / target.name)
    try:
        os.rename(staging, target)
    except OSError:
        os.rename(aside / target.name, target)
        aside.rmdir()
        raise
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
