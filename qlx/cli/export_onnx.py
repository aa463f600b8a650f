"""`qlx export-onnx`: any checkpoint to an ONNX graph that onnxruntime runs."""

from pathlib import Path
from typing import Any

import click

from qlx.cli import options
from qlx.cli.session import Session


@options.command(
    "export-onnx",
    extra="export",
    examples=(
        "qlx export-onnx merged/digits -o onnx/digits",
        "qlx export-onnx packed/digits -o onnx/digits-nf4",
        "qlx export-onnx runs/base --adapter adapters/one --adapter second=adapters/two -o onnx/both",
        "qlx export-onnx packed/lm-int4 --accuracy-level 4 --head int8 -o onnx/lm-int4-fast",
    ),
)
@click.argument("checkpoint", type=options.DIRECTORY)
@options.output()
@options.base()
@click.option(
    "--adapter",
    "adapters",
    metavar="[NAME=]DIR",
    multiple=True,
    help="Adapter trained on CHECKPOINT, to be chosen when the model runs, by its name (default: that of its "
    "directory). CHECKPOINT may be a plain model directory then.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "nf4", "fp4", "int8", "int4", "int2", "ternary"]),
    help="Precision of the linear weights (default: as the checkpoint has them).",
)
@click.option(
    "--accuracy-level",
    type=click.Choice(["0", "4"]),
    help="How packed weights are multiplied: 0 in float32 (default); 4 with inputs rounded to 8 bits, and the "
    "codes of nf4 and fp4 as 8-bit integers, faster and lossy. The price is measured and recorded.",
)
@click.option(
    "--head",
    type=click.Choice(["int8"]),
    help="Store a language model's head in 8 bits, a fourth of what each token reads of it, and round its inputs to "
    "8 bits. The price is measured and recorded.",
)
def command(
    session: Session,
    checkpoint: Path,
    output: Path,
    force: bool,
    base: str | None,
    adapters: tuple[str, ...],
    precision: str | None,
    accuracy_level: str | None,
    head: str | None,
) -> None:
    """Export a checkpoint to ONNX.

    The probe is replayed under onnxruntime before the result appears. An adapter stays apart from
    its base in the graph; with --adapter, the base is written once and each adapter to a file of its own.
    """
    from qlx.cli import render
    from qlx.exporting import export_adapters, export_onnx

    if adapters and base is not None:
        raise click.UsageError("--adapter goes with its base as CHECKPOINT; leave out --base")
    level = None if accuracy_level is None else int(accuracy_level)
    rest: Any = {
        "precision": precision,
        "accuracy_level": level,
        "head": head,
        "force": force,
    }
    if adapters:
        exported = export_adapters(checkpoint, adapters, output, **rest, report=session.report)
    else:
        exported = export_onnx(checkpoint, output, base=base, **rest, report=session.report)
    session.emit(render.checkpoint_data(exported), render.print_made)
