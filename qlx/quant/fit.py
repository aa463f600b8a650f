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
from qlx.quant.integers import PackedIntegers

__all__ = ["fitted_ternary"]


def fitted_ternary(packed: PackedIntegers, weight: Tensor) -> PackedIntegers:
    """The codes of `packed` with the scales that fit `weight` [out, in] best, in the scales' dtype.

    A group without any code keeps its scale. Sums are made in float64.

    Raises:
        InputRefused: a scale is too large for its dtype.
    """
    groups = packed.scales.shape
    cut = (groups[0], groups[1], -1)
    codes = packed.integers().reshape(cut).double()
    share = (weight.reshape(cut).double() * codes).sum(dim=-1)
    count = codes.abs().sum(dim=-1)
    fitted = torch.where(count > 0, share / count.clamp(min=1), packed.scales.double())
    scales = fitted.to(packed.scales.dtype)
    if not bool(torch.isfinite(scales).all()):
        raise InputRefused(f"a scale of the weight is too large for {scales.dtype}")
    return replace(packed, scales=scales)
