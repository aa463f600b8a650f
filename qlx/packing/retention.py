"""How much of an adapter's weight change survives packing, layer by layer.

With W0 the base as trained, Δ = merged - W0 and Ŵ the packed weight's value, retention is the
projection ⟨Ŵ - W0, Δ⟩ / ⟨Δ, Δ⟩: 1 when the change survives, 0 when the packed layer behaves as if
there had never been an adapter, and unbiased by rounding noise that is unrelated to Δ.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf, sqrt

from torch import Tensor

from qlx.merging.values import inner_product

__all__ = ["LayerRetention", "layer_retention", "overall"]

_AT_ONCE = 2**20  # values that are compared at once


@dataclass(frozen=True)
class LayerRetention:
    """One layer: `energy` ⟨Δ, Δ⟩, `kept` ⟨Ŵ - W0, Δ⟩, and `step_share` = rms(Δ) / rms(packing error)."""

    name: str
    energy: float
    kept: float
    step_share: float

    @property
    def retention(self) -> float | None:
        """The ratio kept / energy; None where the adapter changed nothing."""
        return self.kept / self.energy if self.energy else None


def layer_retention(name: str, base: Tensor, merged: Tensor, packed: Tensor) -> LayerRetention:
    """Measure one layer; all three are the weight's values, same shape, any float dtype.

    Some rows at a time, since their differences are in float32.
    """
    energy = kept = lost = 0.0
    size = max(1, _AT_ONCE * len(merged) // max(1, merged.numel()))
    for parts in zip(base.split(size), merged.split(size), packed.split(size), strict=True):
        before, whole, rounded = (part.float() for part in parts)
        delta, moved = whole - before, rounded - before
        energy += inner_product(delta, delta)
        kept += inner_product(moved, delta)
        error = moved.sub_(delta)
        lost += inner_product(error, error)
    share = sqrt(energy / lost) if lost else inf
    return LayerRetention(name, energy, kept, share)


def overall(layers: Iterable[LayerRetention]) -> float | None:
    """Retention of all layers together, weighted by energy; None where nothing was adapted."""
    items = list(layers)
    energy = sum(item.energy for item in items)
    return sum(item.kept for item in items) / energy if energy else None
