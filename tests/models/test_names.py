"""Tensor names in memory and on disk, for real saved files of every known architecture."""

import pytest
import torch
import transformers

from qlx.models import plain_names, tensor_names
from qlx.weights import open_weights, read_tensors

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
VISION = {**SMALL, "image_size": 16, "patch_size": 8, "num_labels": 3}
TEXT = {
    **SMALL,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "num_key_value_heads": 2,
    "head_dim": 32,
}

MODELS = {
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**VISION)),
    "deit": lambda: transformers.DeiTForImageClassification(transformers.DeiTConfig(**VISION)),
    "dinov2": lambda: transformers.Dinov2ForImageClassification(
        transformers.Dinov2Config(**VISION)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**{k: v for k, v in TEXT.items() if k != "head_dim"})
    ),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**TEXT, tie_word_embeddings=True)
    ),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**TEXT)),
    "gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**TEXT)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**TEXT)),
    "gemma3_text": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**TEXT)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=64, n_positions=32)
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    torch.manual_seed(0)
    model = MODELS[request.param]()
    directory = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(directory)
    return model, directory


def test_names_are_those_of_the_saved_file(saved):
    model, directory = saved
    names = tensor_names(model)
    assert sorted(names.values()) == sorted(open_weights(directory))
    state, stored = model.state_dict(), read_tensors(directory)
    for name, on_disk in names.items():
        assert torch.equal(state[name], stored[on_disk]), name


def test_load_side_agrees(saved):
    model, directory = saved
    loaded = type(model).from_pretrained(directory)
    from_files = tensor_names(loaded, directory)
    assert from_files == tensor_names(loaded) == tensor_names(model)


def test_vit_names_differ_at_all(tmp_path):
    names = tensor_names(MODELS["vit"]())
    changed = {name: stored for name, stored in names.items() if name != stored}
    assert (
        changed["vit.layers.0.attention.q_proj.weight"]
        == "vit.encoder.layer.0.attention.attention.query.weight"
    )


def test_files_saved_without_their_head(tmp_path):
    """The hub's GPT-2 has no `transformer.` prefix, a ViT backbone no `vit.`."""
    gpt2 = MODELS["gpt2"]()
    gpt2.transformer.save_pretrained(tmp_path / "gpt2")
    names = tensor_names(gpt2, tmp_path / "gpt2")
    assert names["transformer.h.0.attn.c_attn.weight"] == "h.0.attn.c_attn.weight"
    stored = read_tensors(tmp_path / "gpt2")
    for name, on_disk in names.items():
        assert torch.equal(gpt2.state_dict()[name], stored[on_disk])
    vit = MODELS["vit"]()
    vit.vit.save_pretrained(tmp_path / "vit")
    names = tensor_names(vit, tmp_path / "vit")
    assert (
        names["vit.layers.0.attention.q_proj.weight"]
        == "encoder.layer.0.attention.attention.query.weight"
    )


def test_names_of_quantized_and_adapted_models_are_the_plain_ones():
    from peft import LoraConfig, get_peft_model

    from qlx.checkpoint import QuantSpec
    from qlx.quant import quantize_model

    model = MODELS["vit"]()
    plain = tensor_names(model)
    quantize_model(model, QuantSpec(method="qlora", scheme="nf4", weight_bits=4, group_size=64))
    assert tensor_names(model) == plain
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"])
    )
    assert tensor_names(adapted) == plain
    modules = set(plain_names(adapted).values())
    assert {"vit.layers.0.attention.q_proj", "classifier"} <= modules


def test_buffers_that_are_not_saved_are_not_named():
    assert not [name for name in tensor_names(MODELS["llama"]()) if "inv_freq" in name]
