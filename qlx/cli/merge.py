"""`qlx merge`: fold an adapter into its base."""

from pathlib import Path
from typing import Literal

import click

from qlx.cli import options
from qlx.cli.session import Session


@options.command(
    "merge",
    examples=("qlx merge --base runs/digits-base --adapter adapters/digits -o merged/digits",),
)
@options.base()
@options.adapters(required=True)
@options.output()
@click.option(
    "--onto",
    type=click.Choice(["as-trained", "original"]),
    help="Base values to merge onto: those that training saw (default), or the original ones.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Data type of the merged weights (default: each tensor keeps the type it has in the base).",
)
def command(
    session: Session,
    base: str | None,
    adapters: tuple[Path, ...],
    output: Path,
    force: bool,
    onto: Literal["as-trained", "original"] | None,
    dtype: str | None,
) -> None:
    """Merge an adapter into its base.

    The probe is replayed on the result before it appears. The base defaults to the recorded one.
    """
    from qlx.cli import render
    from qlx.merging import merge

    merged = merge(
        base,
        list(adapters),
        output,
        onto=onto,
        dtype=dtype,
        force=force,
        report=session.report,
    )
    session.emit(render.checkpoint_data(merged), render.print_made)
