"""`qlx inspect`: what a directory is, without importing anything heavy."""

from pathlib import Path

import click

from qlx.cli import options
from qlx.cli.session import Session


@options.command("inspect", examples=("qlx inspect adapters/digits",))
@click.argument("checkpoint", type=options.DIRECTORY)
def command(session: Session, checkpoint: Path) -> None:
    """Say what a directory is.

    Where a checkpoint came from, what it holds, and whether its bytes are those recorded. Plain
    PEFT, transformers and ONNX directories are recognized too.
    """
    from qlx.checkpoint import is_checkpoint, open_checkpoint
    from qlx.cli import plain, render

    if is_checkpoint(checkpoint):
        data = render.manifest_data(open_checkpoint(checkpoint))
        session.emit(data, render.print_manifest)
    else:
        session.emit(plain.describe(checkpoint), plain.print_description)
