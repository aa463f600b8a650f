"""`qlx migrate`: bring an older checkpoint to the current format version."""

from pathlib import Path

import click

from qlx.cli import options
from qlx.cli.session import Session


@options.command("migrate", examples=("qlx migrate adapters/old",))
@click.argument("checkpoint", type=options.DIRECTORY)
def command(session: Session, checkpoint: Path) -> None:
    """Bring a checkpoint to the current format.

    Version 1 is the first, and current. For a directory that is no checkpoint, the message names
    the command that imports it.
    """
    from qlx.checkpoint import FORMAT_VERSION, is_checkpoint, open_checkpoint
    from qlx.cli import plain, render
    from qlx.errors import InputRefused

    if not is_checkpoint(checkpoint):
        found = plain.describe(checkpoint)
        raise InputRefused(f"{checkpoint}: {found['what']}; {found['advice']}")
    open_checkpoint(checkpoint)
    data = {"path": str(checkpoint), "format_version": FORMAT_VERSION, "changed": False}
    session.emit(data, render.print_migration)
