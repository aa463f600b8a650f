"""Small directories for the commands to look at, made without any heavy library."""

import json

import numpy as np
import pytest

from qlx.checkpoint import (
    AdapterSpec,
    BaseRef,
    Manifest,
    QuantSpec,
    new_checkpoint,
    next_step,
    seal,
)
from qlx.weights import write_arrays

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128, "vocab_size": 32,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def plain_model(tmp_path):
    """A directory as transformers would save it (one tensor is enough to look at)."""
    directory = tmp_path / "plain-model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG))
    write_arrays(
        directory / "model.safetensors",
        {"model.embed_tokens.weight": np.ones((32, 64), np.float32)},
    )
    return directory


@pytest.fixture
def plain_adapter(tmp_path):
    """A directory as PEFT would save it."""
    directory = tmp_path / "plain-adapter"
    directory.mkdir()
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "owner/model",
        "r": 8,
        "lora_alpha": 16,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def adapter(tmp_path):
    """A checkpoint of kind adapter, as far as its manifest goes."""
    manifest = Manifest(
        kind="adapter",
        task="causal-lm",
        tag="tiny_SFT_LoRa8",
        base=BaseRef(name="owner/model", revision="main", fingerprint="sha256:" + "a" * 64),
        quantization=QuantSpec(
            method="qlora", scheme="nf4", weight_bits=4, group_size=64, double_quant=True,
            modules=("layers.0.q_proj",), tensors=("layers.0.q_proj.weight",),
        ),
        adapter=AdapterSpec(
            rank=8, alpha=16.0, targets=("q_proj",), tensors={"layers.0.q_proj": "q.weight"},
            trained_parameters=1024, total_parameters=102400,
        ),
        lineage=(next_step("train", parents=()), next_step("save-adapter", parents=())),
    )  # fmt: skip
    target = tmp_path / "adapter"
    with new_checkpoint(target) as staging:
        (staging / "adapter_config.json").write_text('{"r": 8}')
        seal(staging, manifest)
    return target
