"""Quantization while transformers loads a model (`mode: hf`), as opposed to afterwards by qlx."""

import re
from typing import Any

from qlx.checkpoint import QuantSpec
from qlx.errors import Unsupported, require
from qlx.quant.codec4bit import FOUR_BIT, torch_dtype_of
from qlx.quant.layers import HEAD_NAMES

__all__ = ["bnb_config"]


def bnb_config(spec: QuantSpec) -> Any:
    """The `transformers.BitsAndBytesConfig` that quantizes as `spec` says.

    Heads are always in the skip list: transformers by itself quantizes the classifier of a ViT.
    Guard the loaded model (`guard_bitsandbytes`) before its first forward.

    Raises:
        Unsupported: a scheme other than nf4 and fp4, or a group size other than 64, the only one
            transformers offers.
    """
    if spec.scheme not in FOUR_BIT:
        raise Unsupported(f"mode hf quantizes to nf4 and fp4, not {spec.scheme}; use mode manual")
    if spec.group_size not in (None, 64):
        raise Unsupported(
            f"mode hf quantizes in blocks of 64, not {spec.group_size}; use mode manual"
        )
    transformers = require("transformers", "train")
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.scheme,
        bnb_4bit_use_double_quant=spec.double_quant,
        bnb_4bit_compute_dtype=torch_dtype_of(spec.compute_dtype),
        llm_int8_skip_modules=[_whole(entry) for entry in (*HEAD_NAMES, *spec.skip_modules)],
    )


def _whole(entry: str) -> str:
    """The expression by which transformers skips what `names_part` says; a bare `fc` means `c_fc`, too."""
    return rf"(.*\.)?{re.escape(entry)}"
