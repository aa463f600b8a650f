"""Integer codes in the layout of the library compressed-tensors, format `pack-quantized`.

For a weight [out, in] of b bits: `<module>.weight_packed` int32 [out, ceil(in * b / 32)] holds a row's
codes from the lowest bits up, each as the unsigned number q + 2^(b-1); `<module>.weight_scale` has a
scale for each group [out, groups], row [out, 1] or tensor [1]; `<module>.weight_shape` int64 is
[out, in]. The order of bits is that of `qlx.quant.bits`, so bytes are carried over as they are.

The layout also has zero points, but transformers (5.23 with compressed-tensors 0.20) cannot load
them: it expects them unpacked and finds them packed. So codes are symmetric here.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from qlx.checkpoint import QuantSpec
from qlx.errors import CorruptCheckpoint, InputRefused, Unsupported
from qlx.quant.bits import row_bytes
from qlx.quant.integers import BITS, IntegerScheme, PackedIntegers, packed_from_codes
from qlx.quant.words import unpack_words

__all__ = [
    "COMPRESSED_PARTS",
    "compressed_entries",
    "compressed_scheme",
    "compressed_section",
    "packed_from_compressed",
]

COMPRESSED_PARTS = ("weight_packed", "weight_scale", "weight_shape")
"""What follows a module's name in the names of the tensors that make up its weight."""

_WORD = 4  # bytes


def compressed_scheme(bits: int) -> IntegerScheme:
    """The scheme of codes of so many bits; those of 2 are taken for ternary.

    Raises:
        Unsupported: other than 2, 4 or 8 bits.
    """
    schemes = {count: scheme for scheme, count in BITS.items()}
    if bits not in schemes:
        raise Unsupported(f"compressed-tensors weights of {bits} bits; 2, 4 and 8 can be read")
    return schemes[bits]


def compressed_entries(packed: PackedIntegers, name: str) -> dict[str, Tensor]:
    """The tensors to store for the weight `name` (`….weight`); `packed_from_compressed` is the inverse.

    Raises:
        Unsupported: zero points, or inputs whose groups are no equal runs.
    """
    if packed.zeros is not None or packed.groups is not None:
        raise Unsupported(
            f"tensor {name!r}: zero points and reordered groups cannot be loaded by transformers "
            "in this layout"
        )
    stem = name.removesuffix("weight")
    missing = -packed.codes.shape[1] % _WORD
    words = torch.nn.functional.pad(packed.codes, (0, missing)).contiguous().view(torch.int32)
    scales = packed.scales.reshape(1) if _one_scale(packed) else packed.scales
    parts = (words, scales.contiguous(), torch.tensor(packed.shape))
    return {f"{stem}{part}": tensor for part, tensor in zip(COMPRESSED_PARTS, parts, strict=True)}


def _one_scale(packed: PackedIntegers) -> bool:
    return packed.scheme == "ternary" and packed.group_size is None


def packed_from_compressed(
    entries: Mapping[str, Tensor],
    name: str,
    *,
    bits: int,
    group_size: int | None,
    other_bits: Iterable[int] = (),
) -> PackedIntegers:
    """The weight `name` (`….weight`) whose parts lie beside it as `….weight_packed` and so on.

    Its codes are of `bits`, or of one of `other_bits`: the sizes of the parts tell which.

    Raises:
        CorruptCheckpoint: a part is missing, or sizes, types or codes do not fit.
        Unsupported: other than 2, 4 or 8 bits.
    """
    schemes = {count: compressed_scheme(count) for count in (bits, *other_bits)}
    stem = name.removesuffix("weight")
    words, scales, shape = (_part(entries, f"{stem}{part}") for part in COMPRESSED_PARTS)
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
    groups = {"group_0": _group(spec.scheme, spec.group_size, ["Linear"])}
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
    }


def _known(scheme: str) -> IntegerScheme:
    return next(known for known in BITS if known == scheme)


def _group(scheme: IntegerScheme, group_size: int | None, targets: list[str]) -> dict[str, object]:
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
