"""Integer codes with scales: ternary, int4 and int8 weights, per group, row or tensor.

One function, `materialize`, turns codes, scales and zero points into values; training, merging and
every reader of a foreign layout go through it, so they agree bit for bit. A weight [out, in] is cut
along its inputs into groups that share a scale. Where the codes and scales come from:

- *ternary*: scale = mean magnitude, code = round(w / scale) clipped to {-1, 0, 1} (The Era of 1-bit
  LLMs, arXiv 2402.17764, equations 1 to 3); with one scale a tensor, codes equal those of
  transformers' own BitNet layers in online mode, and the scale up to the last bit of a mean.
- *int8*, *int4* symmetric: scale = absmax / 127 (LLM.int8(), arXiv 2208.07339) and absmax / 7.5, the
  grid of GPTQ (arXiv 2210.17323), rounded to nearest.
- asymmetric: scale = range / (2^b - 1) and a zero point inside the grid, as in GPTQ and AWQ (arXiv
  2306.00978).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qlx.checkpoint import QuantSpec
from qlx.errors import InputRefused, Unsupported
from qlx.quant.bits import pack_integers, unpack_integers
from qlx.quant.codec4bit import finite_float32, torch_dtype_of

__all__ = [
    "BITS",
    "SCALE_DTYPE",
    "IntegerScheme",
    "PackedIntegers",
    "code_range",
    "materialize",
    "packed_from_codes",
    "quantize_integers",
]

IntegerScheme = Literal["int8", "int4", "ternary"]

BITS: dict[IntegerScheme, int] = {"int8": 8, "int4": 4, "ternary": 2}
"""Bits a code takes, by scheme."""

SCALE_DTYPE = "scale_dtype"
"""Key in `QuantSpec.extras`: the float type scales are rounded to before codes are chosen."""

_LARGEST = {"int8": 127.0, "int4": 7.5}  # what absmax / scale is in the symmetric schemes
_RANGES = {"int8": (-127, 127), "int4": (-8, 7), "ternary": (-1, 1)}
_SMALLEST_MEAN = 1e-5  # below it BitNet takes 1e-5 as the mean magnitude


def materialize(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    groups: Tensor | None = None,
    *,
    spend: bool = False,
) -> Tensor:
    """Values = scale * (code - zero), float32 [out, in].

    Args:
        codes: [out, in], integers of any type.
        scales: [out, n] or [1, n], n dividing `in`: each of n equal runs of inputs has a scale.
        zeros: the same shape as scales, in the units of the codes; None stands for 0.
        groups: integers [in], the column of `scales` each input takes instead (GPTQ's g_idx).
        spend: float32 codes may be overwritten by the values, which saves an array of their size.

    One subtraction and one product in float32 for every value, differentiable in scales and zeros.
    """
    q, s = codes.float(), scales.float()
    z = None if zeros is None else zeros.float()
    if groups is not None:
        s, z = s[:, groups], None if z is None else z[:, groups]
    else:
        q, s = q.reshape(q.shape[0], s.shape[1], -1), s[..., None]
        z = None if z is None else z[..., None]
    if not spend:
        return ((q if z is None else q - z) * s).reshape(codes.shape)
    return (q if z is None else q.sub_(z)).mul_(s).reshape(codes.shape)


@dataclass(frozen=True)
class PackedIntegers:
    """A weight [out, in] as packed integer codes.

    `codes` uint8 [out, ceil(in * bits / 8)], see `qlx.quant.bits`; `scales` float [out or 1, n];
    `zeros` int8 or float32 of the scales' shape, or None; `groups` int32 [in] or None; all as
    `materialize` takes them. `shape` and `dtype` are those of the weight before; `group_size` the
    inputs that share a scale, None for one scale a row or tensor.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    groups: Tensor | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    scheme: IntegerScheme
    group_size: int | None

    @property
    def bits(self) -> int:
        """Bits a code takes."""
        return BITS[self.scheme]

    @property
    def count(self) -> int:
        """Number of weights."""
        return torch.Size(self.shape).numel()

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Codes, scales and, where there are any, zeros and groups."""
        every = (self.codes, self.scales, self.zeros, self.groups)
        return tuple(part for part in every if part is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts)

    def integers(self) -> Tensor:
        """The codes unpacked, float32 [out, in]."""
        return unpack_integers(self.codes, self.bits, self.shape[1])

    def values(self) -> Tensor:
        """The weight's values, float32 [out, in]."""
        return materialize(self.integers(), self.scales, self.zeros, self.groups, spend=True)

    def identity(self) -> tuple[str, tuple[Tensor, ...]]:
        """What a fingerprint covers: the form as text, and the tensors.

        Scales count in float32 and zeros as numbers, so that the type they are kept in does not
        matter; a missing part is told apart from another one by the form.
        """
        zeros = None if self.zeros is None else self.zeros.float()
        named = {"zeros": zeros, "groups": self.groups}
        extra = {name: part for name, part in named.items() if part is not None}
        form = " ".join([self.scheme, str(self.group_size), str(list(self.shape)), *extra])
        return form, (self.codes, self.scales.float(), *extra.values())


def quantize_integers(weight: Tensor, spec: QuantSpec) -> PackedIntegers:
    """Quantize a weight [out, in] as `spec` says (scheme, group_size, symmetric, scale dtype), on CPU.

    Raises:
        Unsupported: not a float matrix, inputs that are no multiple of the group size, an
            asymmetric ternary, or an unknown scheme.
        InputRefused: NaN or infinite values, or scales too large for their dtype.
    """
    scheme = spec.scheme
    if scheme not in ("int8", "int4", "ternary"):
        raise Unsupported(f"integer scheme {scheme!r} is not one of int8, int4, ternary")
    symmetric = spec.symmetric is not False
    if scheme == "ternary" and not symmetric:
        raise Unsupported("ternary weights have no zero point; leave out symmetric: false")
    blocks = _blocks(finite_float32(weight, scheme), spec.group_size, whole=scheme == "ternary")
    scales, zeros = (
        (_symmetric_scales(blocks, scheme), None) if symmetric else _asymmetric(blocks, scheme)
    )
    scales = _rounded(scales, str(spec.extras.get(SCALE_DTYPE, "float32")))
    low, high = code_range(scheme, symmetric=symmetric)
    codes = (blocks * _inverse(scales)).round()
    codes = (codes if zeros is None else codes + zeros).clamp(low, high)
    shape = (int(weight.shape[0]), int(weight.shape[1]))
    return PackedIntegers(
        codes=pack_integers(codes.reshape(shape), BITS[scheme]),
        scales=scales.reshape(blocks.shape[0], -1),
        zeros=None if zeros is None else zeros.reshape(blocks.shape[0], -1).to(torch.int8),
        groups=None,
        shape=shape,
        dtype=weight.dtype,
        scheme=scheme,
        group_size=spec.group_size,
    )


def _blocks(weight: Tensor, group_size: int | None, *, whole: bool) -> Tensor:
    """The weight as [rows, groups, values that share a scale]; `whole` makes no group the tensor."""
    if weight.ndim != 2:
        raise Unsupported(f"integer schemes take a matrix, not a tensor of shape {[*weight.shape]}")
    rows, columns = weight.shape
    if group_size is None:
        return weight.reshape((1, 1, -1) if whole else (rows, 1, columns))
    if group_size < 1 or columns % group_size:
        raise Unsupported(f"{columns} inputs are no multiple of the group size {group_size}")
    return weight.reshape(rows, -1, group_size)


def _symmetric_scales(blocks: Tensor, scheme: IntegerScheme) -> Tensor:
    if scheme == "ternary":
        # summed in float64, whose result does not depend on threads or the width of vectors
        mean = blocks.abs().mean(dim=-1, keepdim=True, dtype=torch.float64).float()
        return 1.0 / (1.0 / mean.clamp(min=_SMALLEST_MEAN))  # BitNet's: 1 / scale is 1 / mean
    return blocks.abs().amax(dim=-1, keepdim=True) / _LARGEST[scheme]


def code_range(scheme: IntegerScheme, *, symmetric: bool) -> tuple[int, int]:
    """The lowest and the highest code of a scheme."""
    return _RANGES[scheme] if symmetric else _grid(scheme)


def _grid(scheme: IntegerScheme) -> tuple[int, int]:
    half = 1 << (BITS[scheme] - 1)
    return -half, half - 1


def _asymmetric(blocks: Tensor, scheme: IntegerScheme) -> tuple[Tensor, Tensor]:
    """Scales, and zero points inside the grid; the range always contains 0, which stays exact."""
    low, high = _grid(scheme)
    least = blocks.amin(dim=-1, keepdim=True).clamp(max=0)
    scales = (blocks.amax(dim=-1, keepdim=True).clamp(min=0) - least) / (high - low)
    return scales, (low - least * _inverse(scales)).round().clamp(low, high)


def _inverse(scales: Tensor) -> Tensor:
    """1 / scale in float32, and 0 where the scale is 0: a group of zeros has codes 0."""
    return (1.0 / scales.float()).nan_to_num(posinf=0.0)


def _rounded(scales: Tensor, name: str) -> Tensor:
    rounded = scales.to(torch_dtype_of(name))
    if not bool(torch.isfinite(rounded).all()):
        raise InputRefused(f"a scale of the weight is too large for {name}")
    return rounded


def packed_from_codes(
    codes: Tensor,
    scales: Tensor,
    *,
    scheme: IntegerScheme,
    dtype: torch.dtype,
    zeros: Tensor | None = None,
    groups: Tensor | None = None,
    group_size: int | None = None,
) -> PackedIntegers:
    """A packed weight from codes [out, in] and scales that are known already.

    Raises:
        InputRefused: a code is outside the scheme's range, a scale is not finite, or sizes differ.
    """
    low, high = (-1, 1) if scheme == "ternary" else _grid(scheme)
    if int(codes.min()) < low or int(codes.max()) > high:
        raise InputRefused(f"a code lies outside {low}…{high}, the range of {scheme}")
    if not bool(torch.isfinite(scales).all()):
        raise InputRefused("a scale is NaN or infinite")
    rows, columns = int(codes.shape[0]), int(codes.shape[1])
    fits = scales.ndim == 2 and scales.shape[0] in (1, rows)
    fits = fits and (groups is not None or columns % scales.shape[1] == 0)
    if not fits or (zeros is not None and zeros.shape != scales.shape):
        raise InputRefused(f"scales {[*scales.shape]} do not fit codes {[rows, columns]}")
    packed = pack_integers(codes, BITS[scheme])
    return PackedIntegers(packed, scales, zeros, groups, (rows, columns), dtype, scheme, group_size)
