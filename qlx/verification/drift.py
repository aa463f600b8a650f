"""Which layer moved, and which weight: two models compared inside, not only by their outputs.

Numbers only, from arrays: what runs a model and reads its weights lies in `qlx.models` and `graph`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qlx.verification.metrics import Array

__all__ = ["Drift", "LayerDrift", "LayerTally", "WeightDrift", "Weights", "weight_drift"]

Weights = Mapping[str, Callable[[], Array]]
"""Weights fp32 by in-memory name, each computed when it is called for."""

EMBEDDINGS, HEAD = "embeddings", "head"


@dataclass(frozen=True)
class LayerDrift:
    """How far one layer's output lies from the reference's, as ‖candidate - reference‖ / ‖reference‖.

    `drift` with everything before it as it is in each model, so that it adds up from layer to layer;
    `own` when the layer is given what the reference gave its own, so that it is this layer's doing
    alone. `retention` is the share of the adapter's effect on this output that the candidate has:
    ⟨candidate - base, reference - base⟩ / ‖reference - base‖², 1 all of it, 0 none, above 1 too much;
    None without a base, or where the adapter has no effect yet.
    """

    name: str
    drift: float
    own: float
    retention: float | None = None


@dataclass(frozen=True)
class WeightDrift:
    """How far one weight lies from the reference's: ‖candidate - reference‖ / ‖reference‖.

    `change` is how far the adapter moved it, ‖reference - base‖ / ‖base‖, and `retention` the share
    of that which the candidate has, as for a layer; None without a base or a change.
    """

    name: str
    drift: float
    change: float | None = None
    retention: float | None = None


@dataclass(frozen=True)
class Drift:
    """Every layer in order of the data, every weight in order of the model, and what was not seen.

    `unseen` says in words what could not be compared, such as the layers of an ONNX graph.
    """

    layers: tuple[LayerDrift, ...] = ()
    weights: tuple[WeightDrift, ...] = ()
    unseen: tuple[str, ...] = ()

    @property
    def worst_layer(self) -> LayerDrift | None:
        """The layer that moved most by itself."""
        return max(self.layers, key=lambda layer: layer.own, default=None)

    @property
    def worst_weight(self) -> WeightDrift | None:
        """The weight that moved most."""
        return max(self.weights, key=lambda weight: weight.drift, default=None)


@dataclass
class _Sums:
    """Inner products of a candidate's and a base's distance from the reference, in float64."""

    norm: float = 0.0
    error: float = 0.0
    effect: float = 0.0
    kept: float = 0.0

    def add(self, reference: Array, candidate: Array, base: Array | None) -> None:
        wanted, given = _flat(reference), _flat(candidate)
        off = given - wanted
        self.norm += float(wanted @ wanted)
        self.error += float(off @ off)
        if base is not None:
            before = _flat(base)
            effect = wanted - before
            self.effect += float(effect @ effect)
            self.kept += float((given - before) @ effect)

    @property
    def relative(self) -> float:
        return _root(self.error, self.norm)

    @property
    def retention(self) -> float | None:
        """None where the effect is no more than rounding, or a value is not finite."""
        if not np.isfinite(self.kept) or self.effect <= 1e-12 * self.norm:
            return None
        return self.kept / self.effect


def _flat(values: Array) -> Array:
    return values.reshape(-1).astype(np.float64)


def _root(error: float, norm: float) -> float:
    if not np.isfinite(error):
        return float(np.finfo(np.float64).max)
    if norm:
        return float(np.sqrt(error / norm))
    return float(np.finfo(np.float64).max) if error else 0.0


@dataclass
class LayerTally:
    """Adds up the drift of each layer over batches; the names are those of the layers alone."""

    names: Sequence[str]
    _free: list[_Sums] = field(default_factory=list)
    _own: list[_Sums] = field(default_factory=list)

    def __post_init__(self) -> None:
        """One sum for the embeddings, one for each layer, one for the head."""
        count = len(self.names) + 2
        self._free = [_Sums() for _ in range(count)]
        self._own = [_Sums() for _ in range(count)]

    def add(
        self,
        reference: Sequence[Array],
        free: Sequence[Array],
        fed: Sequence[Array],
        base: Sequence[Array] | None = None,
        mask: Array | None = None,
    ) -> None:
        """Count one batch of states: what enters the first layer, what leaves each, the logits.

        `free` are the candidate's, `fed` the candidate's when given the reference's states. Where
        states have as many positions `[n, T, ...]` as `mask`, its padding is left out.
        """
        others = [None] * len(reference) if base is None else base
        rows = zip(reference, free, fed, others, strict=True)
        for at, (wanted, given, alone, off) in enumerate(rows):
            cut = _cutter(wanted, mask)
            self._free[at].add(cut(wanted), cut(given), None if off is None else cut(off))
            self._own[at].add(cut(wanted), cut(alone), None)

    def layers(self) -> tuple[LayerDrift, ...]:
        """The drift of the embeddings, of every layer, and of the head."""
        names = (EMBEDDINGS, *self.names, HEAD)
        return tuple(
            LayerDrift(name, free.relative, own.relative, free.retention)
            for name, free, own in zip(names, self._free, self._own, strict=True)
        )


def _cutter(like: Array, mask: Array | None) -> Callable[[Array], Array]:
    if mask is None or mask.shape != like.shape[: mask.ndim]:
        return lambda values: values
    return lambda values: np.asarray(values[mask])


def weight_drift(
    reference: Weights, candidate: Weights, base: Weights | None = None
) -> tuple[tuple[WeightDrift, ...], tuple[str, ...]]:
    """Compare the weights that both models have in one shape; three are in memory at a time.

    Returns:
        The drift of each, and the names of those that could not be compared.
    """
    found, unseen = [], list(_only_in_one(reference, candidate))
    for name in (name for name in reference if name in candidate):
        wanted, given = reference[name](), candidate[name]()
        if wanted.shape != given.shape:
            unseen.append(name)
            continue
        before = base[name]() if base is not None and name in base else None
        found.append(_weight(name, wanted, given, before))
    return tuple(found), tuple(unseen)


def _only_in_one(left: Iterable[str], right: Iterable[str]) -> list[str]:
    return sorted(set(left) ^ set(right))


def _weight(name: str, wanted: Array, given: Array, before: Array | None) -> WeightDrift:
    if before is not None and before.shape != wanted.shape:
        before = None
    sums = _Sums()
    sums.add(wanted, given, before)
    if before is None:
        return WeightDrift(name, sums.relative)
    size = float(_flat(before) @ _flat(before))
    return WeightDrift(name, sums.relative, _root(sums.effect, size), sums.retention)
