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
    """Measure one layer; all three are the weight's values, same shape, any float dtype."""
    delta, moved = merged.float() - base.float(), packed.float() - base.float()
    error = moved - delta
    energy, lost = inner_product(delta, delta), inner_product(error, error)
    share = sqrt(energy / lost) if lost else inf
    return LayerRetention(name, energy, inner_product(moved, delta), share)


def overall(layers: Iterable[LayerRetention]) -> float | None:
    """Retention of all layers together, weighted by energy; None where nothing was adapted."""
    items = list(layers)
    energy = sum(item.energy for item in items)
    return sum(item.kept for item in items) / energy if energy else None
