"""Tiny merged checkpoints whose adapter has a large effect, made once a session."""

import pytest
import torch

from qlx.checkpoint import QuantSpec
from qlx.merging import merge
from tests.adapter_support import NF4, Case, make_adapter, make_base

KINDS = ["vit", "llama"]
TERNARY = QuantSpec(
    method="qlora", weight_bits=2, scheme="ternary", symmetric=True, backend="qlx",
    extras={"scale_dtype": "float16"},
)  # fmt: skip
"""How a ternary model was trained whose scales GGUF can hold."""


def wide_llama(directory):
    """A base as wide as the blocks of GGUF's ternary types."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, vocab_size=96,
                         max_position_embeddings=32, pad_token_id=0)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    return {kind: make_base(tmp_path_factory.mktemp("base") / kind, kind) for kind in KINDS}


@pytest.fixture(scope="session")
def merged(tmp_path_factory, bases):
    """A merged checkpoint of each kind; the adapter was trained on NF4."""
    root = tmp_path_factory.mktemp("merged")
    made = {}
    for kind in KINDS:
        adapter = make_adapter(bases[kind], root / f"{kind}-adapter", Case(kind, NF4))
        made[kind] = merge(bases[kind], [adapter.path], root / kind)
    return made
