"""Every error qlx raises on purpose, each with the exit code its command ends with.

::

    QlxError                    1   base class, never raised itself
    ├── CheckFailed             1   outputs differ, retention too low, a stated gate was not met
    ├── UsageError              2   the call itself is wrong (options that exclude each other, no such command)
    ├── InputRefused            3   an input cannot be used; nothing was written
    │   ├── CorruptCheckpoint   3   bytes are not what the manifest or the file header says
    │   ├── Mismatch            3   two inputs do not belong together (adapter and base, probe and model)
    │   ├── Unsupported         3   well-formed, but a feature qlx does not handle
    │   ├── UnsafeInput         3   would run code, leave its directory, or exhaust memory
    │   └── RecipeError         3   a recipe field is wrong; the message names file, line and field
    ├── MissingExtra            4   an optional part of qlx is not installed
    ├── NoRoom                  5   disk or memory is not enough
    └── Interrupted           130   SIGINT or SIGTERM; the message says what is left

A message is one or two sentences: what is wrong, where (file, field, line, tensor), what to do.
"""

import importlib
from types import ModuleType

__all__ = [
    "CheckFailed",
    "CorruptCheckpoint",
    "InputRefused",
    "Interrupted",
    "Mismatch",
    "MissingExtra",
    "NoRoom",
    "QlxError",
    "RecipeError",
    "UnsafeInput",
    "Unsupported",
    "UsageError",
    "require",
]


class QlxError(Exception):
    """Base of all deliberate errors; `exit_code` is what the command line returns for it."""

    exit_code = 1


class CheckFailed(QlxError):
    """A verification did not pass: the outputs differ, or too little of the adapter survives."""

    exit_code = 1


class UsageError(QlxError):
    """The command was called in a way that cannot make sense."""

    exit_code = 2


class InputRefused(QlxError):
    """An input is unusable; the command stopped before writing anything."""

    exit_code = 3


class CorruptCheckpoint(InputRefused):
    """Bytes differ from what the manifest, a header or a format promises."""


class Mismatch(InputRefused):
    """Inputs that are each fine do not belong together."""


class Unsupported(InputRefused):
    """A well-formed input asks for something qlx does not do; the reason is in the message."""


class UnsafeInput(InputRefused):
    """An input would run code, reach outside its directory, or claim absurd sizes."""


class RecipeError(InputRefused):
    """A recipe does not parse or validate; the message names file, line and field."""


class MissingExtra(QlxError):
    """An optional dependency is absent; the message names the extra that brings it."""

    exit_code = 4


class NoRoom(QlxError):
    """The disk is full or memory does not suffice."""

    exit_code = 5


class Interrupted(QlxError):
    """The user or the system ended the command."""

    exit_code = 130

    def __init__(self, message: str = "interrupted; no output was left behind") -> None:
        """Say what is left, and how to go on, where something is."""
        super().__init__(message)


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or say which extra brings it.

    Raises:
        MissingExtra: the module, or one it needs, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        raise MissingExtra(
            f"{missing} is not installed; this command needs it: pip install 'qlx[{extra}]'"
        ) from error
