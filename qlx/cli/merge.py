"""`qlx merge`: fold an adapter into its base."""

from pathlib import Path
from typing import Literal

import click

from qlx.cli import options
from qlx.cli.session import Session


def _bytes(ctx: click.Context, option: click.Parameter, text: str | None) -> int | None:
    from qlx.errors import UsageError
    from qlx.planning import parse_bytes

    try:
        return None if text is None else parse_bytes(text)
    except UsageError as error:
        raise click.BadParameter(str(error), ctx, option) from error


@options.command(
    "merge",
    examples=(
        "qlx merge --base runs/digits-base --adapter adapters/digits -o merged/digits",
        "qlx merge --base owner/model --adapter one --adapter two --weight 0.7 --weight 0.3 -o merged/both",
    ),
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
@click.option(
    "--head-dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Data type of a language model's head alone, such as float16 beside --dtype bfloat16.",
)
@click.option(
    "--allow-erased",
    type=click.FloatRange(0, 1),
    metavar="SHARE",
    help="Accept that rounding to 16 bits loses up to this share of the adapter's change.",
)
@click.option(
    "--combine",
    "method",
    type=click.Choice(
        ["cat", "linear", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
    ),
    help="How several adapters become one (default: cat, which is their exact weighted sum).",
)
@click.option(
    "--weight",
    "weights",
    type=float,
    multiple=True,
    help="Weight of each --adapter, in their order (default: 1).",
)
@click.option(
    "--density", type=float, help="Share of values that ties, dare_… and magnitude_prune keep."
)
@click.option("--seed", type=int, help="Seed of dare_linear and dare_ties (default: 0).")
@click.option(
    "--max-ram",
    metavar="SIZE",
    callback=_bytes,
    help="Memory the whole process may take, such as 2GB (default: no limit).",
)
@click.option("--dry-run", is_flag=True, help="Print what would be done and taken; write nothing.")
def command(
    session: Session,
    base: str | None,
    adapters: tuple[Path, ...],
    output: Path,
    force: bool,
    onto: Literal["as-trained", "original"] | None,
    dtype: str | None,
    head_dtype: str | None,
    allow_erased: float | None,
    method: str | None,
    weights: tuple[float, ...],
    density: float | None,
    seed: int | None,
    max_ram: int | None,
    dry_run: bool,
) -> None:
    """Merge an adapter, or several combined, into their base.

    The probe is replayed on the result before it appears, layer by layer where the model is large.
    The base defaults to the recorded one.
    """
    from qlx.cli import render
    from qlx.merging import MAX_ERASED, chosen_combination, merge, outline

    combination = chosen_combination(method, weights, density, seed)
    if dry_run:
        plan = outline(
            base,
            list(adapters),
            onto=onto,
            dtype=dtype,
            head_dtype=head_dtype,
            combination=combination,
            max_ram=max_ram,
        )
        session.emit(render.outline_data(plan, max_ram), render.print_outline)
        return
    merged = merge(
        base,
        list(adapters),
        output,
        onto=onto,
        dtype=dtype,
        head_dtype=head_dtype,
        force=force,
        max_erased=MAX_ERASED if allow_erased is None else allow_erased,
        combination=combination,
        max_ram=max_ram,
        report=session.report,
    )
    session.emit(render.merge_data(merged), render.print_merged)
