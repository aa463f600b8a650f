"""`qlx save-adapter`: a run or a plain PEFT directory to an adapter checkpoint."""

from pathlib import Path
from typing import Literal

import click

from qlx.cli import options
from qlx.cli.session import Session


@options.command(
    "save-adapter",
    examples=(
        "qlx save-adapter runs/digits -o adapters/digits",
        "qlx save-adapter runs/python -o adapters/python --gguf",
        "qlx save-adapter runs/digits -o adapters/digits-small --dtype int8 --base runs/digits-base",
        "qlx save-adapter downloads/peft-adapter -o adapters/mine --base owner/model@main",
    ),
)
@click.argument("source", metavar="RUN_OR_PEFT_DIR", type=options.DIRECTORY)
@options.output()
@options.base()
@click.option(
    "--gguf", is_flag=True, help="Also write adapter.gguf, which llama.cpp takes with --lora."
)
@click.option(
    "--dtype",
    type=click.Choice(["int8"]),
    help="Store the factors of linear layers in 8 bits; refused where that changes the outputs.",
)
def command(
    session: Session,
    source: Path,
    output: Path,
    force: bool,
    base: str | None,
    gguf: bool,
    dtype: Literal["int8"] | None,
) -> None:
    """Make an adapter checkpoint.

    From the adapter of a run, or from a plain PEFT directory. A plain directory names no base by
    content, so --base is needed for it.
    """
    from qlx.cli import render
    from qlx.training import save_adapter

    adapter = save_adapter(source, output, base=base, gguf=gguf, dtype=dtype, force=force)
    session.emit(render.checkpoint_data(adapter), render.print_made)
