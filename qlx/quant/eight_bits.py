"""NF4 and FP4 codes said again as 8-bit integers, for kernels that multiply integers.

A value level[code] · absmax becomes integer[code] · (absmax / steps), where `steps` is how many integers an absmax
is divided into: the codes and scales decide everything, nothing is quantized again. The 16 integers are the levels
times `steps`, rounded, and `steps` is the number below 127 for which rounding changes the levels least.
"""

from functools import cache
from math import gcd

import torch
from torch import Tensor

from qlx.errors import Unsupported
from qlx.quant.bits import pack_integers
from qlx.quant.codec4bit import Packed4bit, Scheme, levels, unpack_codes
from qlx.quant.integers import PackedIntegers

__all__ = ["in_eight_bits", "integer_levels"]

_SMALLEST_RUN = 16
_FEWEST, _MOST, _EACH = 64, 127, 100  # candidates for steps: hundredths in between


@cache
def integer_levels(scheme: Scheme) -> tuple[Tensor, float]:
    """Integers [16] in the order of the codes, float32, and the steps that stand for 1.

    Chosen to make the sum of the squared errors of the 16 levels least, so equal on every machine.
    """
    exact = levels(scheme).double()
    steps = torch.arange(_FEWEST * _EACH, _MOST * _EACH + 1, dtype=torch.float64)[:, None] / _EACH
    errors = ((exact * steps).round() / steps - exact).square().sum(dim=1)
    best = steps[int(errors.argmin())]
    return (exact * best).round().float(), float(best)


def in_eight_bits(packed: Packed4bit) -> PackedIntegers:
    """The same weight [out, in] in int8, each run of inputs within one block of the original.

    Raises:
        Unsupported: not a matrix, or its blocks begin at inputs that are no multiple of 16.
    """
    if len(packed.shape) != 2:
        raise Unsupported(f"a weight of shape {[*packed.shape]} is no matrix")
    rows, columns = packed.shape
    run = gcd(columns, packed.block_size)
    if run < _SMALLEST_RUN:
        raise Unsupported(
            f"{columns} inputs in blocks of {packed.block_size} values cannot be said in integers: runs of {run} "
            f"inputs share a scale, and {_SMALLEST_RUN} must; export without --accuracy-level 4"
        )
    table, steps = integer_levels(packed.scheme)
    codes = table[unpack_codes(packed.codes, packed.count).int()].reshape(rows, columns)
    scales = packed.absmax.double().div(steps).float()
    scales = scales.repeat_interleave(packed.block_size // run)[: packed.count // run]
    return PackedIntegers(
        codes=pack_integers(codes, 8),
        scales=scales.reshape(rows, columns // run).contiguous(),
        zeros=None,
        groups=None,
        shape=(rows, columns),
        dtype=packed.dtype,
        scheme="int8",
        group_size=run,
    )
