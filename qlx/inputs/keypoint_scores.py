"""How well places are found: pixel error, PCK, and the TrackNet paper's precision, recall and F1."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlx.inputs.heatmaps import find_peaks, rescaled

__all__ = ["DETECTED", "PCK_SHARE", "TOLERANCE", "KeypointScore"]

TOLERANCE = 5.0
"""Pixels of the original frame within which a ball counts as found; the mean diameter of a ball in
TrackNet's 1280×720 frames."""
DETECTED = 0.5
"""Probability of the peak from which on a model says that there is something."""
PCK_SHARE = 0.02
"""PCK's tolerance as a share of the frame's diagonal (29 pixels at 1280×720)."""


@dataclass
class KeypointScore:
    """Adds up the metrics of heatmaps over batches. All distances are in pixels of the original frame.

    Of every heatmap the peak counts (`find_peaks`), and it is a detection if its probability is at
    least ½. As in TrackNet (Huang et al. 2019, Section IV; counted in the words of TrackNetV2):

    - the ball is there and detected within 5 pixels: true positive
    - the ball is there and detected farther away: false positive (and no false negative)
    - the ball is not there (visibility 0) and detected: false positive
    - the ball is there and not detected: false negative
    - the ball is not there and not detected: true negative

    A hidden ball (visibility 3) has a labelled place and counts as there. precision = TP / (TP + FP),
    recall = TP / (TP + FN), F1 their harmonic mean, each 0 where nothing is to be divided.

    `pixel_error` is the mean distance of the peak, and `pck` the share of peaks within 2 % of the
    frame's diagonal (Yang and Ramanan 2013, with the frame for the object), over all balls that are
    there, detected or not.
    """

    counts: dict[str, int] = field(
        default_factory=lambda: {"hit": 0, "misplaced": 0, "imagined": 0, "missed": 0, "quiet": 0}
    )
    distances: list[NDArray[np.float64]] = field(default_factory=list)
    shares: list[NDArray[np.float64]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Heatmaps counted so far."""
        return sum(self.counts.values())

    def add(self, logits: NDArray[Any], labels: NDArray[Any]) -> None:
        """Count heatmaps `[n, K, h, w]` with labels `[n, K, 5]`: x, y, visibility, frame width, frame height."""
        cells, probability = find_peaks(logits)
        sizes = labels[..., 3:5].astype(np.float64)
        grid = np.array([logits.shape[-1], logits.shape[-2]])
        places = rescaled(cells, grid, sizes)
        distance = np.linalg.norm(places - labels[..., :2], axis=-1)
        there, detected = labels[..., 2] > 0, probability >= DETECTED
        near = distance <= TOLERANCE
        self._count("hit", there & detected & near)
        self._count("misplaced", there & detected & ~near)
        self._count("missed", there & ~detected)
        self._count("imagined", ~there & detected)
        self._count("quiet", ~there & ~detected)
        self.distances.append(distance[there])
        self.shares.append((distance / np.linalg.norm(sizes, axis=-1))[there])

    def _count(self, what: str, where: NDArray[np.bool_]) -> None:
        self.counts[what] += int(where.sum())

    def content(self) -> dict[str, Any]:
        """What was counted, as JSON values."""
        lists = {"distances": self.distances, "shares": self.shares}
        return {"counts": self.counts} | {
            name: [value for part in parts for value in part.tolist()]
            for name, parts in lists.items()
        }

    def add_content(self, content: Mapping[str, Any]) -> None:
        """Add what was counted of other batches."""
        for what, count in content["counts"].items():
            self.counts[what] += count
        self.distances.append(np.array(content["distances"], np.float64))
        self.shares.append(np.array(content["shares"], np.float64))

    def metrics(self) -> dict[str, float]:
        """`f1`, `precision`, `recall`, `pixel_error` and `pck`; the last two only where a ball was there."""
        hits = self.counts["hit"]
        precision = _share(hits, hits + self.counts["misplaced"] + self.counts["imagined"])
        recall = _share(hits, hits + self.counts["missed"])
        found = {
            "f1": _share(2 * precision * recall, precision + recall),
            "precision": precision,
            "recall": recall,
        }
        distances, shares = np.concatenate(self.distances), np.concatenate(self.shares)
        if not len(distances):
            return found
        pck = np.where(np.isnan(shares), np.nan, shares <= PCK_SHARE)
        return {**found, "pixel_error": float(distances.mean()), "pck": float(pck.mean())}


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
