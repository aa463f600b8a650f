"""`qlx verify`: replay the probe and say whether the model is still the one that was trained."""

from pathlib import Path

import click

from qlx.cli import options
from qlx.cli.session import Session


@options.command(
    "verify",
    examples=(
        "qlx verify onnx/digits",
        "qlx verify merged/digits --against adapters/digits --base runs/digits-base --junit out.xml",
    ),
)
@click.argument("checkpoint", type=options.DIRECTORY)
@click.option(
    "--against",
    type=options.DIRECTORY,
    help="Run this checkpoint on the same inputs and compare with it too.",
)
@options.base()
@click.option("--junit", type=options.NEW_FILE, help="Write the checks as JUnit XML.")
@click.option("--markdown", type=options.NEW_FILE, help="Write the checks as a Markdown table.")
def command(
    session: Session,
    checkpoint: Path,
    against: Path | None,
    base: str | None,
    junit: Path | None,
    markdown: Path | None,
) -> int:
    """Check that a checkpoint is still the model.

    Every byte, where it belongs, and that it computes what training saw. Ends with exit code 1
    when a check fails.
    """
    from qlx.cli import render
    from qlx.verification import to_junit, to_markdown, verify

    report = verify(checkpoint, against=against, base=base)
    for file, text in ((junit, to_junit), (markdown, to_markdown)):
        if file is not None:
            file.write_text(text(report), encoding="utf-8")
    session.emit(render.report_data(report), render.print_report)
    return 0 if report.passed else 1
