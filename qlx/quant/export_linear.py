"""A packed linear layer that needs no bitsandbytes and exports to ONNX with its codes packed.

Under `torch.export` it becomes one node of onnxruntime's `com.microsoft::MatMulBnb4`, whose layout
is that of bitsandbytes: codes flat, high half first, float32 scales (un-nested). The graph needs
the opset import `com.microsoft = 1`, and each layer's codes and scales are named initializers.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qlx.quant.codec import dequantize_tensor
from qlx.quant.codec4bit import Packed4bit

__all__ = ["LARGEST_BLOCK", "PackedLinear"]

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
