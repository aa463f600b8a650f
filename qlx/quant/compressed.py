"""Integer codes in the layout of the library compressed-tensors, format `pack-quantized`.

For a weight [out, in] of b bits: `<module>.weight_packed` int32 [out, ceil(in * b / 32)] holds a row's
codes from the lowest bits up, each as the unsigned number q + 2^(b-1); `<module>.weight_scale` has a
scale for each group [out, groups], row [out, 1] or tensor [1]; `<module>.weight_shape` int64 is
[out, in]. The order of bits is that of `qlx.quant.bits`, so bytes are carried over as they are.

Zero points are a fourth tensor, `<module>.weight_zero_point`. Whole ones are packed as codes are, but down
the columns: int32 [ceil(out * b / 32), groups]. transformers (5.23 with compressed-tensors 0.20) finds
them unpacked where it builds layers of codes, and packed where it unpacks while loading, so the
configuration asks for that (`dequantize`). Fractional ones are float32 [out, groups] as they are, which the
library has for the strategy `block` only: blocks of one row and a group of inputs.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from qlx.checkpoint import QuantSpec
from qlx.errors import CorruptCheckpoint, InputRefused, Unsupported
from qlx.quant.bits import pack_integers, row_bytes
from qlx.quant.integers import BITS, IntegerScheme, PackedIntegers, packed_from_codes
from qlx.quant.words import unpack_words

__all__ = [
    "COMPRESSED_PARTS",
    "ZERO_POINTS",
    "compressed_entries",
    "compressed_scheme",
    "compressed_section",
    "packed_from_compressed",
]

COMPRESSED_PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
"""What follows a module's name in the names of the tensors that make up its weight; not all have zeros."""

ZERO_POINTS = "zero_points"
"""Key in `QuantSpec.extras`: the dtype of zero points that are no whole numbers (`float32`)."""

_ZEROS = "weight_zero_point"

_WORD = 4  # bytes


def compressed_scheme(bits: int, *, symmetric: bool) -> IntegerScheme:
    """The scheme of codes of so many bits; those of 2 are taken for ternary where they are symmetric.

    Raises:
        Unsupported: other than 2, 4 or 8 bits.
    """
    schemes: dict[int, IntegerScheme] = {
        8: "int8",
        4: "int4",
        2: "ternary" if symmetric else "int2",
    }
    if bits not in schemes:
        raise Unsupported(f"compressed-tensors weights of {bits} bits; 2, 4 and 8 can be read")
    return schemes[bits]


def compressed_entries(packed: PackedIntegers, name: str) -> dict[str, Tensor]:
    """The tensors to store for the weight `name` (`….weight`); `packed_from_compressed` is the inverse.

    Raises:
        Unsupported: inputs whose groups are no equal runs.
    """
    if packed.groups is not None:
        raise Unsupported(f"tensor {name!r}: reordered groups have no place in this layout")
    stem = name.removesuffix("weight")
    scales = packed.scales.reshape(1) if _one_scale(packed) else packed.scales
    zeros = None if packed.zeros is None else _stored_zeros(packed.zeros, packed.bits)
    parts = (_in_words(packed.codes), scales.contiguous(), zeros, torch.tensor(packed.shape))
    named = zip(COMPRESSED_PARTS, parts, strict=True)
    return {f"{stem}{part}": tensor for part, tensor in named if tensor is not None}


def _in_words(codes: Tensor) -> Tensor:
    """Bytes [rows, n] as int32 words [rows, n / 4], the last filled up with zeros."""
    missing = -codes.shape[1] % _WORD
    return torch.nn.functional.pad(codes, (0, missing)).contiguous().view(torch.int32)


def _stored_zeros(zeros: Tensor, bits: int) -> Tensor:
    """Zero points [out, groups] as the layout has them."""
    if zeros.is_floating_point():
        return zeros.contiguous()
    return _in_words(pack_integers(zeros.T, bits)).T.contiguous()


def _read_zeros(stored: Tensor | None, scales: Tensor, bits: int) -> Tensor | None:
    """Zero points as `PackedIntegers` has them from what the layout has: packed words, or one for each scale."""
    if stored is None or stored.dtype != torch.int32 or stored.ndim != 2:
        stored = stored if stored is None or stored.numel() > 1 else stored.reshape(1, 1)
        return stored if stored is None or stored.is_floating_point() else stored.to(torch.int8)
    unsigned = unpack_words(stored.T.contiguous(), bits)[:, : scales.shape[0]].T
    return (unsigned - (1 << (bits - 1))).to(torch.int8)


def _one_scale(packed: PackedIntegers) -> bool:
    return packed.scheme == "ternary" and packed.group_size is None


def packed_from_compressed(
    entries: Mapping[str, Tensor],
    name: str,
    *,
    bits: int,
    group_size: int | None,
    other_bits: Iterable[int] = (),
    symmetric: bool = True,
) -> PackedIntegers:
    """The weight `name` (`….weight`) whose parts lie beside it as `….weight_packed` and so on.

    Its codes are of `bits`, or of one of `other_bits`: the sizes of the parts tell which.

    Raises:
        CorruptCheckpoint: a part is missing, or sizes, types or codes do not fit.
        Unsupported: other than 2, 4 or 8 bits.
    """
    schemes = {
        count: compressed_scheme(count, symmetric=symmetric) for count in (bits, *other_bits)
    }
    stem = name.removesuffix("weight")
    needed = [part for part in COMPRESSED_PARTS if part != _ZEROS or not symmetric]
    found = {part: _part(entries, f"{stem}{part}") for part in needed}
    words, scales, shape = (found[part] for part in COMPRESSED_PARTS if part != _ZEROS)
    rows, columns = (int(size) for size in shape.reshape(-1)) if shape.numel() == 2 else (0, 0)
    if words.dtype != torch.int32 or not scales.is_floating_point():
        raise CorruptCheckpoint(f"tensor {name!r}: codes {words.dtype}, scales {scales.dtype}")
    fitting = [b for b in schemes if [*words.shape] == [rows, -(-row_bytes(columns, b) // _WORD)]]
    if words.ndim != 2 or len(fitting) != 1:
        raise CorruptCheckpoint(
            f"tensor {name!r}: codes {[*words.shape]} do not fit the shape {[rows, columns]}"
        )
    (count,) = fitting
    codes = unpack_words(words, count)[:, :columns] - (1 << (count - 1))
    try:
        return packed_from_codes(
            codes,
            scales.reshape(1, 1) if scales.numel() == 1 else scales,
            scheme=schemes[count],
            dtype=scales.dtype,
            zeros=_read_zeros(found.get(_ZEROS), scales, count),
            group_size=group_size,
        )
    except InputRefused as error:
        raise CorruptCheckpoint(f"tensor {name!r}: {error}") from error


def _part(entries: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in entries:
        raise CorruptCheckpoint(f"tensor {key!r} is missing")
    return entries[key]


def compressed_section(
    spec: QuantSpec, ignored: Iterable[str], promoted: Mapping[str, str] | None = None
) -> dict[str, object]:
    """The `quantization_config` of weights that `compressed_entries` wrote.

    `ignored` names (in memory) the linear modules that are not quantized, `promoted` those that are of
    another scheme than `spec`, which they map to. The library takes the most precise name for a layer:
    its own before `Linear`.
    """
    assert spec.scheme in BITS
    own = _group(spec.scheme, spec.group_size, ["Linear"])
    if spec.symmetric is False:
        own["weights"] = {**own["weights"], **_with_zeros(spec)}
    groups = {"group_0": own}
    others = sorted({*(promoted or {}).values()}, key=lambda scheme: BITS[_known(scheme)])
    for at, scheme in enumerate(others, 1):
        names = sorted(name for name, own in (promoted or {}).items() if own == scheme)
        groups[f"group_{at}"] = _group(_known(scheme), spec.group_size, names)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(ignored),
        **({"dequantize": True} if _packs_zeros(spec) else {}),
    }


def _packs_zeros(spec: QuantSpec) -> bool:
    return spec.symmetric is False and ZERO_POINTS not in spec.extras


def _with_zeros(spec: QuantSpec) -> dict[str, object]:
    """What zero points change in the description of weights."""
    if _packs_zeros(spec):
        return {"symmetric": False}
    blocks = {"strategy": "block", "group_size": None, "block_structure": [1, spec.group_size]}
    return {"symmetric": False, **blocks, "zp_dtype": f"torch.{spec.extras[ZERO_POINTS]}"}


def _known(scheme: str) -> IntegerScheme:
    return next(known for known in BITS if known == scheme)


def _group(scheme: IntegerScheme, group_size: int | None, targets: list[str]) -> dict[str, Any]:
    """One entry of `config_groups`: a scheme, and the layers that have it."""
    whole = "tensor" if scheme == "ternary" else "channel"
    weights: dict[str, object] = {
        "num_bits": BITS[scheme],
        "type": "int",
        "symmetric": True,
        "strategy": whole if group_size is None else "group",
        "group_size": group_size,
        "dynamic": False,
    }
    return {"targets": targets, "weights": weights}
