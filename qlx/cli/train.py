"""`qlx train`: a recipe to a run directory."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qlx.cli import options
from qlx.cli.session import Session

if TYPE_CHECKING:
    from qlx.recipe import Recipe


@options.command(
    "train",
    examples=(
        "qlx train recipes/digits-qlora.yaml -o runs/digits",
        "qlx train recipes/digits-qlora.yaml --set training.epochs=2 --dry-run",
    ),
)
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="Change a field of the recipe, such as training.seed=1.",
)
@click.option("--resume", is_flag=True, help="Go on from the last saved state in the output.")
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan, train nothing.")
@options.output(required=False)
def command(
    session: Session,
    recipe: Path,
    overrides: tuple[str, ...],
    resume: bool,
    dry_run: bool,
    output: Path | None,
    force: bool,
) -> None:
    """Train what a recipe describes.

    Writes a run with its probe, metrics and report; the output defaults to runs/NAME, with the
    name that RECIPE gives.
    """
    from qlx.cli import render
    from qlx.recipe import load_recipe
    from qlx.training import train

    loaded = load_recipe(recipe, overrides)
    if dry_run:
        session.emit(_checked(loaded), render.print_dry_run)
        return
    run = train(
        loaded,
        output or Path("runs") / loaded.name,
        resume=resume,
        force=force,
        report=session.report,
    )
    session.emit(render.checkpoint_data(run), render.print_made)


def _checked(recipe: "Recipe") -> dict[str, Any]:
    """What a dry run finds, with the memory plan where the base's shape is known."""
    from qlx.cli import render, render_plan
    from qlx.errors import InputRefused
    from qlx.planning import plan_recipe
    from qlx.training import check

    found = check(recipe)
    try:
        plan = render_plan.plan_data(plan_recipe(recipe, device=_device()), None, None)
    except InputRefused:
        plan = None
    return render.dry_run_data(found, plan)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
