"""A linear layer whose frozen weight stays packed, integer codes and scales, while it is trained on.

Ours, in plain torch, for ternary, int4 and int8 bases; no library of its own is needed. PEFT takes it
for an `nn.Linear` with a weight that is no float, and asks `dequantize` for the values where it
needs them (DoRA).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlx.quant.activations import quantize_activations
from qlx.quant.bits import unpack_integers
from qlx.quant.integers import PackedIntegers, materialize
from qlx.quant.recompute import linear_remade

__all__ = ["IntegerLinear"]


class IntegerLinear(nn.Linear):
    """x [..., in] -> [..., out] with a packed integer weight.

    `weight` is a frozen uint8 parameter [out, bytes]; the buffers `weight_scale`, `weight_zero` and
    `weight_group` are the other parts of a `PackedIntegers`, None where it has none. The product is
    computed in `compute_dtype` (that of x if None) with values that are made in float32 and cast
    once; the bias is added in that dtype and never changed. With `activation_bits` the inputs are
    rounded first, each row to its own scale.
    """

    weight_scale: Tensor
    weight_zero: Tensor | None
    weight_group: Tensor | None

    def __init__(
        self,
        packed: PackedIntegers,
        bias: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
        activation_bits: int | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = packed.shape
        self.compute_dtype, self.activation_bits = compute_dtype, activation_bits
        self.scheme, self.group_size, self.value_dtype = (
            packed.scheme,
            packed.group_size,
            packed.dtype,
        )
        self.weight = nn.Parameter(packed.codes, requires_grad=False)
        self.register_buffer("weight_scale", packed.scales)
        self.register_buffer("weight_zero", packed.zeros)
        self.register_buffer("weight_group", packed.groups)
        self.bias = None if bias is None else _frozen(bias)  # type: ignore[assignment]

    @property
    def packed(self) -> PackedIntegers:
        """The weight, sharing this layer's memory."""
        return PackedIntegers(
            codes=self.weight.detach(),
            scales=self.weight_scale,
            zeros=self.weight_zero,
            groups=self.weight_group,
            shape=(self.out_features, self.in_features),
            dtype=self.value_dtype,
            scheme=self.scheme,
            group_size=self.group_size,
        )

    def forward(self, input: Tensor) -> Tensor:
        """The product, returned in the dtype of the input."""
        dtype = self.compute_dtype or input.dtype
        x = (
            input
            if self.activation_bits is None
            else quantize_activations(input, self.activation_bits)
        )
        packed = self.packed
        make = partial(_values, bits=packed.bits, columns=self.in_features)
        parts = (packed.codes, packed.scales, _or_empty(packed.zeros), _or_empty(packed.groups))
        y = linear_remade(x.to(dtype), make, *parts)
        if self.bias is not None:
            y += self.bias.to(dtype)
        return y.to(input.dtype)

    def dequantize(self) -> Tensor:
        """The weight's values, float32 [out, in], made anew at every call."""
        return self.packed.values()

    @property
    def W_q(self) -> Tensor:  # noqa: N802
        """The codes, under the name by which PEFT knows layers that have `dequantize`."""
        return self.weight

    def extra_repr(self) -> str:
        """Sizes, scheme and grouping."""
        return f"{super().extra_repr()}, scheme={self.scheme}, group_size={self.group_size}"

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> "IntegerLinear":
        """Moves go through to every part; casts (`.half()`) leave scales and zeros as they are."""
        kept = {name: part for name, part in self._buffers.items() if part is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, part in kept.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != part.dtype:
                self._buffers[name] = part.to(moved.device)
        return self


def _frozen(bias: Tensor) -> nn.Parameter:
    return bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)


def _or_empty(part: Tensor | None) -> Tensor:
    """Autograd saves tensors, not None; no part that exists is empty."""
    return torch.empty(0) if part is None else part


def _values(
    codes: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, *, bits: int, columns: int
) -> Tensor:
    integers = unpack_integers(codes, bits, columns)
    present = [part if part.numel() else None for part in (zeros, groups)]
    return materialize(integers, scales, *present, spend=True)
