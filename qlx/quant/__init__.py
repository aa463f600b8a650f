"""Quantized weights: the 4-bit codec, its stored layout, and the layers that compute with it.

One codec serves training, merging and packing; bitsandbytes trains with the codes it makes, and is
guarded where it is wrong on CPU. Nothing here imports bitsandbytes until a function needs it.
"""

from qlx.quant.codec4bit import (
    NestedScales,
    PackedTensor,
    dequantize_tensor,
    levels,
    quantize_tensor,
    torch_dtype_of,
)
from qlx.quant.export_linear import PackedLinear, packed_linears
from qlx.quant.hf import bnb_config
from qlx.quant.layers import (
    HEAD_NAMES,
    eligible_modules,
    guard_bitsandbytes,
    head_modules,
    linear4bit_modules,
    names_part,
    packed_of_module,
    quantize_model,
    set_compute_dtype,
)
from qlx.quant.layout import (
    entry_names,
    is_packed_weight,
    packed_entries,
    packed_fingerprint,
    packed_from_entries,
)

__all__ = [
    "HEAD_NAMES",
    "NestedScales",
    "PackedLinear",
    "PackedTensor",
    "bnb_config",
    "dequantize_tensor",
    "eligible_modules",
    "entry_names",
    "guard_bitsandbytes",
    "head_modules",
    "is_packed_weight",
    "levels",
    "linear4bit_modules",
    "names_part",
    "packed_entries",
    "packed_fingerprint",
    "packed_from_entries",
    "packed_linears",
    "packed_of_module",
    "quantize_model",
    "quantize_tensor",
    "set_compute_dtype",
    "torch_dtype_of",
]
