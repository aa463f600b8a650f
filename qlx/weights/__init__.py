"""Safetensors bytes: strict header check, shards, and deterministic writing. No meaning, only bytes."""

from qlx.weights.arrays import (
    lay_out,
    read_arrays,
    read_into,
    read_rows,
    read_tensor,
    read_tensors,
    torch_dtype,
    torch_dtype_name,
    write_arrays,
    write_raw,
    write_tensors,
)
from qlx.weights.header import DTYPE_BYTES, Header, TensorInfo, read_header
from qlx.weights.shards import ADAPTER_FILE, INDEX_FILE, SINGLE_FILE, WeightSet, open_weights

__all__ = [
    "ADAPTER_FILE",
    "DTYPE_BYTES",
    "INDEX_FILE",
    "SINGLE_FILE",
    "Header",
    "TensorInfo",
    "WeightSet",
    "lay_out",
    "open_weights",
    "read_arrays",
    "read_header",
    "read_into",
    "read_rows",
    "read_tensor",
    "read_tensors",
    "torch_dtype",
    "torch_dtype_name",
    "write_arrays",
    "write_raw",
    "write_tensors",
]
