"""Scales that fit codes best, for weights that are packed after training.

BitNet's scale is the mean magnitude of all values, zeros included. Training learns around it, but a
weight that already lies on a ternary grid {-s, 0, s} would be packed with a smaller scale than its
own. With its codes q given, the scale of least squared error is ⟨w, q⟩ / ⟨q, q⟩ (Ternary Weight
Networks, arXiv 1605.04711, equation 4), which finds s again exactly.
"""

from dataclasses import replace

import torch
from torch import Tensor

from qlx.errors import InputRefused
from qlx.quant.bits import unpack_integers
from qlx.quant.integers import PackedIntegers

__all__ = ["fitted_ternary"]

_VALUES = 2**18  # at a time


def fitted_ternary(packed: PackedIntegers, weight: Tensor) -> PackedIntegers:
    """The codes of `packed` with the scales that fit `weight` [out, in] best, in the scales' dtype.

    A group without any code keeps its scale. Sums are made in float64, some rows at a time.

    Raises:
        InputRefused: a scale is too large for its dtype.
    """
    step = max(1, _VALUES // packed.shape[1])
    cuts = (slice(at, at + step) for at in range(0, packed.shape[0], step))
    sums = [_sums(packed, weight, rows) for rows in cuts]
    share, count = (torch.cat(parts) for parts in zip(*sums, strict=True))
    if packed.scales.shape[0] == 1:
        share, count = share.sum(dim=0, keepdim=True), count.sum(dim=0, keepdim=True)
    fitted = torch.where(count > 0, share / count.clamp(min=1), packed.scales.double())
    scales = fitted.to(packed.scales.dtype)
    if not bool(torch.isfinite(scales).all()):
        raise InputRefused(f"a scale of the weight is too large for {scales.dtype}")
    return replace(packed, scales=scales)


def _sums(packed: PackedIntegers, weight: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """⟨w, q⟩ and ⟨q, q⟩ of every group of some rows, float64 [rows, groups]."""
    values = weight[rows].double()
    cut = (values.shape[0], packed.scales.shape[1], -1)
    codes = unpack_integers(packed.codes[rows], packed.bits, packed.shape[1]).double().reshape(cut)
    return (values.reshape(cut) * codes).sum(dim=-1), codes.abs().sum(dim=-1)
