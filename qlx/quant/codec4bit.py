"""The 4-bit block codec: NF4 and FP4 levels, quantize, dequantize, double quantization.

Written once, in torch, for every step that turns weights into codes or codes into weights: training
in manual mode, merging, packing. Codes, scales and values are equal to those of bitsandbytes 0.50
on CPU, bit for bit; unlike its CPU kernel it is right for every number of columns.

A weight is read row by row as one flat sequence and cut into blocks of `block_size` values. Each
block has one scale, its largest magnitude (`absmax`, float32); a value is stored as the index of
the level nearest to value / absmax. Two indices make one byte, the first in the high four bits.
The value of a code is level[code] * absmax, one float32 product.
"""

from dataclasses import dataclass
from functools import cache
from math import isfinite
from typing import Literal

import torch
from torch import Tensor

from qlx.checkpoint import QuantSpec
from qlx.errors import InputRefused, Unsupported
from qlx.quant.threads import one_torch_thread

__all__ = [
    "BLOCK_SIZES",
    "FOUR_BIT",
    "NESTED_BLOCK",
    "NestedScales",
    "Packed4bit",
    "Scheme",
    "dynamic_map",
    "finite_float32",
    "levels",
    "nest_scales",
    "pack_codes",
    "quantize_4bit",
    "quantize_blocks",
    "torch_dtype_of",
    "unnest_scales",
    "unpack_codes",
]

Scheme = Literal["nf4", "fp4"]

FOUR_BIT: tuple[Scheme, ...] = ("nf4", "fp4")
"""The schemes of this codec."""

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Block sizes that the layout of bitsandbytes allows."""

NESTED_BLOCK = 256
"""Scales that share one scale of their own under double quantization."""

_CELLS = 1024  # of [-1, 1] in the table of nearest levels
_TINY = 1e-38  # keeps 1 / absmax finite for a block of zeros
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# NormalFloat4: quantiles of N(0, 1), rescaled to [-1, 1], with an exact zero (QLoRA, arXiv
# 2305.14314, appendix E).
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# FP4: one sign bit, two exponent bits, one mantissa bit; magnitudes in units of 1/12, in the order
# of the three low bits. Code 8 is a second zero, which quantizing tiny positive values gives.
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_ZERO_CODE: dict[Scheme, int] = {"nf4": 7, "fp4": 0}
_FP4_ASCENDING = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)


@dataclass(frozen=True)
class NestedScales:
    """Double-quantized scales: scale = map[codes] * absmax (one per 256 codes) + offset.

    `codes` uint8 [blocks]; `absmax` float32 [ceil(blocks / 256)]; `offset` float32 scalar;
    `map` float32 [256].
    """

    codes: Tensor
    absmax: Tensor
    offset: Tensor
    map: Tensor


@dataclass(frozen=True)
class Packed4bit:
    """An NF4 or FP4 weight.

    `codes` uint8 [ceil(values / 2)], flat, high half first; `absmax` float32 [blocks], what every
    value is scaled by (already un-nested); `nested` what `absmax` came from under double
    quantization; `shape` and `dtype` those of the weight before.
    """

    codes: Tensor
    absmax: Tensor
    nested: NestedScales | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    scheme: Scheme
    block_size: int

    @property
    def count(self) -> int:
        """Number of weights."""
        return torch.Size(self.shape).numel()

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales as stored."""
        if self.nested is None:
            return self.codes.nbytes + self.absmax.nbytes
        nested = self.nested
        return self.codes.nbytes + nested.codes.nbytes + nested.absmax.nbytes + nested.offset.nbytes

    def values(self) -> Tensor:
        """The weight's values, level * absmax, float32 of its shape."""
        pairs = _level_pairs(self.scheme).to(self.codes.device)
        values = pairs.index_select(0, self.codes.int()).view(-1)[: self.count]
        full = self.count - self.count % self.block_size
        blocks = values[:full].view(-1, self.block_size)
        blocks.mul_(self.absmax[: full // self.block_size, None])
        if full < self.count:
            values[full:] *= self.absmax[-1]
        return values.reshape(self.shape)

    def identity(self) -> tuple[str, tuple[Tensor, ...]]:
        """What a fingerprint covers: the form as text, and codes and scales as stored."""
        nested = self.nested
        scales: tuple[Tensor, ...] = (self.absmax,)
        if nested is not None:
            scales = (nested.codes, nested.absmax, nested.offset.reshape(1), nested.map)
        return f"{self.scheme} {self.block_size} {list(self.shape)}", (self.codes, *scales)


def torch_dtype_of(name: str) -> torch.dtype:
    """The torch dtype of `float32`, `bfloat16` or `float16`.

    Raises:
        Unsupported: another name.
    """
    for dtype in _FLOATS:
        if str(dtype) == f"torch.{name}":
            return dtype
    raise Unsupported(f"dtype {name!r} is not one of float32, bfloat16, float16")


@cache
def levels(scheme: Scheme) -> Tensor:
    """The 16 values a code stands for, float32 [16], in the order of the codes.

    Raises:
        Unsupported: the scheme is neither nf4 nor fp4.
    """
    if scheme == "nf4":
        return torch.tensor(_NF4)
    if scheme == "fp4":
        positive = torch.tensor(_FP4_TWELFTHS) / 12.0
        return torch.cat([positive, 0.0 - positive])
    raise Unsupported(f"4-bit scheme {scheme!r} is not one of nf4, fp4")


@cache
def _level_pairs(scheme: Scheme) -> Tensor:
    """The two values that each byte stands for, float32 [256, 2]."""
    return levels(scheme)[unpack_codes(torch.arange(256, dtype=torch.uint8), 512).int()].view(-1, 2)


@cache
def _ascending(scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Midpoints between neighbouring levels [15] and the codes in ascending order of level [16]."""
    order = torch.arange(16) if scheme == "nf4" else torch.tensor(_FP4_ASCENDING)
    ascending = levels(scheme)[order]
    return (ascending[:-1] + ascending[1:]) / 2, order.to(torch.uint8)


@cache
def dynamic_map() -> Tensor:
    """The signed 8-bit dynamic map, float32 [256] ascending, from -0.993 to 1.

    Seven decades; decade k holds 2^k interval centres of [0.1, 1] times 10^(k - 6), with both
    signs; then 0 and 1 (8-Bit Approximations for Parallelism in Deep Learning, arXiv 1511.04561).
    """
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        centres = (edges[:-1] + edges[1:]) / 2 * 10 ** (decade - 6)
        values += [centres, -centres]
    return torch.cat(values).sort().values


@cache
def _nearest_of_grid() -> Tensor:
    """Code of the dynamic map nearest to each of 65,536 equal steps over [-1, 1], uint8 [65536].

    bitsandbytes on CPU rounds to this grid before it looks for the nearest entry of the map, so
    values near 1e-4 may get a neighbour of the nearest code; equal codes need the same detour.
    """
    grid = torch.linspace(-1, 1, 65536, dtype=torch.float64).float()
    code_map = dynamic_map()
    return torch.bucketize(grid, (code_map[:-1] + code_map[1:]) / 2).to(torch.uint8)


def pack_codes(codes: Tensor, fill: int = 0) -> Tensor:
    """Two codes a byte, the first in the high half: uint8 [n] below 16 -> uint8 [ceil(n / 2)].

    `fill` takes the last low half when n is odd.
    """
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_full((1,), fill)])
    return (codes[::2] << 4) | codes[1::2]


def unpack_codes(packed: Tensor, count: int) -> Tensor:
    """The first `count` codes of a packed sequence, uint8 [count]."""
    return torch.stack([packed >> 4, packed & 15], dim=-1).reshape(-1)[:count]


def quantize_blocks(flat: Tensor, scheme: Scheme, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of a flat float32 sequence.

    Returns:
        uint8 [n] codes below 16 and float32 [ceil(n / block_size)] scales. A block of zeros has
        scale 0, but 1e-38 when it is the last and shorter than the others (as in bitsandbytes).
    """
    full = flat.numel() - flat.numel() % block_size
    blocks = flat[:full].view(-1, block_size)
    absmax = blocks.abs().amax(dim=1) if full else flat.new_empty(0)
    scaled = [(blocks * (1.0 / absmax.clamp(min=_TINY))[:, None]).reshape(-1)]
    if full < flat.numel():
        last = flat[full:].abs().max().clamp(min=_TINY)
        absmax = torch.cat([absmax, last[None]])
        scaled.append(flat[full:] / last)
    nearest = _nearest(torch.cat(scaled).clamp_(-1, 1), scheme)
    if scheme == "nf4":  # its codes ascend with their levels
        return nearest, absmax
    return _ascending(scheme)[1].index_select(0, nearest.int()), absmax


def _nearest(values: Tensor, scheme: Scheme) -> Tensor:
    """How many midpoints lie below each value in [-1, 1], uint8: the rank of the nearest level.

    A table instead of a search: values are sorted into equal cells, none of which holds more than
    one midpoint. The map to cells never decreases, so a value in a lower cell than a midpoint's is
    below it and one in a higher cell above; in the same cell the two are compared.
    """
    ranks, midpoints = _cells(scheme)
    cells = _cell_of(values)
    above = values > midpoints.index_select(0, cells)
    return ranks.index_select(0, cells).add_(above.view(torch.uint8))


def _cell_of(values: Tensor) -> Tensor:
    return ((values + 1) * (_CELLS / 2)).int()


@cache
def _cells(scheme: Scheme) -> tuple[Tensor, Tensor]:
    """For each cell the number of midpoints in lower cells, and its own midpoint or infinity."""
    midpoints, _ = _ascending(scheme)
    places = _cell_of(midpoints)
    assert len(places.unique()) == len(places)
    ranks = torch.bucketize(torch.arange(_CELLS + 1), places)
    own = torch.full((_CELLS + 1,), torch.inf)
    own[places.long()] = midpoints
    return ranks.to(torch.uint8), own


def nest_scales(absmax: Tensor) -> NestedScales:
    """Quantize float32 scales [blocks] to 8 bits: subtract their mean, scale per 256, look up.

    The source of the method is QLoRA (arXiv 2305.14314, section 3).
    """
    offset = _mean(absmax)
    centred = absmax - offset
    blocks = -(-centred.numel() // NESTED_BLOCK)
    padded = centred.new_zeros(blocks * NESTED_BLOCK)
    padded[: centred.numel()] = centred
    padded = padded.view(blocks, NESTED_BLOCK)
    largest = padded.abs().amax(dim=1)
    scaled = (padded * (1.0 / largest)[:, None]).clamp(-1, 1)
    index = ((scaled + 1) * 0.5 * 65535 + 0.5).nan_to_num(0.0).to(torch.int64)
    codes = _nearest_of_grid()[index]
    codes[largest == 0] = 0
    return NestedScales(codes.view(-1)[: centred.numel()].clone(), largest, offset, dynamic_map())


def unnest_scales(nested: NestedScales) -> Tensor:
    """The float32 scales [blocks] that double-quantized ones stand for."""
    scale = nested.absmax.repeat_interleave(NESTED_BLOCK)[: nested.codes.numel()]
    return nested.map[nested.codes.long()] * scale + nested.offset


def _mean(absmax: Tensor) -> Tensor:
    """Mean of float32 [blocks], the same on any number of cores.

    torch cuts long sums into one piece a thread, so the last bit of bitsandbytes' offset depends
    on the thread count from about a million blocks; one thread is the reference here.
    """
    with one_torch_thread():
        return absmax.mean()


def finite_float32(weight: Tensor, scheme: str) -> Tensor:
    """The weight in float32 on CPU, checked to be fit for quantizing to `scheme`.

    Raises:
        Unsupported: not a float weight.
        InputRefused: the weight holds NaN or an infinity.
    """
    if weight.dtype not in _FLOATS:
        raise Unsupported(f"a weight of dtype {weight.dtype} cannot be quantized to {scheme}")
    values = weight.detach().to("cpu", torch.float32)
    # A finite sum has finite terms, and takes a tenth of the time of looking at each.
    if not isfinite(values.sum()) and not bool(torch.isfinite(values).all()):
        raise InputRefused("the weight holds NaN or infinite values; it cannot be quantized")
    return values


def quantize_4bit(weight: Tensor, spec: QuantSpec) -> Packed4bit:
    """Quantize a weight of any shape as `spec` says (scheme, group_size, double_quant), on CPU.

    Raises:
        Unsupported: no 4-bit scheme in `spec`, an impossible block size, or not a float weight.
        InputRefused: the weight holds NaN or an infinity.
    """
    scheme, block_size = spec.scheme, spec.group_size or 64
    if scheme not in FOUR_BIT:
        raise Unsupported(f"4-bit scheme {scheme!r} is not one of nf4, fp4")
    if block_size not in BLOCK_SIZES:
        raise Unsupported(f"group size {block_size} is not one of {BLOCK_SIZES}")
    flat = finite_float32(weight, scheme).reshape(-1)
    codes, absmax = quantize_blocks(flat, scheme, block_size)
    nested = nest_scales(absmax) if spec.double_quant else None
    return Packed4bit(
        codes=pack_codes(codes, fill=_ZERO_CODE[scheme]),
        absmax=absmax if nested is None else unnest_scales(nested),
        nested=nested,
        shape=tuple(weight.shape),
        dtype=weight.dtype,
        scheme=scheme,
        block_size=block_size,
    )
