"""The drift of every layer and weight as one picture: bars beside a heatmap."""

import io
import re
from pathlib import Path
from typing import Any

from qlx.checkpoint import replace_file
from qlx.errors import UsageError, require
from qlx.verification.drift import Drift, WeightDrift

__all__ = ["check_picture", "draw"]

_FLOOR, _CEILING = 1e-9, 1e3  # where the scales end; what lies beyond is drawn there
_LAYER = re.compile(r"\.(\d+)\.")


def draw(drift: Drift, file: Path) -> None:
    """Write a PNG or SVG: what each layer drifts, by itself and in all, and each weight's drift.

    Weights are arranged by layer and by their place in it; those outside the layers are left out.
    The same drift gives the same bytes.

    Raises:
        UsageError: the file's name ends neither in .png nor in .svg.
        MissingExtra: matplotlib is not installed.
    """
    suffix = check_picture(file)
    matplotlib = require("matplotlib", "train")
    matplotlib.use("Agg")
    height = 2.2 + 0.3 * max(len(drift.layers), len(_by_layer(drift)[0]))
    figure = require("matplotlib.figure", "train").Figure(
        figsize=(11, min(height, 60)), layout="constrained"
    )
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    _bars(left, drift)
    _heatmap(figure, right, drift)
    undated = {"Date": None} if suffix == ".svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "qlx"}):
        figure.savefig(drawn := io.BytesIO(), format=suffix[1:], metadata=undated, dpi=110)
    replace_file(file, drawn.getvalue())


def check_picture(file: Path) -> str:
    """The suffix of a picture that can be drawn, in small letters.

    Raises:
        UsageError: the file's name ends neither in .png nor in .svg.
    """
    suffix = file.suffix.lower()
    if suffix not in (".png", ".svg"):
        raise UsageError(f"{file}: a picture is a .png or an .svg file")
    return suffix


def _bars(axes: Any, drift: Drift) -> None:
    axes.set_title("layers: ‖candidate − reference‖ / ‖reference‖", fontsize=9)
    if not drift.layers:
        axes.text(0.5, 0.5, "not visible", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    places = range(len(drift.layers))
    total = [_shown(layer.drift) for layer in drift.layers]
    own = [_shown(layer.own) for layer in drift.layers]
    axes.barh([at - 0.2 for at in places], total, 0.38, color="#b8c4d6", label="adding up")
    axes.barh([at + 0.2 for at in places], own, 0.38, color="#c2410c", label="by itself")
    axes.set_yticks(list(places), [_short(layer.name) for layer in drift.layers], fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(_FLOOR, max(2.0, 1.2 * max(total)))
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2, frameon=False)


def _heatmap(figure: Any, axes: Any, drift: Drift) -> None:
    import numpy as np

    axes.set_title("weights: ‖candidate − reference‖ / ‖reference‖, log10", fontsize=9)
    layers, parts, found = _by_layer(drift)
    if not found:
        axes.text(0.5, 0.5, "not comparable", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    values = np.full((len(layers), len(parts)), np.nan)
    for (layer, part), weight in found.items():
        values[layers.index(layer), parts.index(part)] = np.log10(_shown(weight.drift))
    image = axes.imshow(values, aspect="auto", cmap="magma", vmin=np.log10(_FLOOR), vmax=0)
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=8)
    axes.set_xticks(range(len(parts)), parts, rotation=60, ha="right", fontsize=7)
    axes.set_ylabel("layer", fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.8)


def _by_layer(drift: Drift) -> tuple[list[int], list[str], dict[tuple[int, str], WeightDrift]]:
    """Layer numbers, places within a layer, and the weight at each, where names have a number."""
    found = {}
    for weight in drift.weights:
        match = _LAYER.search(weight.name)
        if match:
            part = weight.name[match.end() :].removesuffix(".weight")
            found[int(match[1]), part] = weight
    layers = sorted({layer for layer, _ in found})
    parts = list(dict.fromkeys(part for _, part in found))
    return layers, parts, found


def _shown(value: float) -> float:
    return min(max(value, _FLOOR), _CEILING)


def _short(name: str) -> str:
    return name.rpartition("layers.")[2] or name
