"""`qlx plan`: the memory of a training before a byte is loaded."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qlx.cli import options
from qlx.cli.session import Session

if TYPE_CHECKING:
    from qlx.planning import Setup, Shape

RECIPE = click.Path(exists=True, dir_okay=False, path_type=Path)
FORMATS = ["float32", "bfloat16", "float16", "nf4", "fp4", "int8", "int4", "int2", "ternary"]


@options.command(
    "plan",
    examples=(
        "qlx plan recipes/digits-qlora.yaml --device cpu",
        "qlx plan --params 7B --rank 16 --tokens 4096 --vram 16GB --suggest",
        "qlx plan --params 1B --params 7B --params 70B --vram 16GB",
    ),
)
@click.argument("recipe", required=False, type=RECIPE)
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Change the recipe.")
@click.option("--params", "sizes", metavar="N", multiple=True, help="Parameters, such as 7B.")
@click.option("--vram", metavar="SIZE", help="Memory to fit into, such as 16GB.")
@click.option("--suggest", is_flag=True, help="Find the nearest setup that fits into --vram.")
@click.option(
    "--rank", "ranks", type=click.IntRange(0), multiple=True, help="0 trains all weights."
)
@click.option("--format", "weights", type=click.Choice(FORMATS), help="Storage of the base.")
@click.option("--tokens", type=click.IntRange(1), help="Sequence length (default: 2048).")
@click.option("--batch", type=click.IntRange(1), help="Sequences in one step (default: 1).")
@click.option("--checkpointing/--no-checkpointing", default=None, help="Recompute activations.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="Where it runs (default: cuda).")
def command(
    session: Session,
    recipe: Path | None,
    overrides: tuple[str, ...],
    sizes: tuple[str, ...],
    vram: str | None,
    suggest: bool,
    ranks: tuple[int, ...],
    **changes: Any,
) -> int:
    """Estimate the memory of a training.

    By part, for RECIPE or for a model of --params parameters. Several --params, or neither
    --params nor RECIPE, give a table over sizes and ranks. Options change what the recipe says.
    With --vram, exit code 1 says that a single plan does not fit.
    """
    from qlx import planning
    from qlx.cli import render_plan

    available = planning.parse_bytes(vram) if vram else None
    _check_options(recipe, overrides, sizes, suggest, available)
    if recipe is None and len(sizes) != 1:
        counts = [planning.parse_count(size) for size in sizes] or planning.DEFAULT_SIZES
        setup = _changed(planning.Setup(), (), changes)
        table = planning.size_table(counts, ranks or planning.DEFAULT_RANKS, setup)
        session.emit(render_plan.table_data(table, available), render_plan.print_table)
        return 0
    shape, setup = _asked(recipe, overrides, sizes, changes["device"] or "cuda")
    planning.check_rank(shape, max(ranks, default=0 if setup.adapter == "vera" else setup.rank))
    plan = planning.plan_shape(shape, _changed(setup, ranks, changes))
    nearest = planning.suggest(shape, plan.setup, available or 0) if suggest else None
    session.emit(
        render_plan.plan_data(plan, available, nearest, asked=suggest), render_plan.print_plan
    )
    return 0 if available is None or plan.fits(available) or nearest else 1


def _check_options(
    recipe: Path | None,
    overrides: tuple[str, ...],
    sizes: tuple[str, ...],
    suggest: bool,
    available: int | None,
) -> None:
    """Refuse options that would be without effect."""
    if recipe and sizes:
        raise click.UsageError("give RECIPE or --params, not both")
    if overrides and not recipe:
        raise click.UsageError("--set changes a field of RECIPE, and none is given")
    if suggest and available is None:
        raise click.UsageError(
            "--suggest needs --vram, the memory to fit into, such as --vram 16GB"
        )
    if suggest and not recipe and len(sizes) != 1:
        raise click.UsageError("--suggest is for one plan: give RECIPE or one --params")


def _asked(
    recipe: Path | None, overrides: tuple[str, ...], sizes: tuple[str, ...], device: str
) -> tuple["Shape", "Setup"]:
    from qlx import planning
    from qlx.recipe import load_recipe

    if recipe is None:
        return planning.shape_from_count(planning.parse_count(sizes[0])), planning.Setup()
    loaded = load_recipe(recipe, overrides)
    return planning.base_shape(loaded.base), planning.recipe_setup(loaded, device)


def _changed(setup: "Setup", ranks: tuple[int, ...], changes: dict[str, Any]) -> "Setup":
    """The setup with the options that were given; one --rank replaces its rank.

    A --format that the setup has already leaves its groups and its double quantization as they are.
    """
    from dataclasses import replace

    from qlx.planning import weight_format

    given: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
    if "weights" in given:
        same = given["weights"] == setup.weights.name
        given["weights"] = setup.weights if same else weight_format(given["weights"])
    if len(ranks) > 1:
        raise click.UsageError("several --rank make sense with several --params only")
    if ranks:
        given["rank"] = ranks[0]
    return replace(setup, **given)
