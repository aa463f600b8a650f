"""Inputs rounded to 8 bits, token by token, as BitNet layers do."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["quantize_activations"]

_SMALLEST = 1e-5  # the least largest magnitude of a row, as in BitNet


class _RoundThrough(torch.autograd.Function):
    """Rounding whose gradient is that of the identity (straight-through estimator)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:
        highest = (1 << (bits - 1)) - 1
        values = x.float()
        scale = highest / values.abs().amax(dim=-1, keepdim=True).clamp(min=_SMALLEST)
        rounded = (values * scale).round().clamp(-highest - 1, highest) / scale
        return rounded.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def quantize_activations(x: Tensor, bits: int = 8) -> Tensor:
    """X [..., features] rounded to `bits` bits, each row to its largest magnitude; same shape and dtype.

    The source is BitNet b1.58 (arXiv 2402.17764); values equal those of transformers' `ActQuant`.
    """
    apply: Callable[..., Tensor] = _RoundThrough.apply
    return apply(x, bits)
