"""One run of one command: where its result goes, where its progress goes, and how much is said.

A result that cannot be written (a closed pipe, a full disk) is told from a command that failed: the
session remembers it, and `main` turns it into an exit code of its own where the command has none.
Progress that cannot be written stops nothing.
"""

import contextlib
import errno
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

import click

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 120  # columns of a table when nobody looks at a terminal
NO_ROOM = 5
OUTPUT_CLOSED = 141  # what a shell reports of a program that SIGPIPE ended


def open_streams() -> TextIO | None:
    """Make the standard streams writable in any locale, and return the one for results.

    What an encoding lacks, such as the bytes of a path that is not UTF-8, is written as an escape. A
    descriptor that the caller closed is opened on the null device, lest the next file take its number
    and get the prints of libraries; the result is then lost, and None is returned.
    """
    out = sys.stdout
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    return out


@dataclass
class Session:
    """What the options shared by all commands said, and the two streams.

    Attributes:
        json: the result is one JSON object.
        quiet: no progress lines.
        debug: tracebacks and library warnings are shown.
        extra: the extra that the running command belongs to, for the message when it is missing.
        out: standard output as it was at the start, None if closed; only the result goes there.
        lost: why the result could not be written, if it could not.
    """

    json: bool = False
    quiet: bool = False
    debug: bool = False
    extra: str = "train"
    out: TextIO | None = field(default_factory=lambda: sys.stdout)
    lost: OSError | None = None
    _emitted: bool = False

    def flags(self) -> list[str]:
        """The options shared by all commands, as they are given to another process."""
        chosen = (("--json", self.json), ("--quiet", self.quiet), ("--debug", self.debug))
        return [name for name, on in chosen if on]

    def report(self, line: str) -> None:
        """One line of progress, on standard error."""
        if not self.quiet:
            say(line)

    def emit(
        self, data: Mapping[str, Any], render: "Callable[[Console, Mapping[str, Any]], None]"
    ) -> None:
        """The command's result: `data` as JSON, or `render` of it for people."""
        if self.json:
            self.emit_object(data)
            return
        from rich.console import Console

        terminal = self.out is not None and self.out.isatty()
        page = io.TextIOWrapper(
            io.BytesIO(), self._encoding, "backslashreplace", write_through=True
        )
        console = Console(
            file=page,
            force_terminal=terminal,
            width=None if terminal else PIPE_WIDTH,
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        render(console, data)
        page.seek(0)
        self._write(page.read())

    def emit_error(self, kind: str, message: str, code: int) -> None:
        """With `--json`, the error as the one object, unless a result was written already."""
        if self.json and not self._emitted:
            self.emit_object({"error": {"kind": kind, "message": message, "exit_code": code}})

    def emit_object(self, data: Mapping[str, Any]) -> None:
        """`data` as JSON: as UTF-8, in which the escape of a stray byte is JSON's own, or else in ASCII."""
        self._emitted = True
        ascii_only = self._encoding.lower().replace("-", "") != "utf8"
        self._write(json.dumps(data, indent=2, ensure_ascii=ascii_only, allow_nan=False) + "\n")

    @property
    def _encoding(self) -> str:
        return getattr(self.out, "encoding", None) or "utf-8"

    def _write(self, text: str) -> None:
        if self.out is None:
            self.lost = OSError(errno.EBADF, "closed")
            return
        try:
            self.out.write(text)
            self.out.flush()
        except OSError as error:
            self.lose(error)

    def lose(self, error: OSError) -> None:
        """Remember that the result is lost, and let what is still buffered go nowhere at exit."""
        self.lost = error
        if self.out is not None:
            discard(self.out)

    def ended(self, code: int) -> int:
        """The exit code of a command that ended with `code`, if its result may be lost.

        A failed check or a refused input stays what it is. A reader that went away is not spoken to.
        """
        if self.lost is None or code != 0:
            return code
        if self.lost.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            say("qlx: standard output: no room for the result; what was made is there")
            return NO_ROOM
        if self.lost.errno != errno.EPIPE:
            say(f"qlx: standard output: {self.lost.strerror}; the result could not be printed")
        return OUTPUT_CLOSED

    @contextlib.contextmanager
    def streams(self) -> Iterator[None]:
        """Send what libraries print to standard error, and keep them from chattering."""
        if not self.debug:
            warnings.simplefilter("ignore")
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
            # It says with every process that an optional kernel is not installed.
            logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        if self.quiet:
            os.environ["TQDM_DISABLE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        with contextlib.redirect_stdout(sys.stderr):
            yield


def say(line: str) -> None:
    """One line on standard error, if anybody takes it."""
    try:
        click.echo(line, file=sys.stderr)
    except OSError:
        discard(sys.stderr)


def discard(stream: TextIO) -> None:
    """Send all that is written to a broken stream to the null device, from now on."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
