"""What each scheme of packing stores: its groups, and whose layout its files have.

The layouts are those of the libraries that load them in transformers; `docs/decisions/0008` says why
these. Codes and scales are `qlx.quant`'s whatever the layout.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from qlx.checkpoint import QuantSpec
from qlx.errors import UsageError
from qlx.quant import (
    BLOCK_SIZES,
    FOUR_BIT,
    SCALE_DTYPE,
    PackedIntegers,
    PackedTensor,
    bitnet_entries,
    compressed_entries,
    compressed_section,
    packed_entries,
)

__all__ = [
    "WHOLE",
    "GroupSize",
    "Scheme",
    "fitted_to",
    "section_of",
    "spec_for",
    "stored_entries",
]

Scheme = Literal["nf4", "fp4", "int8", "int4", "int2", "ternary"]
GroupSize = int | Literal["whole"] | None

WHOLE: Literal["whole"] = "whole"
"""The group size that stands for one scale a row (int8, int4) or tensor (ternary)."""

_BITS: dict[Scheme, int] = {"nf4": 4, "fp4": 4, "int8": 8, "int4": 4, "int2": 2, "ternary": 2}
_DEFAULT_GROUP: dict[Scheme, int | None] = {to: None if to == "int8" else 64 for to in _BITS}
_BITNET_CLASS: Literal["autobitlinear"] = "autobitlinear"


def spec_for(
    to: Scheme,
    before: QuantSpec,
    group_size: GroupSize = None,
    double_quant: bool | None = None,
    zero_points: bool = False,
) -> QuantSpec:
    """How weights are packed to `to`.

    `before` is how they were quantized in training, from which double quantization is taken where
    it is not given. int2 has `zero_points` always, other integers where they are asked for.

    Raises:
        UsageError: a group size or double quantization that `to` does not take.
    """
    blocks = to in FOUR_BIT
    if double_quant and not blocks:
        raise UsageError(f"--double-quant: {to} has no scales of 8 bits; nf4 and fp4 have")
    trained = before.double_quant if before.quantized else True
    fields = {"double_quant": trained if double_quant is None else double_quant}
    if not blocks:
        fields = {"symmetric": to != "int2" and not zero_points}
    return QuantSpec(
        method="post-training",
        weight_bits=_BITS[to],
        scheme=to,
        group_size=_group_size(to, group_size),
        compute_dtype=before.compute_dtype,
        backend="bitsandbytes" if blocks else "compressed-tensors",
        **fields,
    )


def _group_size(to: Scheme, wanted: GroupSize) -> int | None:
    if wanted is None:
        return _DEFAULT_GROUP[to]
    whole = to not in FOUR_BIT
    if wanted == WHOLE and whole:
        return None
    if wanted not in BLOCK_SIZES:
        sizes = ", ".join(map(str, BLOCK_SIZES))
        raise UsageError(
            f"--group-size {wanted}: {to} takes one of {sizes}{f', or {WHOLE}' if whole else ''}"
        )
    return int(wanted)


def fitted_to(spec: QuantSpec, *, dtype: str, causal: bool, biased: bool) -> QuantSpec:
    """`spec` for a model whose weights are of `dtype` (`float32`) and whose packed layers may have biases.

    Integer scales are kept in that dtype, so that a library which computes in it gets every value
    exactly. The layout is that of a Hugging Face BitNet model where that can hold the codes: ternary
    ones with one scale a tensor in a causal language model without biases there (which
    transformers' layer would multiply by the scale). Its layers round their inputs to 8 bits, and
    so do ours then.
    """
    if spec.backend != "compressed-tensors":
        return spec
    fields: dict[str, object] = {} if dtype == "float32" else {"extras": {SCALE_DTYPE: dtype}}
    if spec.scheme == "ternary" and spec.group_size is None and causal and not biased:
        fields |= {"backend": "bitnet", "activation_bits": 8}
    return spec.model_copy(update=fields)


def stored_entries(packed: PackedTensor, name: str, spec: QuantSpec) -> dict[str, Tensor]:
    """The tensors to store for the weight `name`, in the layout that `spec` names.

    Raises:
        Unsupported: the layout cannot hold this weight.
    """
    if not isinstance(packed, PackedIntegers):
        return packed_entries(packed, name)
    if spec.backend == "bitnet":
        return bitnet_entries(packed, name, _BITNET_CLASS)
    return compressed_entries(packed, name)


def section_of(
    spec: QuantSpec, promoted: Mapping[str, str] | None = None
) -> dict[str, object] | None:
    """The `quantization_config` by which transformers builds packed layers exactly where there are codes.

    `promoted` maps modules (by their names in memory) to the scheme they have instead of that of `spec`.

    None where it is not transformers that loads the weights.
    """
    if spec.backend == "gguf":
        return None
    if spec.backend == "compressed-tensors":
        return compressed_section(spec, spec.skip_modules, promoted or {})
    if spec.backend == "bitnet":
        return {
            "quant_method": "bitnet",
            "linear_class": _BITNET_CLASS,
            "quantization_mode": "offline",
            "modules_to_not_convert": list(spec.skip_modules),
        }
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": spec.scheme,
        "bnb_4bit_use_double_quant": spec.double_quant,
        "bnb_4bit_compute_dtype": spec.compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(spec.skip_modules),
    }
