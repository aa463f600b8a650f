"""What a GGUF file says of a model beside its tensors, by the keys of llama.cpp, and what it cannot say.

llama.cpp fixes in code what transformers leaves to the configuration (activation, scale of attention,
pattern of windows). A model that differs there would load and compute something else, so it is refused.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qlx.errors import Unsupported
from qlx.models import GgufLayout

__all__ = ["add_model_metadata", "rope_factors"]

_ACTIVATIONS: Mapping[str, str] = {"gemma": "gelu_pytorch_tanh"}
_WINDOW_EVERY: Mapping[str, int] = {"gemma2": 2, "gemma3": 6}
_LOCAL_THETA = 10000.0  # of Gemma 3's layers with a window


def add_model_metadata(writer: Any, layout: GgufLayout) -> None:
    """Add sizes, rotary embedding and the like to a `gguf.GGUFWriter`.

    Raises:
        Unsupported: llama.cpp would compute something else than transformers.
    """
    config = layout.config
    rope = _rope(layout)
    _require_expressible(layout, rope)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(_context(layout))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(layout.head_dim)
    writer.add_value_length(layout.head_dim)
    writer.add_rope_dimension_count(layout.head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if rope.get("rope_type", "default") == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if layout.architecture in _WINDOW_EVERY:
        writer.add_sliding_window(config.sliding_window)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        value = getattr(config, name, None)
        if value is not None:
            getattr(writer, f"add_{name}")(float(value))


def _context(layout: GgufLayout) -> int:
    """The longest text; no longer than a window that llama.cpp does not know of in this architecture."""
    longest = int(layout.config.max_position_embeddings)
    if layout.architecture in _WINDOW_EVERY:
        return longest
    return min(longest, int(getattr(layout.config, "sliding_window", None) or longest))


def rope_factors(layout: GgufLayout) -> Tensor | None:
    """What each rotary frequency is divided by, float32 [head_dim / 2]; None where it is not scaled so.

    The rule is Llama 3.1's: long waves are divided by `factor`, short ones not, those between by an
    interpolated number.
    """
    rope = _rope(layout)
    if rope.get("rope_type") != "llama3":
        return None
    exponents = torch.arange(0, layout.head_dim, 2, dtype=torch.float32) / layout.head_dim
    waves = 2 * torch.pi * float(rope["rope_theta"]) ** exponents
    factor, low, high = (float(rope[f]) for f in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = float(rope["original_max_position_embeddings"]) / waves
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _rope(layout: GgufLayout) -> dict[str, Any]:
    """The rotary parameters; of a model with windows those of the layers without one."""
    given = dict(getattr(layout.config, "rope_parameters", None) or {})
    return dict(given.get("full_attention", given))


def _require_expressible(layout: GgufLayout, rope: Mapping[str, Any]) -> None:
    config, name = layout.config, layout.config.model_type
    scaled = rope.get("rope_type", "default")
    if scaled not in (
        "default",
        "linear",
        *(("llama3",) if layout.architecture == "llama" else ()),
    ):
        raise Unsupported(f"rotary embeddings of type {scaled!r} cannot be written as GGUF yet")
    wanted = _ACTIVATIONS.get(layout.architecture[:5], "silu")
    used = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", wanted)
    if used != wanted:
        raise Unsupported(f"llama.cpp's {name} has the activation {wanted}, this model {used}")
    if layout.architecture in _WINDOW_EVERY:
        _require_gemma(layout)
    elif getattr(config, "use_sliding_window", False):
        raise Unsupported(f"llama.cpp's {name} has no attention windows, this model has")


def _require_gemma(layout: GgufLayout) -> None:
    config, every = layout.config, _WINDOW_EVERY[layout.architecture]
    if config.query_pre_attn_scalar != layout.head_dim:
        raise Unsupported(
            f"llama.cpp scales this architecture's attention by its head size {layout.head_dim}, "
            f"this model by {config.query_pre_attn_scalar} (query_pre_attn_scalar)"
        )
    kinds = ["full_attention" if (at + 1) % every == 0 else "sliding_attention"
             for at in range(config.num_hidden_layers)]  # fmt: skip
    local = dict(config.rope_parameters or {}).get("sliding_attention") or {}
    if list(config.layer_types) != kinds or local.get("rope_theta", _LOCAL_THETA) != _LOCAL_THETA:
        raise Unsupported(
            "llama.cpp fixes which layers of this architecture have windows and how they rotate, "
            "and this model's are others"
        )
