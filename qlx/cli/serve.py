"""`qlx serve`: answer HTTP requests with a checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import click

from qlx.cli import options
from qlx.cli.session import Session


@options.command(
    "serve",
    extra="serve",
    examples=(
        "qlx serve onnx/digits --port 8080",
        "qlx serve onnx/both",
        "qlx serve adapters/python --base runs/python-base --adapter second=adapters/other",
    ),
)
@click.argument("checkpoint", type=options.DIRECTORY)
@options.base()
@click.option(
    "--adapter",
    "adapters",
    metavar="NAME=DIR",
    multiple=True,
    help="Serve another checkpoint beside it, under NAME.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="Port to listen on; 0 takes a free one.",
)
@click.option("--threads", type=click.IntRange(1), help="Threads inside one operator.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where ONNX checkpoints run; cuda needs onnxruntime-gpu.",
)
@click.option(
    "--api-key-env",
    metavar="VARIABLE",
    help="Environment variable with the key that clients must send.",
)
def command(
    session: Session,
    checkpoint: Path,
    base: str | None,
    adapters: tuple[str, ...],
    host: str,
    port: int,
    threads: int | None,
    device: Literal["cpu", "cuda"],
    api_key_env: str | None,
) -> None:
    """Serve a checkpoint over HTTP.

    Each adapter that a graph was exported with is a model of its own: a request's `model` names it.

    The address is printed on standard error once it answers, and with --json on standard output
    too, with the models' names. SIGINT or SIGTERM ends it: running answers are finished, and the
    exit code is 0.
    """
    from qlx.serving import serve

    def listening(address: str, models: Sequence[str]) -> None:
        session.report(f"serving {', '.join(models)} at {address} (Ctrl-C stops)")
        if session.json:
            session.emit_object({"address": address, "models": list(models)})

    serve(
        checkpoint,
        base=base,
        adapters=[_named(text) for text in adapters],
        host=host,
        port=port,
        threads=threads,
        device=device,
        api_key_variable=api_key_env,
        listening=listening,
    )


def _named(text: str) -> tuple[str, Path]:
    name, equals, directory = text.partition("=")
    if not name or not equals or not Path(directory).is_dir():
        raise click.UsageError(f"--adapter {text!r}: write NAME=DIR with an existing directory")
    return name, Path(directory)
