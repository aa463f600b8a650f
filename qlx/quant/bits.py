"""Codes of 2, 4 or 8 bits in bytes, row by row, the first code in the lowest bits.

A code q counts from the middle of its range, -2^(b-1) ≤ q < 2^(b-1), and is kept as the unsigned
number q + 2^(b-1). Rows begin at whole bytes; what a last byte has left over holds zeros (q = 0).
This is the order of onnxruntime's MatMulNBits, whose default zero point is the same middle.
"""

from functools import cache

import torch
from torch import Tensor

__all__ = ["pack_integers", "row_bytes", "unpack_integers"]


def row_bytes(columns: int, bits: int) -> int:
    """Bytes that a row of codes takes."""
    return -(-columns * bits // 8)


def pack_integers(codes: Tensor, bits: int) -> Tensor:
    """Codes [rows, columns] of any integer or whole float type to uint8 [rows, row_bytes]."""
    per, rows = 8 // bits, codes.shape[0]
    unsigned = codes.to(torch.int16) + (1 << (bits - 1))
    missing = -codes.shape[1] % per
    unsigned = torch.nn.functional.pad(unsigned, (0, missing), value=1 << (bits - 1))
    shifts = torch.arange(per, device=codes.device, dtype=torch.int16) * bits
    shifted = unsigned.view(rows, -1, per) << shifts  # bytes at most, so 16 bits hold them
    return shifted.sum(dim=-1, dtype=torch.int16).to(torch.uint8)


def unpack_integers(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The codes of uint8 [rows, row_bytes], as float32 [rows, columns] (each exactly an integer)."""
    if bits == 8:  # one code a byte: a subtraction is faster than a look-up
        return packed.float().sub_(128)
    table = _codes_of_bytes(bits).to(packed.device)
    codes = table.index_select(0, packed.reshape(-1).int())
    return codes.view(packed.shape[0], -1)[:, :columns]


@cache
def _codes_of_bytes(bits: int) -> Tensor:
    """The codes that each byte holds, float32 [256, 8 / bits]."""
    shifts = torch.arange(8 // bits) * bits
    unsigned = (torch.arange(256)[:, None] >> shifts) & ((1 << bits) - 1)
    return (unsigned - (1 << (bits - 1))).float()
