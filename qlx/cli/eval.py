"""`qlx eval`: the task's own score of any checkpoint."""

from pathlib import Path

import click

from qlx.cli import options
from qlx.cli.session import Session


@options.command(
    "eval",
    examples=(
        "qlx eval onnx/digits",
        "qlx eval onnx/both --adapter digits",
        "qlx eval adapters/digits --base runs/digits-base",
    ),
)
@click.argument("checkpoint", type=options.DIRECTORY)
@options.base()
@click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Recipe whose data section to use (default: the data that CHECKPOINT was trained on).",
)
@options.adapter_name()
@click.option("--offload", is_flag=True, help="Read weights from disk as each layer runs.")
def command(
    session: Session,
    checkpoint: Path,
    base: str | None,
    data: Path | None,
    adapter: str | None,
    offload: bool,
) -> None:
    """Score a checkpoint on held-out data.

    Accuracy for images; F1, precision, recall and pixel error for heatmaps; loss, perplexity and
    token accuracy for text. Every kind of checkpoint.
    """
    from qlx.cli import render
    from qlx.recipe import load_recipe
    from qlx.verification import evaluate

    section = load_recipe(data).data if data else None
    result = evaluate(checkpoint, base=base, data=section, offload=offload, adapter=adapter)
    session.emit(render.score_data(checkpoint, result), render.print_scores)
