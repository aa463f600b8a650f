"""One run of one command: where its result goes, where its progress goes, and how much is said."""

import contextlib
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


@dataclass
class Session:
    """What the options shared by all commands said, and the two streams.

    Attributes:
        json: the result is one JSON object.
        quiet: no progress lines.
        debug: tracebacks and library warnings are shown.
        extra: the extra that the running command belongs to, for the message when it is missing.
        out: standard output as it was at the start; only the result goes there.
    """

    json: bool = False
    quiet: bool = False
    debug: bool = False
    extra: str = "train"
    out: TextIO = field(default_factory=lambda: sys.stdout)
    _emitted: bool = False

    def report(self, line: str) -> None:
        """One line of progress, on standard error."""
        if not self.quiet:
            click.echo(line, file=sys.stderr)

    def emit(
        self, data: Mapping[str, Any], render: "Callable[[Console, Mapping[str, Any]], None]"
    ) -> None:
        """The command's result: `data` as JSON, or `render` of it for people."""
        if self.json:
            self._write(data)
            return
        from rich.console import Console

        width = None if self.out.isatty() else PIPE_WIDTH
        console = Console(file=self.out, width=width, markup=False, highlight=False, soft_wrap=True)
        render(console, data)

    def emit_error(self, kind: str, message: str, code: int) -> None:
        """With `--json`, the error as the one object, unless a result was written already."""
        if self.json and not self._emitted:
            self._write({"error": {"kind": kind, "message": message, "exit_code": code}})

    def _write(self, data: Mapping[str, Any]) -> None:
        self._emitted = True
        text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
        click.echo(text, file=self.out)

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
