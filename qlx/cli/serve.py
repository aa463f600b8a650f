"""`qlx serve`: answer HTTP requests with a checkpoint."""

from pathlib import Path

import click

from qlx.cli import options
from qlx.cli.session import Session


@options.command("serve", examples=("qlx serve onnx/digits --port 8080",))
@click.argument("checkpoint", type=options.DIRECTORY)
@options.base()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="Port to listen on; 0 takes a free one.",
)
def command(session: Session, checkpoint: Path, base: str | None, host: str, port: int) -> None:
    """Serve a checkpoint over HTTP.

    Runs until interrupted; the address is printed once it listens.
    """
    from qlx.serving import serve

    serve(checkpoint, base=base, host=host, port=port)
