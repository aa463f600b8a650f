"""Weights as places among the codes of a grid, where an adapter can move them from code to code.

A weight that is rounded to a grid lies somewhere between two codes. Its *place* is the number of its code
plus a fraction of a step, -1/2 < fraction < 1/2. An adapter inside the rounding adds a correction to the place;
the weight is then the value of the code nearest to that (LR-QAT, arXiv 2406.06385, equation 8; there as here
the fractions are kept in few bits). So whatever the adapter learns, the weight is one the grid can hold, and packing
it again changes nothing.

NF4's levels are not evenly spaced. Codes are numbered in ascending order of level, and between two levels the
place goes in a straight line from one number to the next.

Scales and zero points of integer codes can be moved, too: whole zero points like codes, rounded and kept inside
the grid. Or codes stay, and something that is the same for all values of a group goes into zero points that are
no whole numbers any more: s (q - z) + C = s (q - (z - C / s)) (QA-LoRA, arXiv 2309.14717, equation 4).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlx.errors import Unsupported
from qlx.quant.bits import pack_integers
from qlx.quant.codec import PackedTensor
from qlx.quant.codec4bit import Packed4bit, levels, pack_codes, unpack_codes
from qlx.quant.integers import PackedIntegers, code_range, materialize

__all__ = ["EXACT_SCHEMES", "Grid", "Move"]

EXACT_SCHEMES = ("nf4", "int8", "int4", "int2", "ternary")
"""The schemes whose codes an adapter can move."""

_PARTS = 256  # of a step, that fractions are counted in
_LARGEST = 127


@dataclass(frozen=True)
class Move:
    """What is done to a weight [out, in] on its grid; None leaves a part as it is. All float32.

    Args:
        correction: [out, in], added to the places of the codes, in steps.
        log_scales: of the scales' shape; scales are multiplied by their exponential.
        zeros: of the scales' shape; added to whole zero points, which are then rounded.
        folded: of the scales' shape; added to every value of a group, by way of its zero point.
    """

    correction: Tensor | None = None
    log_scales: Tensor | None = None
    zeros: Tensor | None = None
    folded: Tensor | None = None


@dataclass(frozen=True)
class Grid:
    """A packed weight [out, in], and where its weights lay before they were rounded.

    `fractions` int8 [out, in] in 1/256 of a step; None where the weight is known by its codes alone.
    """

    packed: PackedTensor
    fractions: Tensor | None

    @classmethod
    def of(cls, packed: PackedTensor, weight: Tensor | None) -> "Grid":
        """The grid of a packed weight; `weight` [out, in] are the values that were rounded, if they are to be had.

        Raises:
            Unsupported: not a matrix on a grid of `EXACT_SCHEMES`.
        """
        if packed.scheme not in EXACT_SCHEMES or len(packed.shape) != 2:
            raise Unsupported(
                f"an adapter inside the rounding takes matrices in {', '.join(EXACT_SCHEMES)}, not {packed.scheme} "
                f"of shape {[*packed.shape]}"
            )
        grid = cls(packed, None)
        if weight is None:
            return grid
        beyond = (grid._place_of(weight.float()) - grid.codes()) * _PARTS
        return cls(packed, beyond.round().clamp(-_LARGEST, _LARGEST).to(torch.int8))

    @property
    def limits(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        if isinstance(self.packed, PackedIntegers):
            return code_range(self.packed.scheme, symmetric=self.packed.zeros is None)
        return 0, 15

    @property
    def step(self) -> float:
        """The mean distance of two neighbouring codes' values."""
        if isinstance(self.packed, PackedIntegers):
            return float(self.packed.scales.double().mean())
        return float(_four_bit(self.packed).absmax.double().mean()) * 2 / 15

    @property
    def has_zeros(self) -> bool:
        """Whether its codes have zero points."""
        return isinstance(self.packed, PackedIntegers) and self.packed.zeros is not None

    @property
    def scale_shape(self) -> tuple[int, ...] | None:
        """The shape of scales that can be learned; None where they are fixed, as NF4's are."""
        return tuple(self.packed.scales.shape) if isinstance(self.packed, PackedIntegers) else None

    def codes(self) -> Tensor:
        """The codes, numbered in ascending order of value, float32 [out, in]."""
        if isinstance(self.packed, PackedIntegers):
            return self.packed.integers()
        packed = _four_bit(self.packed)
        return unpack_codes(packed.codes, packed.count).reshape(packed.shape).float()

    def places(self) -> Tensor:
        """Codes and fractions, float32 [out, in]."""
        codes = self.codes()
        return codes if self.fractions is None else codes.add_(self.fractions, alpha=1 / _PARTS)

    def to(self, device: torch.device) -> "Grid":
        """The same grid on another device."""
        if self.device == device:
            return self
        names = ("codes", "scales", "zeros", "groups", "absmax")
        parts = {name: getattr(self.packed, name, None) for name in names}
        moved = {name: part.to(device) for name, part in parts.items() if part is not None}
        fractions = None if self.fractions is None else self.fractions.to(device)
        return Grid(replace(self.packed, **moved), fractions)  # type: ignore[type-var]

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        codes: Tensor = self.packed.codes  # type: ignore[attr-defined]
        return codes.device

    def values(self, move: Move) -> Tensor:
        """The weight's values once it is moved, float32 [out, in].

        Differentiable: a code or zero point passes the gradient on as if it were not rounded, unless it is pushed
        beyond the end of the grid (the straight-through estimator, arXiv 1308.3432).
        """
        if move.correction is None:
            codes, passed = self.codes(), None
        else:
            codes, passed = self._rounded(self.places() + move.correction)
        if isinstance(self.packed, PackedIntegers):
            scales = self._scales(move.log_scales)
            zeros = self._zeros(scales, move)
            return materialize(
                codes if passed is None else codes + passed, scales, zeros, self.packed.groups
            )
        packed = _four_bit(self.packed)
        level = levels(packed.scheme).to(codes.device)
        slope = torch.gradient(level)[0]
        at = codes.int()
        value = level[at]
        if passed is not None and passed.requires_grad:
            value = value + slope[at] * passed
        return value * _spread(packed)

    def moved(self, move: Move) -> PackedTensor:
        """The packed weight whose values `values` gives, bit for bit."""
        with torch.no_grad():
            places = self.codes() if move.correction is None else self.places() + move.correction
            return self._with(places, move)

    def nearest(self, weight: Tensor) -> PackedTensor:
        """The packed weight with the scales and zeros of this one that is nearest to a weight [out, in]."""
        with torch.no_grad():
            return self._with(self._place_of(weight.float()), Move())

    def _rounded(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """What is nearest inside the grid, and a zero that has the gradient of not rounding."""
        low, high = self.limits
        inside = place.clamp(low - 0.5, high + 0.5)
        return place.detach().round().clamp(low, high), inside - inside.detach()

    def _with(self, places: Tensor, move: Move) -> PackedTensor:
        codes = places.round().clamp(*self.limits)
        if isinstance(self.packed, PackedIntegers):
            packed, scales = pack_integers(codes, self.packed.bits), self._scales(move.log_scales)
            zeros = self._zeros(scales, move)
            if zeros is not None and self.packed.zeros is not None and move.folded is None:
                zeros = zeros.to(self.packed.zeros.dtype)
            return replace(self.packed, codes=packed, scales=scales, zeros=zeros)
        flat = codes.to(torch.uint8).reshape(-1)
        return replace(_four_bit(self.packed), codes=pack_codes(flat, fill=_ZERO))

    def _scales(self, log_scales: Tensor | None) -> Tensor:
        """Scales in their dtype; the exponential is taken in float64, whose last bit no processor's library decides."""
        assert isinstance(self.packed, PackedIntegers)
        scales = self.packed.scales
        if log_scales is None:
            return scales
        return (scales.double() * log_scales.double().exp()).to(scales.dtype)

    def _zeros(self, scales: Tensor, move: Move) -> Tensor | None:
        """Zero points as moved, float32 where something was."""
        assert isinstance(self.packed, PackedIntegers)
        zeros = self.packed.zeros
        if zeros is None:
            return None
        if move.zeros is not None:
            whole, passed = self._rounded(zeros.float() + move.zeros)
            zeros = whole + passed
        if move.folded is None:
            return zeros
        never_zero = torch.where(scales == 0, 1.0, scales.float())  # a group of zeros has scale 0
        return zeros.float() - move.folded / never_zero

    def _place_of(self, weight: Tensor) -> Tensor:
        """The place of every value of a weight, float32 [out, in]."""
        if isinstance(self.packed, PackedIntegers):
            return _integer_place(self.packed, weight)
        packed = _four_bit(self.packed)
        level = levels(packed.scheme).to(weight.device)
        ratio = (weight / _spread(packed)).nan_to_num(0.0, 0.0, 0.0).clamp(-1, 1)
        below = torch.bucketize(ratio, level, right=True).clamp(1, 15) - 1
        return below + (ratio - level[below]) / (level[below + 1] - level[below])


_ZERO = 7  # NF4's code of zero


def _integer_place(packed: PackedIntegers, weight: Tensor) -> Tensor:
    every = torch.ones(packed.shape, device=weight.device)
    places = weight / materialize(every, packed.scales, None, packed.groups)
    places = places.nan_to_num(0.0, 0.0, 0.0)  # a group of zeros has scale 0
    if packed.zeros is None:
        return places
    return places + materialize(every, packed.zeros.float(), None, packed.groups)


def _four_bit(packed: PackedTensor) -> Packed4bit:
    assert isinstance(packed, Packed4bit)
    return packed


def _spread(packed: Packed4bit) -> Tensor:
    """What each value is scaled by, float32 of the weight's shape."""
    every = packed.absmax.repeat_interleave(packed.block_size)[: packed.count]
    return every.reshape(packed.shape)
