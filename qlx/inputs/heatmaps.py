"""Heatmaps and places: where a pixel of the frame lies in the grid, the target a model learns, the peaks it makes.

A pixel's or a cell's index means its centre, and the first one's left edge is the image's: in a
frame W wide and a grid w wide, x pixels lie at (x + ½) w / W - ½ cells, and back the other way.
That is how resizing moves them, too, so labels follow the frames through any resolution.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["find_peaks", "gaussian_target", "rescaled"]

Floats = NDArray[np.float64]


def rescaled(places: NDArray[Any], sizes: NDArray[Any], to: NDArray[Any]) -> Floats:
    """Move places (x, y) `[..., 2]` from an image of `sizes` (width, height) into one of the sizes `to`."""
    wanted = np.asarray(to, np.float64) / np.asarray(sizes, np.float64)
    return np.asarray((np.asarray(places, np.float64) + 0.5) * wanted - 0.5)


def gaussian_target(
    places: NDArray[Any], present: NDArray[np.bool_], grid: tuple[int, int], sigma: float
) -> NDArray[np.float32]:
    """What a model learns: exp(-d² / 2 sigma²) around each place, nothing where there is none.

    Args:
        places: (x, y) in cells `[K, 2]`.
        present: which of the K are there at all.
        grid: (height, width) of the heatmap.
        sigma: in cells.

    Returns:
        float32 `[K, height, width]`, 1 at a place that is a cell's centre. TrackNet (Huang et al. 2019)
        rounds the same bell to 256 classes.
    """
    height, width = grid
    x, y = np.arange(width), np.arange(height)
    away = [
        (x[None, :] - place[0]) ** 2 + (y[:, None] - place[1]) ** 2
        if there
        else np.full(grid, np.inf)
        for place, there in zip(places, present, strict=True)
    ]
    return np.exp(-np.stack(away) / (2 * sigma**2)).astype(np.float32)


def find_peaks(logits: NDArray[Any]) -> tuple[Floats, Floats]:
    """The highest place of every heatmap, between the cells, and how sure the model is of it.

    Along each axis a parabola goes through the logarithm of the highest cell's probability and those
    of its two neighbours; its top is the place. For a Gaussian that is exact (the three-point
    Gaussian estimator; Fisher and Naidu 1996, A Comparison of Algorithms for Subpixel Peak
    Detection). At the grid's border the cell itself is taken.

    Args:
        logits: `[..., height, width]`, before the sigmoid.

    Returns:
        Places (x, y) in cells `[..., 2]`, and the highest cell's probability `[...]`; NaN for a
        heatmap that is not finite.
    """
    maps = np.asarray(logits, np.float64)
    flat = maps.reshape(-1, *maps.shape[-2:])
    found = [_peak(single) for single in flat]
    places = np.array([place for place, _ in found]).reshape(*maps.shape[:-2], 2)
    return places, np.array([score for _, score in found]).reshape(maps.shape[:-2])


def _peak(logits: Floats) -> tuple[tuple[float, float], float]:
    if not np.isfinite(logits).all():
        return (np.nan, np.nan), np.nan
    row, column = divmod(int(logits.argmax()), logits.shape[1])
    log_probability = -np.logaddexp(0.0, -logits)
    x = column + _offset(log_probability[row], column)
    y = row + _offset(log_probability[:, column], row)
    return (x, y), float(np.exp(log_probability[row, column]))


def _offset(line: Floats, at: int) -> float:
    """How far from cell `at`, its line's highest, the top of the parabola lies: -½ … ½."""
    if not 0 < at < len(line) - 1:
        return 0.0
    left, top, right = line[at - 1 : at + 2]
    bend = left - 2 * top + right
    return float(np.clip((left - right) / (2 * bend), -0.5, 0.5)) if bend < 0 else 0.0
