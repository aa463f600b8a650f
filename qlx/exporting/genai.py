"""The `genai_config.json` beside a language model: what onnxruntime-genai, and qlx.runtime, read.

Key names are those of onnxruntime-genai's own builder. Past and present are one buffer where the graph has
fused attention, and separate tensors elsewhere.
"""

from pathlib import Path
from typing import Any

from qlx.checkpoint import canonical_json
from qlx.runtime import GENERATION_FILE, GRAPH_FILE, generation_limits

__all__ = ["generation_config", "write_generation_config"]


def write_generation_config(directory: Path, model: Any, *, fused: bool) -> None:
    """Write the configuration of a transformers causal LM into `directory`; equal models give equal bytes."""
    (directory / GENERATION_FILE).write_bytes(canonical_json(generation_config(model, fused=fused)))


def generation_config(model: Any, *, fused: bool = False) -> dict[str, Any]:
    """The configuration as a value; `fused` says what attention the graph has.

    Raises:
        Unsupported: the model names no end token or no context length.
    """
    config, generation = model.config, model.generation_config
    length, ends = generation_limits(config, generation)
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": _first(generation.bos_token_id, config.bos_token_id, ends[0]),
            "eos_token_id": ends if len(ends) > 1 else ends[0],
            "pad_token_id": _first(generation.pad_token_id, config.pad_token_id, ends[0]),
            "context_length": length,
            "vocab_size": config.vocab_size,
            "decoder": _decoder(config),
        },
        "search": _search(length, fused),
    }


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _decoder(config: Any) -> dict[str, Any]:
    heads = config.num_attention_heads
    return {
        "filename": GRAPH_FILE,
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "hidden_size": config.hidden_size,
        "head_size": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "num_hidden_layers": config.num_hidden_layers,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }


def _search(length: int, fused: bool) -> dict[str, Any]:
    """Greedy by default, as qlx's own runtime is."""
    return {
        "do_sample": False,
        "early_stopping": True,
        "max_length": length,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": fused,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 1,
        "top_p": 1.0,
    }
