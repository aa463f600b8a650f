"""Quantized weights: codecs, stored layouts, and the layers that compute with packed weights.

One codec a scheme serves training, merging and packing: NF4 and FP4 equal to bitsandbytes, which
trains with their codes and is guarded where it is wrong on CPU; ternary, int4 and int8 in layers of
our own. Nothing here imports bitsandbytes until a function needs it.
"""

from qlx.quant.activations import quantize_activations
from qlx.quant.bitnet import bitnet_entries, packed_from_bitnet
from qlx.quant.codec import SCHEMES, PackedTensor, dequantize_tensor, quantize_tensor
from qlx.quant.codec4bit import (
    BLOCK_SIZES,
    FOUR_BIT,
    NestedScales,
    Packed4bit,
    levels,
    torch_dtype_of,
)
from qlx.quant.compressed import (
    ZERO_POINTS,
    compressed_entries,
    compressed_section,
    packed_from_compressed,
)
from qlx.quant.eight_bits import in_eight_bits, integer_levels
from qlx.quant.export_linear import IntegerMatMul, PackedLinear
from qlx.quant.fingerprint import packed_fingerprint, packed_line
from qlx.quant.fit import fitted_ternary
from qlx.quant.grid import EXACT_SCHEMES, Grid, Move
from qlx.quant.grid_file import GRID_FILE, grid_entries, grid_names, packed_on_grid
from qlx.quant.hf import bnb_config
from qlx.quant.integer_linear import IntegerLinear
from qlx.quant.integers import (
    SCALE_DTYPE,
    PackedIntegers,
    materialize,
    packed_from_codes,
)
from qlx.quant.layers import (
    HEAD_NAMES,
    Keep,
    eligible_modules,
    guard_bitsandbytes,
    head_modules,
    in_memory,
    kept,
    linear4bit_modules,
    names_part,
    packed_layer,
    packed_linears,
    packed_modules,
    packed_of_module,
    quantize_model,
    rounding_of_levels,
    set_compute_dtype,
)
from qlx.quant.layout import (
    entry_names,
    is_packed_weight,
    packed_entries,
    packed_from_entries,
)
from qlx.quant.pieces import packed_rows, quantize_rows, row_unit, value_unit
from qlx.quant.recompute import linear_learned
from qlx.quant.stored import STORED_BACKENDS, StoredQuantization, stored_quantization
from qlx.quant.threads import one_torch_thread
from qlx.quant.words import packed_from_awq, packed_from_gptq

__all__ = [
    "BLOCK_SIZES",
    "EXACT_SCHEMES",
    "FOUR_BIT",
    "GRID_FILE",
    "HEAD_NAMES",
    "SCALE_DTYPE",
    "SCHEMES",
    "STORED_BACKENDS",
    "ZERO_POINTS",
    "Grid",
    "IntegerLinear",
    "IntegerMatMul",
    "Keep",
    "Move",
    "NestedScales",
    "Packed4bit",
    "PackedIntegers",
    "PackedLinear",
    "PackedTensor",
    "StoredQuantization",
    "bitnet_entries",
    "bnb_config",
    "compressed_entries",
    "compressed_section",
    "dequantize_tensor",
    "eligible_modules",
    "entry_names",
    "fitted_ternary",
    "grid_entries",
    "grid_names",
    "guard_bitsandbytes",
    "head_modules",
    "in_eight_bits",
    "in_memory",
    "integer_levels",
    "is_packed_weight",
    "kept",
    "levels",
    "linear4bit_modules",
    "linear_learned",
    "materialize",
    "names_part",
    "one_torch_thread",
    "packed_entries",
    "packed_fingerprint",
    "packed_from_awq",
    "packed_from_bitnet",
    "packed_from_codes",
    "packed_from_compressed",
    "packed_from_entries",
    "packed_from_gptq",
    "packed_layer",
    "packed_line",
    "packed_linears",
    "packed_modules",
    "packed_of_module",
    "packed_on_grid",
    "packed_rows",
    "quantize_activations",
    "quantize_model",
    "quantize_rows",
    "quantize_tensor",
    "rounding_of_levels",
    "row_unit",
    "set_compute_dtype",
    "stored_quantization",
    "torch_dtype_of",
    "value_unit",
]
