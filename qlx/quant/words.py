"""Weights of GPTQ and AWQ checkpoints: unsigned codes in 32-bit words, read into `PackedIntegers`.

Both store, for a weight [out, in] in groups of inputs, `qweight`, `qzeros` and `scales` [groups, out],
with value = scale * (code - zero).

- *GPTQ* (arXiv 2210.17323): `qweight` int32 [in * bits / 32, out] holds consecutive inputs from the
  lowest bits up, `qzeros` int32 [groups, out * bits / 32] consecutive outputs, and `g_idx` [in] the
  group of each input, in any order after `desc_act`. The first format stores zero - 1, `gptq_v2` the
  zero itself.
- *AWQ* (arXiv 2306.00978), version gemm: `qweight` int32 [in, out / 8] and `qzeros` [groups, out / 8]
  hold eight outputs in the order 0, 2, 4, 6, 1, 3, 5, 7.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qlx.errors import CorruptCheckpoint, InputRefused, Unsupported
from qlx.quant.integers import BITS, IntegerScheme, PackedIntegers, packed_from_codes

__all__ = ["packed_from_awq", "packed_from_gptq", "scheme_of_bits", "unpack_words"]

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_SCHEMES: dict[int, IntegerScheme] = {2: "int2", 4: "int4", 8: "int8"}


def scheme_of_bits(method: str, bits: int) -> IntegerScheme:
    """The integer scheme of a method's codes.

    Raises:
        Unsupported: AWQ with other than 4 bits, GPTQ with other than 2, 4 and 8.
    """
    if bits not in _SCHEMES or (method == "awq" and bits != 4):
        reasons = {
            3: "3-bit codes lie across words",
            8: "AWQ defines 4-bit codes only",
        }
        reason = reasons.get(bits, "no such codes are known")
        raise Unsupported(f"{method} with {bits} bits is not supported: {reason}")
    return _SCHEMES[bits]


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Unsigned codes of int32 [rows, n], lowest bits first, as int16 [rows, n * 32 / bits]."""
    shifts = torch.arange(0, 32, bits, device=words.device)
    codes = (words[..., None].long() >> shifts) & ((1 << bits) - 1)
    return codes.reshape(words.shape[0], -1).to(torch.int16)


def packed_from_gptq(
    entries: Mapping[str, Tensor],
    name: str,
    *,
    bits: int,
    symmetric: bool,
    zeros_less_one: bool = True,
) -> PackedIntegers:
    """The weight `name` (`….weight`) whose parts lie beside it as `….qweight` and so on.

    `zeros_less_one` is the first format's way to store zero points. Where the codes are symmetric
    the zero point is known, 2^(bits - 1), and stored either way, whatever the format is called.

    Raises:
        CorruptCheckpoint: a part is missing or sizes do not fit.
        Unsupported: the bits (see `scheme_of_bits`), or a zero point that readers disagree about.
    """
    scheme, stem = scheme_of_bits("gptq", bits), name.removesuffix(".weight")
    words, stored, scales = _parts(entries, stem)
    codes = unpack_words(words.T, bits)
    zeros = _gptq_zeros(unpack_words(stored, bits), bits, symmetric, zeros_less_one, stem)
    groups = _groups(entries.get(f"{stem}.g_idx"), codes.shape[1], scales.shape[0], stem)
    return _packed(codes, zeros, scales, groups, scheme, stem)


def packed_from_awq(entries: Mapping[str, Tensor], name: str, *, bits: int = 4) -> PackedIntegers:
    """The weight `name` (`….weight`) whose parts lie beside it as `….qweight` and so on.

    Raises:
        CorruptCheckpoint: a part is missing or sizes do not fit.
        Unsupported: other than 4 bits.
    """
    scheme, stem = scheme_of_bits("awq", bits), name.removesuffix(".weight")
    words, stored, scales = _parts(entries, stem)
    codes, zeros = (_deinterleaved(unpack_words(part, bits)) for part in (words, stored))
    return _packed(codes.T, zeros, scales, None, scheme, stem)


def _parts(entries: Mapping[str, Tensor], stem: str) -> tuple[Tensor, Tensor, Tensor]:
    found = []
    for part in ("qweight", "qzeros", "scales"):
        key = f"{stem}.{part}"
        if key not in entries:
            raise CorruptCheckpoint(f"tensor {key!r} is missing")
        tensor = entries[key]
        if tensor.ndim != 2 or tensor.is_floating_point() != (part == "scales"):
            raise CorruptCheckpoint(
                f"tensor {key!r}: {tensor.dtype} {[*tensor.shape]} is not what this layout has there"
            )
        found.append(tensor)
    return found[0], found[1], found[2]


def _deinterleaved(codes: Tensor) -> Tensor:
    """Put the eight codes of each word in the order of the outputs they belong to."""
    eights = codes.view(codes.shape[0], -1, 8)
    ordered = torch.empty_like(eights)
    ordered[..., list(_AWQ_ORDER)] = eights
    return ordered.view_as(codes)


def _gptq_zeros(stored: Tensor, bits: int, symmetric: bool, less_one: bool, stem: str) -> Tensor:
    """Zero points, unsigned [groups, out]."""
    middle, top = 1 << (bits - 1), (1 << bits) - 1
    if symmetric:
        least, most = int(stored.min()), int(stored.max())
        if least != most or most not in (middle - 1, middle):
            raise CorruptCheckpoint(
                f"tensor {stem + '.qzeros'!r}: zero points {least}…{most} in symmetric codes, "
                f"whose zero point is {middle}"
            )
        return torch.full_like(stored, middle)
    if less_one and int(stored.max()) == top:
        raise Unsupported(
            f"tensor {stem + '.qzeros'!r}: a zero point is stored as {top}, which some readers of the "
            f"first GPTQ format take for 0 and others for {top + 1}; convert the base to gptq_v2"
        )
    return stored + 1 if less_one else stored


def _groups(g_idx: Tensor | None, columns: int, count: int, stem: str) -> Tensor | None:
    """The group of each input, None where they are equal runs in order."""
    if g_idx is None:
        return None
    if g_idx.shape != (columns,) or int(g_idx.min()) < 0 or int(g_idx.max()) >= count:
        raise CorruptCheckpoint(
            f"tensor {stem + '.g_idx'!r}: does not name one of {count} groups for {columns} inputs"
        )
    if columns % count == 0:
        runs = torch.arange(columns, device=g_idx.device) // (columns // count)
        if torch.equal(runs, g_idx.to(runs.dtype)):
            return None
    return g_idx.to(torch.int32)


def _packed(
    codes: Tensor,
    zeros: Tensor,
    scales: Tensor,
    groups: Tensor | None,
    scheme: IntegerScheme,
    stem: str,
) -> PackedIntegers:
    """From unsigned codes [out, in], unsigned zeros and scales [groups, out]."""
    middle = 1 << (BITS[scheme] - 1)
    signed = zeros.T - middle
    inputs, count = codes.shape[1], scales.shape[0]
    try:
        return packed_from_codes(
            codes - middle,
            scales.T.contiguous(),
            scheme=scheme,
            dtype=scales.dtype,
            zeros=None if bool((signed == 0).all()) else signed.to(torch.int8),
            groups=groups,
            group_size=None if count == 1 else -(-inputs // count),
        )
    except InputRefused as error:
        raise CorruptCheckpoint(f"tensor {stem + '.qweight'!r}: {error}") from error
