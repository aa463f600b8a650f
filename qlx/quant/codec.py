"""One door to all codecs: quantize and dequantize a weight without knowing its scheme."""

from typing import Protocol

import torch
from torch import Tensor

from qlx.checkpoint import QuantSpec
from qlx.errors import Unsupported
from qlx.quant.codec4bit import FOUR_BIT, quantize_4bit
from qlx.quant.integers import BITS, quantize_integers

__all__ = ["SCHEMES", "PackedTensor", "dequantize_tensor", "quantize_tensor"]

SCHEMES: tuple[str, ...] = (*FOUR_BIT, *BITS)
"""Every scheme there is a codec for."""


class PackedTensor(Protocol):
    """A quantized weight of any scheme: `Packed4bit` or `PackedIntegers`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weight before."""
        ...

    @property
    def scheme(self) -> str:
        """Which of `SCHEMES` it is."""
        ...

    @property
    def count(self) -> int:
        """Number of weights."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales as stored."""
        ...

    def values(self) -> Tensor:
        """The weight's values, float32 of its shape."""
        ...

    def identity(self) -> tuple[str, tuple[Tensor, ...]]:
        """What a fingerprint covers: the form (scheme, grouping, shape) as text, and the tensors."""
        ...


def quantize_tensor(weight: Tensor, spec: QuantSpec) -> PackedTensor:
    """Quantize a weight as `spec` says, on CPU.

    Raises:
        Unsupported: no scheme in `spec`, or one that does not take this weight (the message says why).
        InputRefused: the weight holds NaN or an infinity.
    """
    if spec.scheme is None:
        raise Unsupported(f"the quantization names no scheme; give one of {', '.join(SCHEMES)}")
    if spec.scheme in FOUR_BIT:
        return quantize_4bit(weight, spec)
    return quantize_integers(weight, spec)


def dequantize_tensor(packed: PackedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """The values of a packed weight: computed in float32, rounded once to `dtype`.

    `dtype` is that of the weight before by default, as in bitsandbytes; float32 gives the values
    that a quantized layer computes with before its own cast, whatever the base was stored in.
    """
    return packed.values().to(dtype or packed.dtype)
