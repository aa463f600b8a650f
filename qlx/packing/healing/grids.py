"""The grid that a weight is packed on, apart from how its codes are stored.

Value = scale * level, whatever the scheme: the levels are the integer codes themselves, or the 16
levels of NF4 and FP4. A *position* is weight / scale, which lies between levels; rounding it to the
nearest one is what all of healing does, so it is written here once. A scale serves `width` inputs of
a row, the whole row, or (ternary without groups) the whole tensor.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import cast

import torch
from torch import Tensor

from qlx.checkpoint import QuantSpec
from qlx.quant import (
    FOUR_BIT,
    Packed4bit,
    PackedIntegers,
    PackedTensor,
    levels,
    packed_from_codes,
    quantize_tensor,
    value_unit,
)
from qlx.quant.codec4bit import pack_codes, unpack_codes
from qlx.quant.integers import IntegerScheme, code_range

__all__ = [
    "Grid",
    "grid_of",
    "levels_of",
    "on_grid",
    "row_parts",
    "scales_of",
    "spread",
    "unfilled",
    "with_parts",
]

_PARTS = 8  # that a weight is cut into where its values are made


@dataclass(frozen=True)
class Grid:
    """Ascending `levels` float32 [n]; `even` ones are consecutive integers."""

    levels: Tensor
    even: bool

    @property
    def largest(self) -> float:
        """The largest position that is not clipped, half a step beyond the last level of integers."""
        return float(self.levels[-1]) + (0.5 if self.even else 0.0)

    def rounded(self, positions: Tensor) -> Tensor:
        """The level nearest to each position, float32."""
        if self.even:
            return positions.round().clamp(float(self.levels[0]), float(self.levels[-1]))
        middles = (self.levels[1:] + self.levels[:-1]) / 2
        return self.levels[torch.bucketize(positions, middles)]

    def inside(self, positions: Tensor) -> Tensor:
        """Where a small change of the position can change its level: not beyond the ends, bool."""
        half = 0.5 if self.even else 0.1
        return (positions > self.levels[0] - half) & (positions < self.levels[-1] + half)


@cache
def grid_of(scheme: str) -> Grid:
    """The grid of any scheme that qlx packs to."""
    if scheme in FOUR_BIT:
        return Grid(torch.unique(levels(scheme)), even=False)
    low, high = code_range(cast(IntegerScheme, scheme), symmetric=True)
    return Grid(torch.arange(low, high + 1).float(), even=True)


def spread(scales: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Scales [rows or 1, n] as a view [rows, n, inputs of a scale] that multiplies a weight cut that way."""
    rows, columns = shape
    count = scales.shape[1]
    return scales[..., None].expand(rows, count, columns // count)


def on_grid(chosen: Tensor, scales: Tensor) -> Tensor:
    """Levels [out, in] times their scales [out or 1, n]: the weight's values, float32 [out, in]."""
    shape = (int(chosen.shape[0]), int(chosen.shape[1]))
    cut = spread(scales.float(), shape)
    return (chosen.reshape(cut.shape) * cut).reshape(shape)


def levels_of(packed: PackedTensor) -> Tensor:
    """The level of every value of a packed weight, float32 [out, in]."""
    if isinstance(packed, PackedIntegers):
        return packed.integers()
    assert isinstance(packed, Packed4bit)
    codes = unpack_codes(packed.codes, packed.count)
    return levels(packed.scheme)[codes.int()].reshape(packed.shape)


def row_parts(packed: PackedTensor) -> Iterator[slice]:
    """The rows of a packed weight in parts for `packed_rows`, so that nothing of the weight's size is made."""
    rows, unit = packed.shape[0], value_unit(packed)
    size = -(-rows // (_PARTS * unit)) * unit
    return (slice(at, min(at + size, rows)) for at in range(0, rows, size))


def scales_of(packed: PackedTensor) -> Tensor:
    """The scales of a packed weight, [out or 1, n]."""
    if isinstance(packed, PackedIntegers):
        return packed.scales
    assert isinstance(packed, Packed4bit)
    return packed.absmax.reshape(packed.shape[0], -1)


def with_parts(packed: PackedTensor, chosen: Tensor, scales: Tensor | None = None) -> PackedTensor:
    """The same weight with other levels [out, in], and of integers with other `scales`, in their dtype.

    The scales of 4-bit schemes stay the codec's.

    Raises:
        InputRefused: a scale is not finite in its dtype.
    """
    if isinstance(packed, PackedIntegers):
        kept = packed.scales if scales is None else scales.to(packed.scales.dtype)
        return packed_from_codes(
            chosen,
            kept.contiguous(),
            scheme=packed.scheme,
            dtype=packed.dtype,
            group_size=packed.group_size,
        )
    assert isinstance(packed, Packed4bit)
    ascending, order = torch.sort(levels(packed.scheme), stable=True)
    codes = order[torch.searchsorted(ascending, chosen.reshape(-1).contiguous())]
    return replace(packed, codes=pack_codes(codes.to(torch.uint8)))


def unfilled(weight: Tensor, spec: QuantSpec, scales: Tensor | None) -> PackedTensor:
    """A packed weight of the form that `spec` says, whose levels are still to be chosen.

    4-bit schemes have the codec's own scales, double quantization included; integers take `scales`.
    """
    if scales is None:
        return quantize_tensor(weight, spec)
    return packed_from_codes(
        torch.zeros_like(weight),
        scales,
        scheme=cast(IntegerScheme, spec.scheme),
        dtype=weight.dtype,
        group_size=spec.group_size,
    )
