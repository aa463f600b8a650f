"""How far two sets of outputs lie apart. Numbers only: what is allowed lives in `thresholds`.

Outputs are logits, `[n, classes]` or `[n, T, vocabulary]`, any float dtype; a mask `[n, T]` (or
`[n]`) leaves out the positions that are padding. Everything is computed in float64, in blocks of
rows, so that a large vocabulary needs no second copy of the logits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlx.errors import CheckFailed, Mismatch

__all__ = ["Array", "Comparison", "compare", "divergence", "log_softmax", "margins", "rows_of"]

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
    expected = rows_of(reference, mask, "the reference")
    given = rows_of(candidate, mask, "the candidate", like=reference)
    if not np.isfinite(expected).all():
        raise Mismatch(
            "the reference outputs are not finite; the probe is unusable, make a new one"
        )
    broken = int((~np.isfinite(given)).any(axis=1).sum())
    if broken:
        raise CheckFailed(
            f"the outputs are not finite (NaN or infinity) at {broken} of {len(given)} positions"
        )
    kl = divergence(expected, given)
    same = expected.argmax(axis=1) == given.argmax(axis=1)
    decided = margins(expected) > 2 * tolerance * float(np.abs(expected).max())
    return Comparison(
        **_distances(expected, given),
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        top1=float(same.mean()),
        top1_decided=float(same[decided].mean()) if decided.any() else 1.0,
        retention=None
        if base is None
        else _retention(expected, kl, rows_of(base, mask, "the base", like=reference)),
        positions=len(expected),
        decided=int(decided.sum()),
    )


def rows_of(logits: Array, mask: Array | None, what: str, like: Array | None = None) -> Array:
    """The logits as rows `[positions, C]`, those where `mask` is set.

    Raises:
        Mismatch: the shape is not that of `like` or does not fit the mask, or no position is left.
    """
    if like is not None and logits.shape != like.shape:
        raise Mismatch(f"{what} has outputs of shape {logits.shape}, the reference {like.shape}")
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


def _distances(expected: Array, given: Array) -> dict[str, float]:
    largest, error, norm = 0.0, 0.0, 0.0
    for block in _blocks(expected):
        wanted = expected[block].astype(np.float64)
        off = given[block].astype(np.float64) - wanted
        largest = max(largest, float(np.abs(off).max()))
        error += float((off * off).sum())
        norm += float((wanted * wanted).sum())
    relative = (
        float(np.sqrt(error / norm))
        if norm
        else (0.0 if not error else float(np.finfo(np.float64).max))
    )
    return {"max_abs": largest, "relative": relative}


def log_softmax(rows: Array) -> Array:
    """The logarithm of softmax over the last axis, in float64, shifted by the maximum."""
    shifted = rows.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


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


def _retention(expected: Array, kl: Array, base: Array) -> float | None:
    effect = float(divergence(expected, base).mean())
    return 1.0 - float(kl.mean()) / effect if effect > 0 else None
