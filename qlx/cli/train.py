"""`qlx train`: a recipe to a run directory."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qlx.cli import options
from qlx.cli.session import Session

if TYPE_CHECKING:
    from qlx.recipe import Recipe


def _print_schema(ctx: click.Context, option: click.Parameter, value: bool) -> None:
    if not value:
        return
    from qlx.recipe import json_schema

    session = ctx.ensure_object(Session)
    session.json = True
    session.emit(json_schema(), lambda console, data: None)
    ctx.exit()


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
@click.option(
    "--schema",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_schema,
    help="Print the JSON schema of recipes, for editors.",
)
@click.option(
    "--nproc",
    type=click.IntRange(1, 64),
    default=1,
    metavar="N",
    help="Train in N processes on this machine, which together take N times the batch.",
)
@click.option(
    "--shard",
    is_flag=True,
    help="Let each process hold a part of every weight, for models too large for one (FSDP).",
)
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan, train nothing.")
@options.output(required=False)
def command(
    session: Session,
    recipe: Path,
    overrides: tuple[str, ...],
    resume: bool,
    nproc: int,
    shard: bool,
    dry_run: bool,
    output: Path | None,
    force: bool,
) -> int | None:
    """Train what a recipe describes.

    Writes a run with its probe, metrics and report; the output defaults to runs/NAME, with the
    name that RECIPE gives. Where the recipe says merge_after_train, the merged model is written beside
    it, to OUTPUT-merged.
    """
    from qlx.checkpoint import check_output
    from qlx.cli import render
    from qlx.errors import InputRefused, Interrupted, UsageError
    from qlx.recipe import load_recipe
    from qlx.training import check_places, launch, this_process, train

    loaded = load_recipe(recipe, overrides)
    if dry_run:
        session.emit(_checked(loaded), render.print_dry_run)
        return None
    target = output or Path("runs") / loaded.name
    if _merges(loaded):
        read = (recipe, loaded.base.path, loaded.data.path)
        check_output(_merged_path(target), read, force=force)
    if this_process().first:
        check_places(loaded, target, (recipe,), force=force)
    flags = {"--force": force, "--shard": shard}
    words = _command(recipe, overrides, target, {**flags, "--resume": resume})
    on = _command(recipe, overrides, target, {**flags, "--resume": True})
    try:
        if nproc > 1:
            return launch([*words, *session.flags()], nproc)
        run = train(loaded, target, resume=resume, force=force, shard=shard, report=session.report)
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted; {_way_on(target, on, nproc)}") from error
    except (InputRefused, UsageError):
        raise
    except Exception:
        session.report(_way_on(target, on, nproc))
        raise
    if not this_process().first:
        return None
    data = render.checkpoint_data(run)
    if _merges(loaded):
        data["merged"] = _merge(session, loaded, run.path, force)
    session.emit(data, render.print_trained)
    return None


def _merges(recipe: "Recipe") -> bool:
    """Whether a merged model is asked for and there is an adapter to merge."""
    return recipe.merge_after_train and recipe.adapter is not None


def _merged_path(output: Path) -> Path:
    return output.with_name(f"{output.name}-merged")


def _merge(session: Session, recipe: "Recipe", run: Path, force: bool) -> dict[str, Any]:
    """Merge what was just trained; the run stays whatever becomes of that."""
    from qlx.cli import render
    from qlx.merging import merge

    base = recipe.base
    merged = merge(
        base.path if base.revision is None else f"{base.path}@{base.revision}",
        [run],
        _merged_path(run),
        head_dtype="float16" if recipe.keep_lm_head_fp16 else None,
        force=force,
        report=session.report,
    )
    return render.checkpoint_data(merged)


def _way_on(output: Path, words: list[str], nproc: int) -> str:
    """What is left of a training that ended early, and the command of `words` that goes on with it.

    With `nproc` processes, or as many as this one is among; torchrun on several machines is the user's.
    """
    from qlx.training import interrupted_at, this_process

    found = interrupted_at(output)
    if found is None:
        return "nothing was saved yet (training.save_every), and nothing was left behind"
    process = this_process()
    count = max(nproc, process.count if process.together else 1)
    many = ["--nproc", str(count)] if count > 1 else []
    command = shlex.join(["qlx", *words, *many])
    return f"the state at step {found[1]} is kept in {found[0]}; go on with: {command}"


def _command(
    recipe: Path, overrides: tuple[str, ...], output: Path, flags: Mapping[str, bool]
) -> list[str]:
    """The words after `qlx` that train this recipe."""
    changes = [part for text in overrides for part in ("--set", text)]
    given = [name for name, on in flags.items() if on]
    return ["train", str(recipe), *changes, "-o", str(output), *given]


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
