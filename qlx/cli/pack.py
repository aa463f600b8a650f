"""`qlx pack`: quantize a merged model into the layout of the library that owns the scheme."""

from pathlib import Path

import click

from qlx.cli import options
from qlx.cli.session import Session


@options.command(
    "pack",
    examples=("qlx pack merged/digits -o packed/digits --to nf4",),
)
@click.argument("checkpoint", type=options.DIRECTORY)
@options.output()
@options.base()
@click.option(
    "--to",
    type=click.Choice(["nf4", "fp4"]),
    required=True,
    help="Target format.",
)
@click.option(
    "--group-size", type=int, default=64, show_default=True, help="Weights that share a scale."
)
@click.option(
    "--double-quant/--no-double-quant",
    default=True,
    show_default=True,
    help="Quantize the scales as well.",
)
@click.option(
    "--min-retention",
    type=click.FloatRange(0, 1),
    help="Refuse a result that keeps less than this share of the adapter's effect.",
)
def command(
    session: Session,
    checkpoint: Path,
    output: Path,
    force: bool,
    base: str | None,
    to: str,
    group_size: int,
    double_quant: bool,
    min_retention: float | None,
) -> None:
    """Quantize CHECKPOINT, measure what of the adapter survives, and refuse too large a loss."""
    from qlx.cli import render
    from qlx.packing import pack

    packed = pack(
        checkpoint,
        output,
        to=to,
        base=base,
        group_size=group_size,
        double_quant=double_quant,
        min_retention=min_retention,
        force=force,
    )
    session.emit(render.checkpoint_data(packed), render.print_made)
