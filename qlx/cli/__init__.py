"""The command line: parse, call one function, render. One command per file.

`main` is the program's entry and the one place where errors become exit codes. Nothing but click is
imported until a command runs, so `qlx --help` answers at once.
"""

import errno
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType

import click

from qlx.cli.commands import program
from qlx.cli.session import NO_ROOM, Session, open_streams, say
from qlx.errors import Interrupted, QlxError

__all__ = ["main", "program"]

INTERNAL_ERROR = 70  # EX_SOFTWARE of sysexits.h: a defect of qlx itself

# The extras that bring a module; a command's own extra is named if it is among them.
EXTRAS_OF_MODULE = {
    "PIL": ("train", "serve"),
    "accelerate": ("train", "export"),
    "bitsandbytes": ("train", "export"),
    "datasets": ("train",),
    "h11": ("serve",),
    "huggingface_hub": ("train",),
    "jinja2": ("train", "serve"),
    "matplotlib": ("train",),
    "onnx": ("export",),
    "onnx_ir": ("export",),
    "onnxruntime": ("serve", "export"),
    "onnxscript": ("export",),
    "peft": ("train", "export"),
    "pyarrow": ("train",),
    "sklearn": ("train",),
    "starlette": ("serve",),
    "tokenizers": ("train", "serve"),
    "torch": ("train", "export"),
    "transformers": ("train", "export"),
    "trl": ("train",),
    "uvicorn": ("serve",),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code; never raises, never shows a traceback unasked.

    Codes: 0 done, 1 a check failed, 2 usage, 3 input refused, 4 an extra is missing, 5 no room,
    70 a defect of qlx itself, 130 interrupted (SIGINT or SIGTERM), 141 nobody reads the result.
    """
    session = Session(out=open_streams())
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return session.ended(_run(session, arguments))
    finally:
        signal.signal(signal.SIGTERM, previous)


def _run(session: Session, arguments: Sequence[str] | None) -> int:
    streams = sys.stdout, sys.stderr
    try:
        result = program.main(args=arguments, prog_name="qlx", standalone_mode=False, obj=session)
        return result if isinstance(result, int) else 0
    except (
        SystemExit
    ):  # click's end where something printed finds no reader; it has wrapped the streams
        if sys.stdout is streams[0]:
            raise
        sys.stdout, sys.stderr = streams
        session.lose(BrokenPipeError(errno.EPIPE, "no reader"))
        return 0
    except Exception as error:  # noqa: BLE001 - the boundary: every failure gets a line and a code
        if session.debug:
            traceback.print_exc()
        kind, message, code = _explain(error, session.extra)
        return _fail(session, kind, message, code)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _fail(session: Session, kind: str, message: str, code: int) -> int:
    line = " ".join(message.split())
    if code == Interrupted.exit_code and sys.stderr.isatty():
        say("")  # the terminal has put ^C into the line
    say(f"qlx: {line}")
    session.emit_error(kind, line, code)
    return code


def _explain(error: Exception, extra: str) -> tuple[str, str, int]:
    """(kind, message, exit code) of any exception that ended a command."""
    kind = type(error).__name__
    if isinstance(error, QlxError):
        return kind, str(error), error.exit_code
    if isinstance(error, click.Abort):
        return "Interrupted", str(Interrupted()), Interrupted.exit_code
    if isinstance(error, click.UsageError):
        return "UsageError", _usage(error), 2
    if isinstance(error, click.ClickException):
        return "UsageError", error.format_message(), 2
    if isinstance(error, ModuleNotFoundError) and (extras := _extras_of(error)):
        named = extra if extra in extras else extras[0]
        needs = f"this command needs it: pip install 'qlx[{named}]'"
        return "MissingExtra", f"{error.name} is not installed; {needs}", 4
    if isinstance(error, MemoryError) or _is_torch_out_of_memory(error):
        return "NoRoom", "not enough memory; `qlx plan` shows what a training needs", NO_ROOM
    if isinstance(error, OSError):
        return _explain_os(error)
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        what = f"{error.object!a}: is not UTF-8, which is needed here; rename the file or directory"
        return "InputRefused", what, 3
    advice = "this is a defect of qlx: run again with --debug and report what it prints"
    return kind, f"internal error: {kind}: {error}; {advice}", INTERNAL_ERROR


def _usage(error: click.UsageError) -> str:
    command = error.ctx.command_path if error.ctx else "qlx"
    text = error.format_message().rstrip(".")
    return f"{text}; see `{command} --help`"


def _extras_of(error: ModuleNotFoundError) -> tuple[str, ...]:
    return EXTRAS_OF_MODULE.get((error.name or "").partition(".")[0], ())


def _is_torch_out_of_memory(error: Exception) -> bool:
    """Torch's own class on an accelerator, its allocator's RuntimeError on the CPU."""
    names = {base.__name__ for base in type(error).__mro__}
    return "OutOfMemoryError" in names or "DefaultCPUAllocator" in str(error)


def _explain_os(error: OSError) -> tuple[str, str, int]:
    what = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM):
        return "NoRoom", f"{error.filename or 'output'}: {what}; free space and run again", NO_ROOM
    where = f"{error.filename}: " if error.filename else ""
    return "InputRefused", f"{where}{what}", 3
