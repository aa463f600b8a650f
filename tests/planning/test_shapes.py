"""Shapes against published parameter counts, and against the models that transformers builds."""

import pytest

from qlx.errors import Unsupported
from qlx.planning import PUBLIC_SHAPES, shape_from_config, shape_from_count
from qlx.planning.shapes import roles_of

PUBLISHED = {  # total parameters, from the model cards
    "HuggingFaceTB/SmolLM2-135M": 134.5e6,
    "Qwen/Qwen2.5-0.5B": 494e6,
    "Qwen/Qwen3-0.6B": 596e6,
    "TinyLlama/TinyLlama-1.1B": 1.1e9,
    "meta-llama/Llama-3.2-1B": 1.236e9,
    "Qwen/Qwen2.5-1.5B": 1.544e9,
    "Qwen/Qwen3-1.7B": 1.72e9,
    "Qwen/Qwen-1.8B": 1.837e9,
    "meta-llama/Llama-3.2-3B": 3.213e9,
    "Qwen/Qwen3-4B": 4.022e9,
    "meta-llama/Llama-2-7b": 6.738e9,
    "Qwen/Qwen2.5-7B": 7.616e9,
    "Qwen/Qwen-7B": 7.721e9,
    "meta-llama/Llama-3.1-8B": 8.030e9,
    "meta-llama/Llama-2-13b": 13.016e9,
    "Qwen/Qwen-14B": 14.17e9,
    "Qwen/Qwen2.5-14B": 14.77e9,
    "Qwen/Qwen2.5-32B": 32.76e9,
    "huggyllama/llama-30b": 32.53e9,
    "huggyllama/llama-65b": 65.29e9,
    "meta-llama/Llama-3.1-70B": 70.55e9,
    "Qwen/Qwen-72B": 72.3e9,
    "google/vit-base-patch16-224": 86.6e6,
    "google/vit-base-patch16-224-in21k": 86.6e6,
    "google/vit-large-patch16-224": 304.3e6,
}


def test_every_public_shape_has_the_published_parameter_count():
    assert PUBLISHED.keys() == PUBLIC_SHAPES.keys()
    off = {n: s.parameters / PUBLISHED[n] - 1 for n, s in PUBLIC_SHAPES.items()}
    assert {name: error for name, error in off.items() if abs(error) > 0.005} == {}


@pytest.mark.parametrize("count", [3e8, 7.5e8, 2.4e9, 5.5e9, 1e10, 2.1e10, 4.5e10])
def test_a_count_between_public_models_is_met(count):
    shape = shape_from_count(int(count))
    assert shape.parameters == pytest.approx(count, rel=0.05)
    assert shape.hidden % 128 == 0
    assert shape.intermediate >= shape.hidden


def test_a_count_near_a_public_model_takes_its_shape():
    assert shape_from_count(7 * 10**9).name == "meta-llama/Llama-2-7b"


@pytest.mark.parametrize("count", [10**7, 10**12])
def test_a_count_far_from_every_public_model_is_refused(count):
    with pytest.raises(Unsupported, match="no public model"):
        shape_from_count(count)


def _built(config_class, model_class, **sizes):
    config = config_class(**sizes)
    return config.to_dict(), model_class(config)


def _linear_weights(model, exclude):
    import torch

    return sum(
        m.weight.numel()
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and not any(e in name for e in exclude)
    )


@pytest.mark.parametrize("kind", ["llama", "qwen3", "vit"])
def test_a_config_gives_the_counts_of_the_model_that_transformers_builds(kind):
    import transformers as t

    text = {
        "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 300,
        "num_key_value_heads": 2, "intermediate_size": 160, "tie_word_embeddings": False,
    }  # fmt: skip
    image = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 4,
        "intermediate_size": 128, "image_size": 16, "num_labels": 10,
    }  # fmt: skip
    classes = {
        "llama": (t.LlamaConfig, t.LlamaForCausalLM, text),
        "qwen3": (t.Qwen3Config, t.Qwen3ForCausalLM, {**text, "head_dim": 32}),
        "vit": (t.ViTConfig, t.ViTForImageClassification, image),
    }
    config_class, model_class, sizes = classes[kind]
    config, model = _built(config_class, model_class, **sizes)
    shape = shape_from_config(config)
    assert shape.linear_parameters == _linear_weights(model, ("lm_head", "classifier"))
    total = sum(p.numel() for p in model.parameters())
    assert shape.parameters == pytest.approx(total, rel=0.03)  # biases and norms of ViT


def test_a_config_without_sizes_is_refused():
    with pytest.raises(Unsupported, match="hidden_size"):
        shape_from_config({"model_type": "mystery"})


def test_targets_of_each_family_name_the_same_parts():
    assert roles_of(("q_proj", "v_proj")) == roles_of(("query", "value")) == ("q", "v")
    assert set(roles_of(("all-linear",))) == {"q", "k", "v", "o", "gate", "up", "down"}
    with pytest.raises(Unsupported, match="conv1d_7"):
        roles_of(("q_proj", "conv1d_7"))
