"""A readable name for what a training made, such as `Qwen3-0.6B-openmath_SFT_LoRa64_QLORA_w4_headbf16`."""

import re

from qlx.checkpoint import QuantSpec
from qlx.recipe import AdapterSection, Recipe

__all__ = ["tag_of"]

_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_LONGEST = 200


def tag_of(recipe: Recipe, base_name: str | None, spec: QuantSpec) -> str:
    """Base, data, kind of training, adapter, quantization of the base and the dtype of the head."""
    base = _word((base_name or "").rstrip("/").rpartition("/")[2])
    data = _word(
        recipe.data.variant
        if recipe.data.source == "digits"
        else (recipe.data.path or recipe.data.source)
    )
    subject = f"{base}-{data}" if base else recipe.name
    parts = [subject, "SFT" if base else "PT"]
    if recipe.adapter is not None:
        parts.append(f"{_kind(recipe.adapter)}{recipe.adapter.rank}")
    if spec.quantized:
        double = "-dq" if spec.double_quant else ""
        parts += ["QLORA", f"w{spec.weight_bits}-{spec.scheme}{double}"]
    parts.append(f"head{_SHORT[recipe.base.dtype]}")
    return "_".join(parts)[:_LONGEST]


def _kind(adapter: AdapterSection) -> str:
    """What adapters of its kind are called; what a LoRA began as goes before how it is scaled."""
    if adapter.type == "vera":
        return "VeRa"
    if adapter.exact:
        return "FoldedLoRa" if adapter.folded else "ExactLoRa"
    started = {"pissa": "PiSSA", "loftq": "LoftQ"}.get(adapter.initialisation)
    scaled = "rsLoRa" if adapter.use_rslora else "LoRa"
    return started or ("DoRa" if adapter.use_dora else scaled)


def _word(text: str) -> str:
    """The last path component with everything but letters, digits, dots and dashes made a dash."""
    last = text.rstrip("/").rpartition("/")[2]
    return re.sub(
        r"[^A-Za-z0-9.]+", "-", last.rpartition(".")[0] if "." in last[1:] and "/" in text else last
    ).strip("-")
