"""The scales that merged values are multiples of, kept beside them: `grid.safetensors`.

A merge of a packed-exact adapter writes floats. With the scales beside them their codes can be told exactly, in 16
bits too, because neighbouring values of a grid lie further apart than rounding to bfloat16 moves them.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qlx.checkpoint import QuantSpec
from qlx.errors import CorruptCheckpoint
from qlx.quant.bits import pack_integers
from qlx.quant.codec import PackedTensor
from qlx.quant.codec4bit import NestedScales, Packed4bit, dynamic_map, pack_codes, unnest_scales
from qlx.quant.grid import Grid
from qlx.quant.integers import BITS, PackedIntegers

__all__ = ["GRID_FILE", "grid_entries", "grid_names", "packed_on_grid"]

GRID_FILE = "grid.safetensors"

_INTEGERS = ("scales", "zeros", "groups")
_NESTED = ("codes", "absmax", "offset")


def grid_entries(packed: PackedTensor, name: str) -> dict[str, Tensor]:
    """What belongs to the weight `name` beside its codes, by the names it has in the file."""
    if isinstance(packed, PackedIntegers):
        parts = {part: getattr(packed, part) for part in _INTEGERS}
    else:
        assert isinstance(packed, Packed4bit)
        nested = packed.nested
        parts = {"absmax": packed.absmax} if nested is None else {}
        parts |= {f"nested_{part}": getattr(nested, part) for part in _NESTED} if nested else {}
    return {f"{name}.{part}": value for part, value in parts.items() if value is not None}


def grid_names(stored: Mapping[str, object], name: str) -> list[str]:
    """The names of the weight's tensors that are in the file."""
    parts = (*_INTEGERS, "absmax", *(f"nested_{part}" for part in _NESTED))
    return [f"{name}.{part}" for part in parts if f"{name}.{part}" in stored]


def packed_on_grid(
    entries: Mapping[str, Tensor], name: str, weight: Tensor, spec: QuantSpec
) -> PackedTensor:
    """The codes of values [out, in] that lie on a grid; `spec` says of which scheme and groups.

    Raises:
        CorruptCheckpoint: scales are missing, or a value is none that the grid holds.
    """
    parts = {key.removeprefix(f"{name}."): value for key, value in entries.items()}
    try:
        empty = (
            _integers(parts, weight, spec)
            if spec.scheme in BITS
            else _four_bit(parts, weight, spec)
        )
        found = Grid(empty, None).nearest(weight)
    except (KeyError, ValueError, RuntimeError) as error:
        raise CorruptCheckpoint(
            f"{GRID_FILE}: what it holds of {name!r} does not fit the weight ({error}); merge again"
        ) from error
    if not torch.equal(found.values().to(weight.dtype), weight):
        raise CorruptCheckpoint(
            f"tensor {name!r} does not lie on the grid that {GRID_FILE} holds for it, so one of the two was changed; "
            "merge again"
        )
    return found


def _integers(parts: Mapping[str, Tensor], weight: Tensor, spec: QuantSpec) -> PackedIntegers:
    rows, columns = (int(size) for size in weight.shape)
    scheme = spec.scheme
    assert scheme is not None
    return PackedIntegers(
        codes=pack_integers(torch.zeros(rows, columns), BITS[scheme]),  # type: ignore[index]
        scales=parts["scales"],
        zeros=parts.get("zeros"),
        groups=parts.get("groups"),
        shape=(rows, columns),
        dtype=weight.dtype,
        scheme=scheme,  # type: ignore[arg-type]
        group_size=spec.group_size,
    )


def _four_bit(parts: Mapping[str, Tensor], weight: Tensor, spec: QuantSpec) -> Packed4bit:
    nested = None
    if spec.double_quant:
        codes, absmax, offset = (parts[f"nested_{part}"] for part in _NESTED)
        nested = NestedScales(codes, absmax, offset.reshape(()), dynamic_map())
    return Packed4bit(
        codes=pack_codes(torch.zeros(weight.numel(), dtype=torch.uint8)),
        absmax=parts["absmax"] if nested is None else unnest_scales(nested),
        nested=nested,
        shape=tuple(weight.shape),
        dtype=weight.dtype,
        scheme="nf4",
        block_size=spec.group_size or 64,
    )
