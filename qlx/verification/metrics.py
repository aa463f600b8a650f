"""How far two sets of outputs lie apart. Numbers only: what is allowed lives in `thresholds`.

Outputs are logits, `[n, classes]` or `[n, T, vocabulary]`, any float dtype; a mask `[n, T]` (or
`[n]`) leaves out the positions that are padding. Heatmaps `[n, K, h, w]` are a position for each
of the K keypoints and a class for each cell: softmax is taken over the cells, KL is between the
places where each model expects the keypoint, and the arg max is the peak's cell. Everything is
computed in float64, in blocks of rows, so that a large vocabulary needs no second copy of the logits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlx.errors import CheckFailed, Mismatch
from qlx.inputs import log_softmax

__all__ = [
    "Array",
    "Comparison",
    "Tally",
    "compare",
    "divergence",
    "margins",
    "rows_of",
]

Array = NDArray[Any]

_BLOCK = 2**20  # elements of one block of rows: 8 MiB in float64


@dataclass(frozen=True)
class Comparison:
    """The distance of a candidate's logits from a reference's.

    `max_abs`: largest |candidate - reference|. `relative`: ‖candidate - reference‖ / ‖reference‖
    (Frobenius). `kl_mean`, `kl_p99`: KL(reference ‖ candidate) over positions, in nats. `top1`:
    share of positions with the same arg max; `top1_decided`: the same, over those positions only
    whose reference margin exceeds twice the error that was allowed (`decided` of `positions`).
    `retention`: 1 - KL(reference ‖ candidate) / KL(reference ‖ base), the share of the adapter's
    effect on the outputs that survives; None where the base's outputs are unknown.
    """

    max_abs: float
    relative: float
    kl_mean: float
    kl_p99: float
    top1: float
    top1_decided: float
    retention: float | None
    positions: int
    decided: int

    def metrics(self) -> dict[str, float]:
        """The finite measurements by name, as a manifest stores them."""
        values = {
            "max_abs": self.max_abs,
            "relative": self.relative,
            "kl_mean": self.kl_mean,
            "kl_p99": self.kl_p99,
            "top1": self.top1,
            "top1_decided": self.top1_decided,
        }
        return values if self.retention is None else {**values, "retention": self.retention}


def compare(
    reference: Array,
    candidate: Array,
    mask: Array | None = None,
    base: Array | None = None,
    tolerance: float = 0.0,
) -> Comparison:
    """Compare `candidate` with `reference`, both `[..., C]`, at the positions where `mask` is set.

    `base` are the same model's logits with its adapter off. `tolerance` is the relative error that
    the step is allowed; a position is decided when its reference margin exceeds
    2 · tolerance · max |reference|, so that ties within the allowed error cannot raise an alarm.

    Raises:
        Mismatch: shapes differ, the mask selects nothing, or the reference itself is not finite.
        CheckFailed: the candidate holds NaN or infinity.
    """
    tally = Tally(tolerance)
    tally.add(reference, candidate, mask, base)
    return tally.comparison()


class Tally:
    """Adds up a comparison over batches, of which it keeps three numbers a position.

    Args:
        tolerance: see `compare`.
    """

    def __init__(self, tolerance: float = 0.0) -> None:
        self.tolerance = tolerance
        self._sums = {"max_abs": 0.0, "largest": 0.0, "error": 0.0, "norm": 0.0}
        self._kl: list[Array] = []
        self._same: list[Array] = []
        self._margins: list[Array] = []
        self._effect: float | None = 0.0

    def add(
        self,
        reference: Array,
        candidate: Array,
        mask: Array | None = None,
        base: Array | None = None,
    ) -> None:
        """Count one batch; the arguments and errors are those of `compare`."""
        expected = rows_of(reference, mask, "the reference")
        given = rows_of(candidate, mask, "the candidate", like=reference)
        _require_finite(expected, given)
        self._distances(expected, given)
        self._kl.append(divergence(expected, given))
        self._same.append(expected.argmax(axis=1) == given.argmax(axis=1))
        self._margins.append(margins(expected))
        if base is None:
            self._effect = None
        elif self._effect is not None:
            off = rows_of(base, mask, "the base", like=reference)
            self._effect += float(divergence(expected, off).sum())

    def _distances(self, expected: Array, given: Array) -> None:
        sums = self._sums
        for block in _blocks(expected):
            wanted = expected[block].astype(np.float64)
            off = given[block].astype(np.float64) - wanted
            sums["max_abs"] = max(sums["max_abs"], float(np.abs(off).max()))
            sums["largest"] = max(sums["largest"], float(np.abs(wanted).max()))
            sums["error"] += float((off * off).sum())
            sums["norm"] += float((wanted * wanted).sum())

    def comparison(self) -> Comparison:
        """The distances over everything that was added.

        Raises:
            Mismatch: nothing was added.
        """
        if not self._kl:
            raise Mismatch("there are no outputs to compare")
        kl, same = np.concatenate(self._kl), np.concatenate(self._same)
        decided = np.concatenate(self._margins) > 2 * self.tolerance * self._sums["largest"]
        return Comparison(
            max_abs=self._sums["max_abs"],
            relative=_ratio(self._sums["error"], self._sums["norm"]),
            kl_mean=float(kl.mean()),
            kl_p99=float(np.quantile(kl, 0.99)),
            top1=float(same.mean()),
            top1_decided=float(same[decided].mean()) if decided.any() else 1.0,
            retention=1.0 - float(kl.sum()) / self._effect if self._effect else None,
            positions=len(kl),
            decided=int(decided.sum()),
        )


def _require_finite(expected: Array, given: Array) -> None:
    if not np.isfinite(expected).all():
        raise Mismatch(
            "the reference outputs are not finite; the probe is unusable, make a new one"
        )
    broken = int((~np.isfinite(given)).any(axis=1).sum())
    if broken:
        raise CheckFailed(
            f"the outputs are not finite (NaN or infinity) at {broken} of {len(given)} positions"
        )


def _ratio(error: float, norm: float) -> float:
    """√(error / norm); of nothing, 0 where there is no error and the largest float where there is."""
    if norm:
        return float(np.sqrt(error / norm))
    return float(np.finfo(np.float64).max) if error else 0.0


def rows_of(logits: Array, mask: Array | None, what: str, like: Array | None = None) -> Array:
    """The logits as rows `[positions, C]`, those where `mask` is set; a heatmap is one row of its cells.

    Raises:
        Mismatch: the shape is not that of `like` or does not fit the mask, or no position is left.
    """
    if like is not None and logits.shape != like.shape:
        raise Mismatch(f"{what} has outputs of shape {logits.shape}, the reference {like.shape}")
    if logits.ndim == 4:
        logits = logits.reshape(*logits.shape[:2], -1)
    if mask is not None:
        if mask.shape != logits.shape[:-1]:
            raise Mismatch(
                f"{what} has outputs of shape {logits.shape}, but the mask is {mask.shape}"
            )
        logits = logits[mask.astype(bool)]
    rows = logits.reshape(-1, logits.shape[-1])
    if not rows.size:
        raise Mismatch(f"{what} has no outputs to compare")
    return rows


def _blocks(rows: Array) -> Iterator[slice]:
    step = max(1, _BLOCK // rows.shape[1])
    return (slice(start, start + step) for start in range(0, len(rows), step))


def divergence(expected: Array, given: Array) -> Array:
    """KL(softmax(expected) ‖ softmax(given)) of each row `[N, C]`, in nats, float64 `[N]`, never negative."""
    parts = []
    for block in _blocks(expected):
        left, right = log_softmax(expected[block]), log_softmax(given[block])
        parts.append((np.exp(left) * (left - right)).sum(axis=1))
    return np.asarray(np.maximum(np.concatenate(parts), 0.0))


def margins(rows: Array) -> Array:
    """By how much the largest logit of each row `[N, C]` exceeds the second largest, float64 `[N]`."""
    if rows.shape[1] < 2:
        return np.full(len(rows), np.inf)
    parts = [
        np.partition(rows[block].astype(np.float64), -2, axis=1)[:, -2:] for block in _blocks(rows)
    ]
    top = np.concatenate(parts)
    return np.asarray(top[:, 1] - top[:, 0])
