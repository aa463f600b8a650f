"""`qlx pack`: quantize a merged model into the layout of the library that loads it."""

import math
from pathlib import Path
from typing import Literal

import click

from qlx.cli import options
from qlx.cli.session import Session


def _group_size(
    context: click.Context, parameter: click.Parameter, value: str | None
) -> int | Literal["whole"] | None:
    if value is None or value == "whole":
        return None if value is None else "whole"
    return int(click.IntRange(min=1)(value, parameter, context))


@options.command(
    "pack",
    examples=(
        "qlx pack merged/digits -o packed/digits --to nf4",
        "qlx pack adapters/python --base runs/python-base -o packed/python --to int4 --group-size 32",
        "qlx pack merged/python -o packed/python --to ternary --heal --calibration recipes/python-qlora.yaml",
        "qlx pack merged/python -o packed/python-gguf --to gguf --gguf-type Q4_0",
    ),
)
@click.argument("checkpoint", type=options.DIRECTORY)
@options.output()
@options.base()
@click.option(
    "--to",
    type=click.Choice(["nf4", "fp4", "int8", "int4", "int2", "ternary", "gguf"]),
    required=True,
    help="Target format: nf4 and fp4 load with bitsandbytes, int8, int4, int2 and ternary with compressed-tensors, "
    "gguf in llama.cpp.",
)
@click.option(
    "--group-size",
    metavar="N|whole",
    callback=_group_size,
    help="Weights that share a scale (default 64, for int8 a row); whole: a row, of ternary the tensor.",
)
@click.option(
    "--double-quant/--no-double-quant",
    default=None,
    help="Quantize the scales as well (default: as in training).",
)
@click.option(
    "--gguf-type",
    type=click.Choice(["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0", "TQ2_0"]),
    help="Type of the tensors in a GGUF file (default Q8_0).",
)
@click.option(
    "--min-retention",
    type=click.FloatRange(0, 1),
    help="Refuse a result that keeps less than this share of the adapter's effect.",
)
@click.option(
    "--heal",
    is_flag=True,
    help="Round by what layers are given, then tune scales and rounding on the outputs.",
)
@click.option(
    "--calibration",
    type=options.EXISTING,
    help="Data to heal by: a recipe, texts, or a directory of images (default: the probe's inputs).",
)
@click.option(
    "--max-bytes-per-weight",
    type=click.FloatRange(0, min_open=True),
    help="With --heal: give layers that lose most more bits, up to this average of codes and scales.",
)
@click.option(
    "--picture", type=options.NEW_FILE, help="Draw what survives in each layer: .png or .svg."
)
def command(
    session: Session,
    checkpoint: Path,
    output: Path,
    force: bool,
    base: str | None,
    to: Literal["nf4", "fp4", "int8", "int4", "int2", "ternary", "gguf"],
    group_size: int | Literal["whole"] | None,
    double_quant: bool | None,
    gguf_type: str | None,
    min_retention: float | None,
    heal: bool,
    calibration: Path | None,
    max_bytes_per_weight: float | None,
    picture: Path | None,
) -> None:
    """Quantize a merged model.

    Measures what of the adapter's effect survives, and refuses too large a loss. An adapter is
    merged on the way.
    """
    from qlx.checkpoint import check_file
    from qlx.cli import render
    from qlx.packing import Healing, pack
    from qlx.verification import DEFAULT_MIN_RETENTION

    if not heal and (calibration is not None or max_bytes_per_weight is not None):
        raise click.UsageError("--calibration and --max-bytes-per-weight belong to --heal")
    if max_bytes_per_weight is not None and not math.isfinite(max_bytes_per_weight):
        raise click.UsageError(
            f"--max-bytes-per-weight: {max_bytes_per_weight} is no number of bytes"
        )
    if picture is not None:
        check_file(picture, (checkpoint, base, calibration))
    healing = Healing(calibration, max_bytes_per_weight=max_bytes_per_weight) if heal else None
    packed = pack(
        checkpoint,
        output,
        to=to,
        base=base,
        group_size=group_size,
        double_quant=double_quant,
        gguf_type=gguf_type,
        min_retention=DEFAULT_MIN_RETENTION if min_retention is None else min_retention,
        healing=healing,
        picture=picture,
        force=force,
        report=session.report,
    )
    session.emit(render.checkpoint_data(packed), render.print_made)
