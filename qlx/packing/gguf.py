"""`pack --to gguf`: one file for llama.cpp, written tensor by tensor through the package gguf.

Linear layers get the chosen type, as far as their inputs fill its blocks; embeddings, heads and what
is left over 16 bits; norms and biases 32. Ternary types get codes of `qlx.quant`'s own codec, whose
scale is fitted; the package would take the largest magnitude for the scale.
"""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from qlx.checkpoint import QuantSpec
from qlx.errors import InputRefused, UsageError, require
from qlx.models import GGUF_FILE, ROPE_FACTORS, GgufLayout, gguf_layout, model_config
from qlx.packing.gguf_metadata import add_model_metadata, rope_factors
from qlx.packing.gguf_tokenizer import add_tokenizer
from qlx.packing.retention import LayerRetention, layer_retention
from qlx.packing.select import Selection
from qlx.packing.source import Weights
from qlx.quant import SCALE_DTYPE, PackedIntegers, fitted_ternary, quantize_tensor

__all__ = ["GGUF_TYPE", "GGUF_TYPES", "GgufType", "gguf_spec", "write_gguf"]

GgufType = Literal["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0", "TQ2_0"]
GGUF_TYPES: tuple[GgufType, ...] = get_args(GgufType)
"""The types of tensors that can be written."""

GGUF_TYPE = "gguf_type"
"""Key in `QuantSpec.extras`: the type of the packed tensors."""

_DEFAULT: GgufType = "Q8_0"
_BITS: Mapping[GgufType, int] = {
    "F16": 16, "BF16": 16, "Q8_0": 8, "Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "TQ1_0": 2, "TQ2_0": 2,
}  # fmt: skip
_BLOCK: Mapping[int, int | None] = {16: None, 8: 32, 5: 32, 4: 32, 2: 256}
_QUANTIZATION_VERSION = 2


def gguf_spec(wanted: str | None, before: QuantSpec) -> QuantSpec:
    """How weights are packed to GGUF; `before` is how they were quantized in training.

    Raises:
        UsageError: not one of `GGUF_TYPES`.
    """
    kind = next((name for name in GGUF_TYPES if name == (wanted or _DEFAULT)), None)
    if kind is None:
        raise UsageError(f"--gguf-type takes one of {', '.join(GGUF_TYPES)}, not {wanted}")
    bits = _BITS[kind]
    return QuantSpec(
        method="post-training",
        weight_bits=bits,
        group_size=_BLOCK[bits],
        symmetric=not kind.endswith("_1"),
        compute_dtype=before.compute_dtype,
        backend="gguf",
        extras={GGUF_TYPE: kind},
    )


def write_gguf(
    staging: Path,
    weights: Weights,
    companions: Path,
    selection: Selection,
    spec: QuantSpec,
    title: str,
) -> list[LayerRetention]:
    """Write `model.gguf` into `staging`; how much of each layer's change survives.

    `companions` holds the configuration and the tokenizer, `title` is the model's name in the file.

    Raises:
        Unsupported: an architecture, tokenizer or tensor that llama.cpp has no place for.
        InputRefused: values that are not finite, or too large for the type.
        MissingExtra: the package gguf is not installed.
    """
    gguf = require("gguf", "gguf")
    layout = gguf_layout(model_config(companions, "causal-lm"))
    kind = str(spec.extras[GGUF_TYPE])
    writer = gguf.GGUFWriter(staging / GGUF_FILE, layout.architecture)
    writer.add_name(title)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    add_model_metadata(writer, layout)
    add_tokenizer(writer, companions, layout.config.vocab_size)
    types = _types(weights, layout, selection, kind)
    factors = rope_factors(layout)
    for name, kind in types.items():
        _announce(writer, layout.name(name), weights.shape(name), kind)
    if factors is not None:
        _announce(writer, ROPE_FACTORS, tuple(factors.shape), "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    layers: list[LayerRetention] = []
    for name, kind in types.items():
        writer.write_tensor_data(_data(weights, layout, name, kind, layers))
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    writer.close()
    return layers


def _types(weights: Weights, layout: GgufLayout, selection: Selection, kind: str) -> dict[str, str]:
    """The type of every tensor to write, by its name here."""
    chosen = set(selection.tensors.values())
    sixteen = "BF16" if kind == "BF16" else "F16"
    tied = {"lm_head.weight"} if layout.config.tie_word_embeddings else set()
    return {
        name: kind if name in chosen else sixteen if len(weights.shape(name)) > 1 else "F32"
        for name in weights.names()
        if name not in tied
    }


def _announce(writer: Any, name: str, shape: tuple[int, ...], kind: str) -> None:
    """Give the writer a tensor's place; its data follows in the same order."""
    gguf = require("gguf", "gguf")
    known = gguf.GGMLQuantizationType[kind]
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[known]
    size = prod(shape) // per_block * block_bytes
    writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=known)


def _data(
    weights: Weights, layout: GgufLayout, name: str, kind: str, layers: list[LayerRetention]
) -> Any:
    """The bytes of one tensor as a numpy array; adds what survives of its change to `layers`."""
    gguf = require("gguf", "gguf")
    values = layout.stored(name, weights.value(name, full=True))
    on_grid = _ternary(values) if kind.startswith("TQ") else values
    with np.errstate(over="ignore"):  # what is too large shows in the values
        data = gguf.quants.quantize(on_grid.contiguous().numpy(), gguf.GGMLQuantizationType[kind])
    packed = torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]))
    if not bool(torch.isfinite(packed).all()):
        raise InputRefused(
            f"tensor {name!r}: holds NaN, an infinity, or values too large for {kind}"
        )
    before = weights.before(name)
    if before is not None:
        layers.append(layer_retention(name, layout.stored(name, before), values, packed))
    return data


def _ternary(values: Tensor) -> Tensor:
    """The nearest values on a ternary grid whose scales, one a block, are float16 as the file's."""
    spec = QuantSpec(scheme="ternary", group_size=_BLOCK[2], extras={SCALE_DTYPE: "float16"})
    packed = quantize_tensor(values, spec)
    assert isinstance(packed, PackedIntegers)
    return fitted_ternary(packed, values).values()
