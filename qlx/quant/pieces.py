"""Quantizing a weight some rows at a time, and the values of some rows of a packed one.

A codec's temporaries are several times the weight. Most schemes treat groups of values apart from
each other, so rows can go through one after the other; what is kept is the codes. Codes, scales and
values are those of `quantize_tensor`, bit for bit.
"""

from collections.abc import Callable
from dataclasses import replace
from math import gcd, lcm, prod

import torch
from torch import Tensor

from qlx.checkpoint import QuantSpec
from qlx.quant.codec import PackedTensor, quantize_tensor
from qlx.quant.codec4bit import FOUR_BIT, Packed4bit, nest_scales, unnest_scales
from qlx.quant.integers import PackedIntegers

__all__ = ["packed_rows", "quantize_rows", "row_unit", "value_unit"]


def row_unit(shape: tuple[int, ...], spec: QuantSpec) -> int | None:
    """How many rows of a weight can be quantized apart from the others; None if only all together.

    Any multiple of the number can. Rows share a scale where the groups of a 4-bit scheme run across
    them, and all of them do where a ternary tensor has one scale.
    """
    if spec.scheme in FOUR_BIT:
        return _whole_groups(shape, spec.group_size or 64)
    return None if spec.scheme == "ternary" and spec.group_size is None else 1


def _whole_groups(shape: tuple[int, ...], group: int) -> int:
    together = lcm(group, 2)  # two codes share a byte
    return together // gcd(together, prod(shape[1:]))


def quantize_rows(
    read: Callable[[slice], Tensor], shape: tuple[int, ...], spec: QuantSpec, rows: int
) -> PackedTensor:
    """`quantize_tensor` of a weight of which `read` gives any rows, `rows` at a time.

    `rows` is a multiple of `row_unit`.

    Raises:
        Unsupported, InputRefused: as `quantize_tensor`.
    """
    single = spec.model_copy(update={"double_quant": False})
    starts = range(0, shape[0], rows)
    parts = [quantize_tensor(read(slice(at, min(at + rows, shape[0]))), single) for at in starts]
    first = parts[0]
    if isinstance(first, Packed4bit):
        return _joined_4bit([p for p in parts if isinstance(p, Packed4bit)], shape, spec)
    assert isinstance(first, PackedIntegers)
    return _joined_integers([p for p in parts if isinstance(p, PackedIntegers)])


def _joined_4bit(parts: list[Packed4bit], shape: tuple[int, ...], spec: QuantSpec) -> Packed4bit:
    absmax = torch.cat([part.absmax for part in parts])
    nested = nest_scales(absmax) if spec.double_quant else None
    return replace(
        parts[0],
        codes=torch.cat([part.codes for part in parts]),
        absmax=absmax if nested is None else unnest_scales(nested),
        nested=nested,
        shape=shape,
    )


def _joined_integers(parts: list[PackedIntegers]) -> PackedIntegers:
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return replace(
        parts[0],
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zeros=torch.cat(zeros) if zeros else None,
        shape=(sum(part.shape[0] for part in parts), parts[0].shape[1]),
    )


def value_unit(packed: PackedTensor) -> int:
    """The number of which `packed_rows` takes multiples (the last rows of a weight may be fewer)."""
    return _whole_groups(packed.shape, packed.block_size) if isinstance(packed, Packed4bit) else 1


def packed_rows(packed: PackedTensor, rows: slice) -> PackedTensor:
    """Some rows of a packed weight, for their values; start is a multiple of `value_unit`."""
    count = rows.stop - rows.start
    if isinstance(packed, Packed4bit):
        width, block = prod(packed.shape[1:]), packed.block_size
        start, stop = rows.start * width, rows.stop * width
        return replace(
            packed,
            codes=packed.codes[start // 2 : -(-stop // 2)],
            absmax=packed.absmax[start // block : -(-stop // block)],
            nested=None,
            shape=(count, *packed.shape[1:]),
        )
    assert isinstance(packed, PackedIntegers)
    one_each = packed.scales.shape[0] == packed.shape[0]
    picked = rows if one_each else slice(None)
    return replace(
        packed,
        codes=packed.codes[rows],
        scales=packed.scales[picked],
        zeros=None if packed.zeros is None else packed.zeros[picked],
        shape=(count, packed.shape[1]),
    )
