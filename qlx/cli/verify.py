"""`qlx verify`: replay the probe and say whether the model is still the one that was trained."""

import math
from pathlib import Path

import click

from qlx.cli import options
from qlx.cli.session import Session


@options.command(
    "verify",
    examples=(
        "qlx verify onnx/digits",
        "qlx verify merged/digits --against adapters/digits --base runs/digits-base --junit out.xml",
        "qlx verify packed/digits --against merged/digits --layers --picture drift.png",
        "qlx verify merged/digits --limit relative=1e-6 --limit kl_mean=1e-9",
    ),
)
@click.argument("checkpoint", type=options.DIRECTORY)
@click.option(
    "--against",
    type=options.DIRECTORY,
    help="Run this checkpoint, of any kind, on the same inputs and compare with it.",
)
@options.base()
@options.adapter_name()
@click.option(
    "--data",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Recipe on whose held-out data to compare too (with --against).",
)
@click.option(
    "--limit",
    "limits",
    metavar="NAME=VALUE",
    multiple=True,
    help="Make a limit stricter: relative, max_abs, kl_mean, kl_p99, top1, top1_decided, retention, "
    "score_drop, loss_rise or layer_drift.",
)
@click.option(
    "--layers/--no-layers",
    default=None,
    help="Look at every layer and weight (with --against; default: when the outputs differ).",
)
@click.option(
    "--picture", type=options.NEW_FILE, help="Draw the drift of layers and weights: .png or .svg."
)
@click.option("--junit", type=options.NEW_FILE, help="Write the checks as JUnit XML.")
@click.option("--markdown", type=options.NEW_FILE, help="Write the report as Markdown.")
def command(
    session: Session,
    checkpoint: Path,
    against: Path | None,
    base: str | None,
    adapter: str | None,
    data: Path | None,
    limits: tuple[str, ...],
    layers: bool | None,
    picture: Path | None,
    junit: Path | None,
    markdown: Path | None,
) -> int:
    """Check that a checkpoint is still the model.

    Every byte, where it belongs, and that it computes what training saw. Ends with exit code 1
    when a check fails.
    """
    from qlx.checkpoint import check_file, replace_file
    from qlx.cli import render
    from qlx.recipe import load_recipe
    from qlx.verification import check_picture, draw, to_junit, to_markdown, verify

    written = [file for file in (junit, markdown, picture) if file is not None]
    own = None if data is None or against is None else load_recipe(data).data.path
    read = (checkpoint, against, base, data, own)
    for at, target in enumerate(written):
        check_file(target, (*read, *written[:at]))
    if picture is not None:
        check_picture(picture)
        layers = True
    tighten = dict(_limit(text) for text in limits)
    report = verify(
        checkpoint,
        against=against,
        base=base,
        adapter=adapter,
        tighten=tighten,
        data=data,
        layers=layers,
    )
    for file, text in ((junit, to_junit), (markdown, to_markdown)):
        if file is not None:
            replace_file(file, text(report).encode("utf-8", "backslashreplace"))
    if picture is not None and report.drift is not None:
        draw(report.drift, picture)
    session.emit(render.report_data(report), render.print_report)
    return 0 if report.passed else 1


def _limit(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise click.BadParameter(f"{text!r} is not NAME=VALUE with a number", param_hint="--limit")
    return name, number
