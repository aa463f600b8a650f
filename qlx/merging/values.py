"""The value of one merged tensor, and how much of its delta the rounding took.

The formulas of the delta are in `qlx.adapters`, those of the codec in `qlx.quant`; this module
only applies them in the order that training did, in fp32, and rounds once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from qlx.checkpoint import QuantSpec
from qlx.errors import CheckFailed, Mismatch
from qlx.merging.change import Change
from qlx.merging.coded import CodedWeights
from qlx.merging.plan import NO_EFFECT, MergePlan
from qlx.merging.stream import load_tensor
from qlx.models import STORED_DTYPE, torch_float
from qlx.quant import (
    Grid,
    PackedTensor,
    dequantize_tensor,
    packed_fingerprint,
    quantize_rows,
    quantize_tensor,
    row_unit,
)
from qlx.verification import shown
from qlx.weights import WeightSet, read_rows

__all__ = [
    "MAX_ERASED",
    "Rounding",
    "as_loaded",
    "as_trained",
    "base_value",
    "check_codes",
    "check_effect",
    "erased_share",
    "exact_codes",
    "inner_product",
    "left_alone",
    "require_codes",
    "stored_dtype",
]

MAX_ERASED = 0.5
"""The largest share of an adapter's weight change that rounding may take before a merge is refused."""

_ADVICE = "merge with --dtype float32, or accept the loss with --allow-erased SHARE"

_CODEC_VALUES = 2**18  # a codec's temporaries take about 20 bytes for each


@dataclass(frozen=True)
class Rounding:
    """What rounding one merged tensor did to its delta.

    `energy` is ⟨Δ, Δ⟩, `kept` ⟨written - base, Δ⟩, both over the fp32 delta Δ; `changed` says
    whether any written value differs from the base's; `whole` that the tensor was trained whole, its
    delta being the difference from the base.
    """

    name: str
    energy: float
    kept: float
    changed: bool
    whole: bool = False

    @property
    def erased(self) -> float:
        """The share of the delta that is lost, 0 (nothing) to 1 (all of it)."""
        return erased_share([self])


def erased_share(roundings: Iterable[Rounding]) -> float:
    """The share of several deltas lost together, weighted by energy: 1 - Σ kept / Σ energy, at least 0."""
    items = list(roundings)
    energy = sum(item.energy for item in items)
    return max(0.0, 1.0 - sum(item.kept for item in items) / energy) if energy else 1.0


def as_loaded(weights: WeightSet, spec: QuantSpec, name: str) -> Tensor:
    """A tensor of the base in the dtype that training loaded it in (before any quantization)."""
    stored = load_tensor(weights, name)
    return stored.to(stored_dtype(spec)) if stored.is_floating_point() else stored


def stored_dtype(spec: QuantSpec) -> torch.dtype:
    """The dtype that training loaded the base in."""
    return torch_float(str(spec.extras.get(STORED_DTYPE, "float32")))


def as_trained(weights: WeightSet, spec: QuantSpec, name: str) -> Tensor:
    """The fp32 value that training saw of a tensor: loaded in its dtype, and through its codec."""
    if name in spec.tensors:
        return dequantize_tensor(codes_as_trained(weights, spec, name), torch.float32)
    return as_loaded(weights, spec, name).float()


def codes_as_trained(weights: WeightSet, spec: QuantSpec, name: str) -> PackedTensor:
    """The codes that training saw of a quantized tensor: those of the files, or made as it made them."""
    if isinstance(weights, CodedWeights) and name in weights.coded:
        return weights.packed(name)
    shape, dtype = weights[name].shape, stored_dtype(spec)
    unit = row_unit(shape, spec)
    if unit is None:
        return quantize_tensor(as_loaded(weights, spec, name), spec)
    rows = max(unit, _CODEC_VALUES // prod(shape[1:]) // unit * unit)
    return quantize_rows(lambda cut: read_rows(weights, name, cut).to(dtype), shape, spec, rows)


def exact_codes(plan: MergePlan, change: Change) -> PackedTensor:
    """The codes and scales that an exact adapter leaves of a tensor: those that training ended with."""
    assert change.exact is not None
    weights, name = plan.weights, change.source
    coded = isinstance(weights, CodedWeights) and name in weights.coded
    weight = None if coded else as_loaded(weights, plan.spec, name)
    return change.exact.applied(Grid.of(codes_as_trained(weights, plan.spec, name), weight))


def base_value(plan: MergePlan, change: Change) -> Tensor:
    """The fp32 value that a delta is added to: trained whole, as training saw it, or as stored."""
    if change.value is not None:
        return change.value.float()
    if change.as_trained:
        return as_trained(plan.weights, plan.spec, change.source)
    return load_tensor(plan.weights, change.source).float()


def inner_product(left: Tensor, right: Tensor) -> float:
    """⟨left, right⟩ of two fp32 tensors of one shape, summed in float64."""
    return float((left * right).sum(dtype=torch.float64))


def left_alone(roundings: Iterable[Rounding]) -> list[str]:
    """The tensors whose update turned out to be zero in fp32, by name."""
    return [item.name for item in roundings if not item.changed and not item.energy]


def check_effect(roundings: Iterable[Rounding], limit: float, dtype: str) -> float:
    """Check that the adapter arrived: what it moves has moved, and little enough was lost.

    A `limit` of 1 allows any loss, that of whole tensors included, as long as some tensor changed.
    Tensors whose update is zero do not count; see `left_alone`.

    Returns:
        The share of the delta lost to rounding: over all low-rank updates together, or of the
        worst tensor that was trained whole, whichever is larger.

    Raises:
        CheckFailed: the adapter has no effect, a tensor's update is erased altogether, or more than
            `limit` of the delta is.
    """
    items = [item for item in roundings if item.changed or item.energy]
    if not items:
        raise CheckFailed(NO_EFFECT)
    _check_arrived(items, limit, dtype)
    low_rank = [item for item in items if not item.whole]
    shares = [item.erased for item in items if item.whole]
    erased = max([erased_share(low_rank), *shares] if low_rank else shares)
    if erased > limit:
        worst = max(items, key=lambda item: item.erased)
        share, allowed = shown(100 * erased, 100 * limit)
        raise CheckFailed(
            f"rounding to {dtype} would erase {share}% of the adapter's change (limit {allowed}%, "
            f"worst {worst.name!r} {worst.erased:.0%}); {_ADVICE}"
        )
    return erased


def _check_arrived(items: Sequence[Rounding], limit: float, dtype: str) -> None:
    """Check that no update was erased altogether, which only a limit of 1 allows, and never of all."""
    erased = [item.name for item in items if not item.changed]
    every = len(erased) == len(items)
    if not erased or (limit >= 1 and not every):
        return
    wider = "" if dtype == "float32" else "merge with --dtype float32"
    accept = "" if every else "accept it with --allow-erased 1"
    advice = ", or ".join(filter(None, (wider, accept))) or "its values are too small for any dtype"
    raise CheckFailed(
        f"rounding to {dtype} would erase the adapter's change of {len(erased)} of {len(items)} "
        f"tensors altogether (first {erased[0]!r}); {advice}"
    )


def require_codes(plan: MergePlan) -> None:
    """Check that quantizing the base gives the very codes and scales that training saw.

    Nothing is checked where the merge is onto the original base or the record has no fingerprint.

    Raises:
        Mismatch: the codes differ.
    """
    spec = plan.spec
    if plan.onto == "original" or spec.fingerprint is None:
        return
    check_codes(
        plan,
        packed_fingerprint(
            (name, codes_as_trained(plan.weights, spec, name)) for name in spec.tensors
        ),
    )


def check_codes(plan: MergePlan, found: str | None) -> None:
    """Check the fingerprint of the base's codes against the record, as `require_codes` does.

    Raises:
        Mismatch: it is another one.
    """
    spec = plan.spec
    if plan.onto == "original" or spec.fingerprint is None:
        return
    if found != spec.fingerprint:
        found = found or "sha256:no codes at"
        raise Mismatch(
            f"{plan.weights.directory}: quantizes to other codes than training saw ({found[7:19]}…, "
            f"recorded {spec.fingerprint[7:19]}…); the quantization or its library differs"
        )
