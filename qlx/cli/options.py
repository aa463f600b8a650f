"""Options that mean the same thing in every command, as decorators, and the command class."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from qlx.cli.session import Session
from qlx.errors import Interrupted

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

EXISTING = click.Path(exists=True, path_type=Path)
DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)
NEW_DIRECTORY = click.Path(file_okay=False, path_type=Path)


class NewFile(click.Path):
    """A file to write, at a place where one can be: asked for before any work is done."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path, checked by `qlx.checkpoint.check_file`."""
        from qlx.checkpoint import check_file

        path = super().convert(value, param, ctx)
        check_file(Path(str(path)))
        return path


NEW_FILE = NewFile(dir_okay=False, path_type=Path)


SHARED = {
    "debug": (("--debug",), "Show tracebacks and library warnings."),
    "quiet": (("-q", "--quiet"), "No progress lines on standard error."),
    "json": (("--json",), "Print the result as one JSON object."),
}


class Command(click.Command):
    """A command whose help ends with examples and whose stray prints go to standard error."""

    def __init__(
        self, *args: Any, examples: tuple[str, ...] = (), extra: str = "train", **kwargs: Any
    ) -> None:
        """Take click's own arguments; each of `examples` is a complete command line.

        `extra` is what to install when something that the command needs is missing.
        """
        super().__init__(*args, **kwargs)
        self.examples, self.extra = examples, extra
        self.params.sort(key=lambda parameter: parameter.name in SHARED)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples below the options, unwrapped."""
        with formatter.section("Example" if len(self.examples) == 1 else "Examples"):
            for example in self.examples:
                formatter.write(f"{'':{formatter.current_indent}}{example}\n")

    def invoke(self, ctx: click.Context) -> Any:
        """Run the body with the session's streams in place."""
        session = ctx.find_object(Session) or Session()
        ctx.obj, session.extra = session, self.extra
        _require_utf8(ctx)
        with session.streams():
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt as error:  # click would print an empty line
                raise Interrupted from error


def _require_utf8(ctx: click.Context) -> None:
    """Refuse what is not UTF-8 on the command line: the libraries that read models cannot open it."""
    for name, value in ctx.params.items():
        for item in value if isinstance(value, tuple) else (value,):
            text = os.path.abspath(item) if isinstance(item, Path) else str(item)
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise click.BadParameter(
                    f"{text!a} is not UTF-8, which libraries that read models need; rename it",
                    ctx,
                    next(each for each in ctx.command.params if each.name == name),
                )


def command(
    name: str, *, examples: tuple[str, ...], extra: str = "train"
) -> Callable[[Callable[..., Any]], Command]:
    """Make a function the command `name`, with the options that all commands share.

    The function gets the `Session` first and its options as keywords.
    """

    def decorate(function: Callable[..., Any]) -> Command:
        shared = _shared(click.pass_obj(function))
        return click.command(name, cls=Command, examples=examples, extra=extra)(shared)

    return decorate


def _shared(function: Callable[..., Any]) -> Callable[..., Any]:
    for attribute, (names, text) in SHARED.items():
        function = click.option(
            *names,
            attribute,
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_remember,
            help=text,
        )(function)
    return function


def _remember(ctx: click.Context, option: click.Parameter, value: bool) -> None:
    session = ctx.ensure_object(Session)
    if option.name is not None:
        setattr(session, option.name, value)


def output(*, required: bool = True) -> Decorator:
    """`-o/--output DIR` and `--force`."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        text = "Replace the output directory, in one step."
        function = click.option("--force", is_flag=True, help=text)(function)
        return click.option(
            "-o",
            "--output",
            type=NEW_DIRECTORY,
            required=required,
            help="New directory for the result.",
        )(function)

    return decorate


def base(*, required: bool = False) -> Decorator:
    """`--base NAME`: a directory or a hub name with `@revision`."""
    text = "Base model: a directory, or a hub name such as owner/model@revision."
    return click.option("--base", metavar="BASE", required=required, help=text)


def adapter_name() -> Decorator:
    """`--adapter NAME`: one of those that a graph was exported with."""
    text = "Run an ONNX checkpoint with this one of its adapters (see qlx inspect)."
    return click.option("--adapter", metavar="NAME", help=text)


def adapters(*, required: bool = False) -> Decorator:
    """`--adapter DIR`, as often as needed."""
    return click.option(
        "--adapter",
        "adapters",
        type=DIRECTORY,
        multiple=True,
        required=required,
        help="Adapter directory (qlx or plain PEFT).",
    )
