"""Packed linear layers that need no other library and export to ONNX with their codes packed.

Under `torch.export` each becomes one node of onnxruntime's own operators, and its codes and scales are
named initializers; the graph needs the opset import `com.microsoft = 1`.

- `PackedLinear`: `MatMulBnb4`, whose layout is that of bitsandbytes: codes flat, high half first, float32
  scales (un-nested).
- `IntegerMatMul`: `MatMulNBits`, whose layout is that of `qlx.quant.bits`: codes row by row, low bits first,
  counted from the middle of their range, a float32 scale for each run of 2^n inputs.
"""

from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from qlx.errors import Unsupported
from qlx.quant.activations import quantize_activations
from qlx.quant.bits import pack_integers
from qlx.quant.codec import dequantize_tensor
from qlx.quant.codec4bit import Packed4bit
from qlx.quant.integers import PackedIntegers

__all__ = ["LARGEST_BLOCK", "IntegerMatMul", "PackedLinear"]

_QUANT_TYPE = {"fp4": 0, "nf4": 1}
LARGEST_BLOCK = 256
"""Values of a block that onnxruntime's kernel takes at most."""


class PackedLinear(nn.Module):
    """x [..., in] -> [..., out] with a 4-bit weight.

    Buffers: `weight_codes` uint8 [out * in / 2] and `weight_absmax` float32 [blocks]; parameter
    `bias` [out] or None. The weight's values are level * absmax in float32, as in training.
    """

    weight_codes: Tensor
    weight_absmax: Tensor

    def __init__(
        self, packed: Packed4bit, bias: Tensor | None, compute_dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.compute_dtype = compute_dtype
        self._packed = packed
        self.register_buffer("weight_codes", packed.codes.clone())
        self.register_buffer("weight_absmax", packed.absmax.float().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), False)

    def forward(self, x: Tensor) -> Tensor:
        """The product in `compute_dtype`, returned in the dtype of x."""
        if torch.compiler.is_exporting():
            return self._symbolic(x)
        dtype = self.compute_dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        weight = dequantize_tensor(self._packed, dtype).to(x.device)
        return nn.functional.linear(x.to(dtype), weight, bias).to(x.dtype)

    def _symbolic(self, x: Tensor) -> Tensor:
        attributes: dict[str, Any] = {
            "K": self.in_features,
            "N": self.out_features,
            "block_size": self._packed.block_size,
            "quant_type": _QUANT_TYPE[self._packed.scheme],
        }
        y: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulBnb4",
            (x, self.weight_codes, self.weight_absmax),
            attrs=attributes,
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=1,
        )
        return y if self.bias is None else y + self.bias


_SMALLEST_RUN, _LARGEST_RUN = 16, 256
"""Inputs that share a scale in onnxruntime's kernel: powers of two in between."""


class IntegerMatMul(nn.Module):
    """x [..., in] -> [..., out] with a weight of 2, 4 or 8 bits.

    Buffers: `weight_codes` uint8 [out, runs, bytes of a run], `weight_scales` float32 [out, runs], and
    `weight_zeros` uint8 [out, bytes], float32 [out, runs] where zero points are no whole numbers, None where they
    are the middle; parameter `bias` [out] or None. Where the columns of a scale do not lie together (GPTQ's
    `desc_act`) the weight's are reordered, and so are the inputs, by `order` int64 [in].

    Args:
        packed: the weight; its codes are stored as they are.
        accuracy_level: 0, float32 products; 4, inputs rounded to 8 bits inside the kernel.
        activation_bits: round the inputs first, as the layer did in training.

    Raises:
        Unsupported: the inputs that share a scale are no multiple of 16.
    """

    weight_codes: Tensor
    weight_scales: Tensor
    weight_zeros: Tensor | None
    order: Tensor | None

    def __init__(
        self,
        packed: PackedIntegers,
        bias: Tensor | None,
        *,
        accuracy_level: int = 0,
        activation_bits: int | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.bits, self.accuracy_level = packed.bits, accuracy_level
        self.activation_bits = activation_bits
        self._packed, self.block_size = packed, _run_length(packed)
        order = None if packed.groups is None else packed.groups.argsort(stable=True)
        codes = packed.integers() if order is None else packed.integers()[:, order]
        self.register_buffer("weight_codes", self._in_runs(codes))
        self.register_buffer("weight_scales", self._for_each_run(packed.scales.float()))
        self.register_buffer("weight_zeros", self._zero_points())
        self.register_buffer("order", order)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone(), False)

    @property
    def runs(self) -> int:
        """Runs of inputs that share a scale, in each row."""
        return -(-self.in_features // self.block_size)

    def _in_runs(self, codes: Tensor) -> Tensor:
        missing = self.runs * self.block_size - self.in_features
        packed = pack_integers(nn.functional.pad(codes, (0, missing)), self.bits)
        return packed.reshape(self.out_features, self.runs, -1)

    def _for_each_run(self, parts: Tensor) -> Tensor:
        """Scales or zeros [out or 1, n] repeated to [out, runs]."""
        repeated = parts.repeat_interleave(-(-self.runs // parts.shape[1]), dim=1)[:, : self.runs]
        return repeated.expand(self.out_features, -1).contiguous()

    def _zero_points(self) -> Tensor | None:
        if self._packed.zeros is None:
            return None
        zeros = self._for_each_run(self._packed.zeros)
        if zeros.is_floating_point():
            return zeros + (
                1 << (self.bits - 1)
            )  # counted from the lowest code, as the kernel does
        return pack_integers(zeros, self.bits)

    def forward(self, x: Tensor) -> Tensor:
        """The product in float32."""
        if self.activation_bits is not None:
            x = quantize_activations(x, self.activation_bits)
        if not torch.compiler.is_exporting():
            return nn.functional.linear(x, self._packed.values(), self.bias)
        if self.order is not None:
            x = x.index_select(-1, self.order)
        y = self._symbolic(x)
        return y if self.bias is None else y + self.bias

    def _symbolic(self, x: Tensor) -> Tensor:
        inputs = [x, self.weight_codes, self.weight_scales]
        if self.weight_zeros is not None:
            inputs.append(self.weight_zeros)
        attributes: dict[str, Any] = {
            "K": self.in_features,
            "N": self.out_features,
            "bits": self.bits,
            "block_size": self.block_size,
            "accuracy_level": self.accuracy_level,
        }
        y: Tensor = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            inputs,
            attrs=attributes,
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=1,
        )
        return y


def _run_length(packed: PackedIntegers) -> int:
    """The longest run of inputs the kernel takes that always has one scale."""
    columns, scales = packed.shape[1], packed.scales.shape[1]
    if scales == 1:
        return next(size for size in (16, 32, 64, 128) if size >= min(columns, 128))
    group = columns // scales
    uneven = packed.groups is not None and set(packed.groups.bincount().tolist()) != {group}
    size = gcd(group, _LARGEST_RUN)
    if uneven or size < _SMALLEST_RUN:
        raise Unsupported(
            f"groups of {group} inputs: onnxruntime's product of packed integers takes multiples of "
            f"{_SMALLEST_RUN}, equally long"
        )
    return size
