"""The output head of a language model in 8 bits.

Training and `pack` leave heads unquantized. A vocabulary of 100 000 then makes the head the largest matrix that a
token reads: in float32 more bytes than all layers of a small model in 4 bits. The product is always that of accuracy
level 4, inputs rounded to 8 bits: onnxruntime's other product of 8-bit weights unpacks the whole matrix at each call.
"""

from typing import Any

import torch
from torch import nn

from qlx.checkpoint import QuantSpec
from qlx.errors import Unsupported
from qlx.quant import IntegerMatMul, PackedIntegers, quantize_tensor

__all__ = ["pack_head"]

_LEVEL = 4
_GROUPS = (128, 64, 32, 16)
"""Inputs that share a scale: the largest that divides the width, a whole row where none does."""


def pack_head(model: nn.Module) -> float:
    """Replace the head of a causal LM by an `IntegerMatMul` of 8 bits, in place.

    A tied embedding keeps its values: it is looked up in, not multiplied by.

    Args:
        model: traced afterwards; an adapter beside its head stays as it is.

    Returns:
        How far that moved the head's weights, relative (Frobenius).

    Raises:
        Unsupported: the head is no plain linear layer.
    """
    name, head = _head_of(model)
    weight = head.weight.detach().float()
    group = next((size for size in _GROUPS if weight.shape[1] % size == 0), None)
    packed = quantize_tensor(weight, QuantSpec(scheme="int8", group_size=group))
    assert isinstance(packed, PackedIntegers)
    model.set_submodule(name, IntegerMatMul(packed, head.bias, accuracy_level=_LEVEL))
    moved = torch.linalg.vector_norm(packed.values() - weight) / torch.linalg.vector_norm(weight)
    return float(moved)


def _head_of(model: Any) -> tuple[str, nn.Linear]:
    head = model.get_output_embeddings()
    head = getattr(head, "base", head)  # an adapter is put around it
    name = next((name for name, each in model.named_modules() if each is head), "")
    if not name or type(head) is not nn.Linear or not head.weight.is_floating_point():
        what = "none" if head is None else type(head).__name__
        raise Unsupported(f"--head int8 packs a head of type Linear; this model's is {what}")
    return name, head
