"""What survives packing in each layer, as one picture."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlx.checkpoint import replace_file
from qlx.errors import require
from qlx.packing.retention import LayerRetention
from qlx.verification import check_picture

__all__ = ["draw_retention"]

_LEAST, _MOST = -0.25, 1.25  # where the axis ends; what lies beyond is drawn there
_WEIGHTS, _OUTPUTS, _BELOW = "#4c72a4", "#b8c4d6", "#c2410c"


def draw_retention(
    layers: Sequence[LayerRetention], outputs: Mapping[str, float], gate: float, file: Path
) -> None:
    """Write a PNG or SVG: of every adapted layer, how much of its change survives, and the gate.

    Bars are of the weight change, red below the gate; `outputs` adds those of the layers' outputs, by
    tensor name, where healing has measured them. The same values give the same bytes.

    Raises:
        UsageError: the file's name ends neither in .png nor in .svg.
        MissingExtra: matplotlib is not installed.
    """
    suffix = check_picture(file)
    matplotlib = require("matplotlib", "train")
    matplotlib.use("Agg")
    adapted = [layer for layer in layers if layer.retention is not None]
    height = min(1.8 + 0.24 * max(len(adapted), 1), 60)
    figure = require("matplotlib.figure", "train").Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    if adapted:
        _bars(axes, adapted, outputs, gate)
    else:
        text = "no layer's weights before the adapter are known"
        axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
    undated = {"Date": None} if suffix == ".svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "qlx"}):
        figure.savefig(drawn := io.BytesIO(), format=suffix[1:], metadata=undated, dpi=110)
    replace_file(file, drawn.getvalue())


def _bars(
    axes: Any, layers: Sequence[LayerRetention], outputs: Mapping[str, float], gate: float
) -> None:
    places, kept = range(len(layers)), [layer.retention or 0.0 for layer in layers]
    colours = [_WEIGHTS if share >= gate else _BELOW for share in kept]
    known = [(at, outputs[layer.name]) for at, layer in enumerate(layers) if layer.name in outputs]
    shift = 0.2 if known else 0.0
    axes.barh([at - shift for at in places], [_shown(s) for s in kept], 0.38, color=colours)
    if known:
        shares = [_shown(share) for _, share in known]
        axes.barh([at + shift for at, _ in known], shares, 0.38, color=_OUTPUTS)
    axes.axvline(gate, color="black", linewidth=1, linestyle="--")
    axes.axvline(0, color="black", linewidth=0.5)
    axes.set_yticks(
        list(places), [layer.name.removesuffix(".weight") for layer in layers], fontsize=7
    )
    axes.set_xlim(_LEAST, _MOST)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    told = "share of the weight change that survives, red below the gate"
    more = "; pale: of the outputs, when rounded" if known else ""
    axes.set_title(f"{told} ({gate:g}, dashed){more}", fontsize=9)


def _shown(share: float) -> float:
    return min(max(share, _LEAST), _MOST)
