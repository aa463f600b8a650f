"""`qlx export-onnx`: any checkpoint to an ONNX graph that onnxruntime runs."""

from pathlib import Path

import click

from qlx.cli import options
from qlx.cli.session import Session


@options.command(
    "export-onnx",
    extra="export",
    examples=(
        "qlx export-onnx merged/digits -o onnx/digits",
        "qlx export-onnx packed/digits -o onnx/digits-nf4",
        "qlx export-onnx packed/lm-int4 --accuracy-level 4 -o onnx/lm-int4-fast",
    ),
)
@click.argument("checkpoint", type=options.DIRECTORY)
@options.output()
@options.base()
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "nf4", "fp4", "int8", "int4", "ternary"]),
    help="Precision of the linear weights (default: as the checkpoint has them).",
)
@click.option(
    "--accuracy-level",
    type=click.Choice(["0", "4"]),
    help="How packed integers are multiplied: 0 in float32 (default); 4 with inputs rounded to 8 bits, "
    "faster and lossy. The price is measured and recorded.",
)
def command(
    session: Session,
    checkpoint: Path,
    output: Path,
    force: bool,
    base: str | None,
    precision: str | None,
    accuracy_level: str | None,
) -> None:
    """Export a checkpoint to ONNX.

    The probe is replayed under onnxruntime before the result appears. An adapter stays apart from
    its base in the graph.
    """
    from qlx.cli import render
    from qlx.exporting import export_onnx

    exported = export_onnx(
        checkpoint,
        output,
        base=base,
        precision=precision,
        accuracy_level=None if accuracy_level is None else int(accuracy_level),
        force=force,
        report=session.report,
    )
    session.emit(render.checkpoint_data(exported), render.print_made)
