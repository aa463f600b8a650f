"""A model that reads its weights while it runs gives the loaded model's outputs."""

import numpy as np
import pytest
import torch

from qlx.errors import Unsupported
from qlx.models import forward_logits, load_base, streamed, streamed_model
from qlx.weights import open_weights, read_tensors, write_tensors
from tests.adapter_support import TASKS, inputs_for, make_base


def distance(left, right):
    return float(np.linalg.norm(left - right) / np.linalg.norm(right))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["vit", "llama", "qwen3", "gpt2"])
def test_the_outputs_are_those_of_the_loaded_model(tmp_path, kind, tied, monkeypatch):
    directory = make_base(tmp_path / kind, kind, torch.bfloat16, tied=tied)
    inputs = inputs_for(kind)
    loaded = forward_logits(load_base(directory, TASKS[kind]), TASKS[kind], inputs)
    monkeypatch.setattr(streamed, "PIECE", 1000)  # several pieces a layer
    model = streamed_model(directory, TASKS[kind])
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    for _ in range(2):
        assert distance(forward_logits(model, TASKS[kind], inputs), loaded) < 1e-6
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


def test_a_change_of_one_tensor_shows(tmp_path):
    directory = make_base(tmp_path / "llama", "llama")
    inputs = inputs_for("llama")
    loaded = forward_logits(load_base(directory, "causal-lm"), "causal-lm", inputs)
    tensors = read_tensors(directory)
    tensors["model.layers.1.mlp.up_proj.weight"][3] *= 1.5
    write_tensors(directory / "model.safetensors", tensors)
    changed = forward_logits(streamed_model(directory, "causal-lm"), "causal-lm", inputs)
    assert distance(changed, loaded) > 1e-4


def test_fused_experts_are_refused_by_name(tmp_path):
    directory = make_base(tmp_path / "moe", "qwen3_moe")
    assert any("experts.0." in name for name in open_weights(directory))
    with pytest.raises(Unsupported, match=r"experts\.\w+' is not one tensor"):
        streamed_model(directory, "causal-lm")
