"""The packed ternary layout of Hugging Face BitNet checkpoints, read and written.

`<module>.weight` is uint8 [out / 4, in]: row r holds, from its lowest bits up, the rows r, r + out/4,
r + out/2 and r + 3 out/4 of the weight as code + 1. `<module>.weight_scale` is one float for the whole
tensor. Which way it counts depends on the layer class in `config.json`: `autobitlinear` multiplies
codes by it, `bitlinear` divides by it.

transformers' layers of either class also round their inputs to 8 bits, token by token. That is the
layer's business (`activation_bits` of `IntegerLinear`), not the weight's; a merge can only speak for
models without it.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from qlx.errors import CorruptCheckpoint, InputRefused, Unsupported
from qlx.quant.integers import PackedIntegers, packed_from_codes

__all__ = ["BitnetClass", "bitnet_entries", "packed_from_bitnet"]

BitnetClass = Literal["bitlinear", "autobitlinear"]
_PER_BYTE = 4


def packed_from_bitnet(
    entries: Mapping[str, Tensor], name: str, linear_class: BitnetClass
) -> PackedIntegers:
    """The ternary weight `name` (`….weight`) of a BitNet checkpoint in offline mode.

    Codes that are stored unpacked, as floats -1, 0 and 1, are taken, too, as transformers does.

    Raises:
        CorruptCheckpoint: a part is missing, or a code or the scale is not a possible one.
    """
    stored, scale = _part(entries, name), _part(entries, f"{name}_scale").reshape(1, 1)
    codes = _unpacked(stored) if stored.dtype == torch.uint8 else stored
    if not scale.is_floating_point() or not bool((scale != 0).all()):
        raise CorruptCheckpoint(f"tensor {name + '_scale'!r}: not a scale other than zero")
    scales = scale if linear_class == "autobitlinear" else 1.0 / scale.float()
    if codes.is_floating_point() and not torch.equal(codes, codes.round()):
        raise CorruptCheckpoint(f"tensor {name!r}: not ternary codes, as offline mode has them")
    try:
        return packed_from_codes(codes, scales, scheme="ternary", dtype=scale.dtype)
    except InputRefused as error:
        raise CorruptCheckpoint(f"tensor {name!r}: {error}") from error


def bitnet_entries(
    packed: PackedIntegers,
    name: str,
    linear_class: BitnetClass = "autobitlinear",
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The tensors that hold a ternary weight with one scale in the BitNet layout, by name.

    `dtype` is that of the scale (its own by default). `packed_from_bitnet` gives the same values
    back exactly; a scale that this dtype or class cannot hold is refused.

    Raises:
        Unsupported: not ternary, several scales, rows that are no multiple of 4, or such a scale.
    """
    if packed.scheme != "ternary" or packed.scales.numel() != 1:
        raise Unsupported(f"tensor {name!r}: the BitNet layout holds ternary codes with one scale")
    if packed.shape[0] % _PER_BYTE:
        raise Unsupported(f"tensor {name!r}: {packed.shape[0]} rows are no multiple of {_PER_BYTE}")
    scale = packed.scales.float().reshape(1)
    kept = (scale if linear_class == "autobitlinear" else 1.0 / scale).to(
        dtype or packed.scales.dtype
    )
    entries = {name: _packed(packed.integers()), f"{name}_scale": kept}
    if not torch.equal(packed_from_bitnet(entries, name, linear_class).scales.float()[0], scale):
        raise Unsupported(
            f"tensor {name!r}: its scale has no exact place in a {linear_class} of {kept.dtype}; "
            "train with that scale_dtype"
        )
    return entries


def _part(entries: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in entries:
        raise CorruptCheckpoint(f"tensor {key!r} is missing")
    return entries[key]


def _unpacked(stored: Tensor) -> Tensor:
    """uint8 [rows / 4, in] to codes int8 [rows, in], the value 3 as 2, which no ternary code is."""
    quarters = [(stored >> shift) & 3 for shift in (0, 2, 4, 6)]
    return torch.cat(quarters).to(torch.int8) - 1


def _packed(codes: Tensor) -> Tensor:
    """Codes [rows, in] to uint8 [rows / 4, in]."""
    quarters = (codes + 1).to(torch.uint8).chunk(_PER_BYTE)
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6
