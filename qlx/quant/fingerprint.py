"""The identity of quantized weights: one digest over codes and scales of any scheme."""

from collections.abc import Iterable
from hashlib import sha256

import torch
from torch import Tensor

from qlx.checkpoint import fingerprint_of_lines
from qlx.quant.codec import PackedTensor

__all__ = ["packed_fingerprint", "packed_line"]


def packed_fingerprint(tensors: Iterable[tuple[str, PackedTensor]]) -> str:
    """`sha256:…` over names, shapes, scheme, codes and stored scales of packed weights.

    Independent of their order and of the dtype they had before quantization: a base kept in
    bfloat16 and the same base loaded in float32 have the same codes, scales and fingerprint.
    """
    return fingerprint_of_lines(packed_line(name, packed) for name, packed in tensors)


def packed_line(name: str, packed: PackedTensor) -> str:
    """What one packed weight adds to a fingerprint; the weight is not needed afterwards."""
    form, parts = packed.identity()
    return f"{name!r} {form} {' '.join(_hash(part) for part in parts)}\n"


def _hash(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()
