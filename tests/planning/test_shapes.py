"""Shapes against published parameter counts, and against the models that transformers builds."""

import pytest

from qlx.errors import Unsupported
from qlx.planning import PUBLIC_SHAPES, shape_from_config, shape_from_count
from qlx.planning.families import FAMILIES
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


TEXT = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "vocab_size": 300,
}  # fmt: skip
IMAGES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 4,
    "image_size": 16, "id2label": {"0": "a", "1": "b", "2": "c"},
}  # fmt: skip
POSES = {
    "backbone_config": {**IMAGES, "mlp_ratio": 2}, "use_simple_decoder": True, "id2label": IMAGES["id2label"],
}  # fmt: skip
EXPERTS = {**TEXT, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 300}
OPT = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300,
    "ffn_dim": 96,
}  # fmt: skip
CONFIGS = [
    *((kind, TEXT) for kind in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")),
    *((kind, TEXT) for kind in ("phi3", "bitnet", "mixtral")),
    ("llama", {**TEXT, "attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    ("llama", {**TEXT, "tie_word_embeddings": True}),
    ("gemma", {**TEXT, "tie_word_embeddings": False}),
    ("mixtral", {**TEXT, "num_local_experts": 3}),
    ("qwen3_moe", EXPERTS),
    ("qwen3_moe", {**EXPERTS, "num_hidden_layers": 4, "mlp_only_layers": [1], "decoder_sparse_step": 2}),
    ("gpt2", GPT2),
    ("gpt2", {**GPT2, "n_inner": 100, "n_positions": 50}),
    ("opt", OPT),
    ("opt", {**OPT, "enable_bias": False, "tie_word_embeddings": False}),
    ("opt", {**OPT, "word_embed_proj_dim": 32}),
    ("vit", {**IMAGES, "intermediate_size": 96}),
    ("vit", {**IMAGES, "qkv_bias": False}),
    ("deit", {**IMAGES, "intermediate_size": 96}),
    ("dinov2", {**IMAGES, "mlp_ratio": 2}),
    ("dinov2", {**IMAGES, "use_swiglu_ffn": True}),
    ("vitpose", POSES),
    ("vitpose", {**POSES, "use_simple_decoder": False}),
]  # fmt: skip


def _built(kind, fields):
    """The model that transformers builds, without memory."""
    import torch
    import transformers

    classes = {"vit": "ViT", "deit": "DeiT", "dinov2": "Dinov2"}
    if kind == "phi3":  # its default padding is outside of a small vocabulary
        fields = {**fields, "pad_token_id": 0}
    if kind == "vitpose":
        backbone = {
            **fields["backbone_config"],
            "model_type": "vitpose_backbone",
            "out_indices": [2],
        }
        fields = {**fields, "backbone_config": backbone}
    config = transformers.CONFIG_MAPPING[kind].from_dict(fields)
    with torch.device("meta"):
        if kind in classes:
            return getattr(transformers, f"{classes[kind]}ForImageClassification")(config)
        if kind == "vitpose":
            return transformers.VitPoseForPoseEstimation(config)
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(("kind", "fields"), CONFIGS)
def test_every_part_is_one_of_the_model_that_transformers_builds(kind, fields):
    model = _built(kind, fields)
    shape = shape_from_config({"model_type": kind, **fields})
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    modules = dict(model.named_modules())
    sizes = {
        part.name: sum(p.numel() for p in modules[part.name].parameters(recurse=False))
        for part in shape.parts
    }
    assert sizes == {part.name: part.weights + part.biases for part in shape.parts}
    assert shape.gated == (bool(shape.experts) or any("gate_" in name for name in modules))


@pytest.mark.parametrize(("kind", "fields"), CONFIGS)
def test_what_transformers_saves_of_a_config_gives_the_same_shape(kind, fields):
    saved = _built(kind, fields).config.to_dict()
    assert shape_from_config(saved) == shape_from_config({"model_type": kind, **fields})


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in CONFIGS}))
def test_what_is_omitted_is_what_transformers_takes(kind):
    """Of the fields that a shape depends on; GPT-2's ratio is implied, and ViTPose's are its backbone's."""
    import transformers

    config_class = transformers.CONFIG_MAPPING["vitpose_backbone" if kind == "vitpose" else kind]
    family = FAMILIES[kind]
    known = {name: getattr(config_class, name, None) for name in family.defaults}
    assert known | ({"mlp_ratio": 4} if kind == "gpt2" else {}) == family.defaults
    whole = {"num_key_value_heads", "head_dim", "tie_word_embeddings", *family.switches}
    for name in whole - family.defaults.keys():
        assert not getattr(config_class, name, None), name


PUBLISHED_CONFIGS = [
    (30.53e9, {"model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
               "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144, "vocab_size": 151936,
               "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
               "mlp_only_layers": [], "decoder_sparse_step": 1, "tie_word_embeddings": False}),
    (46.70e9, {"model_type": "mixtral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
               "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 32000, "num_local_experts": 8,
               "num_experts_per_tok": 2, "tie_word_embeddings": False}),
    (1.316e9, {"model_type": "opt", "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32,
               "ffn_dim": 8192, "vocab_size": 50272, "max_position_embeddings": 2048, "word_embed_proj_dim": 2048}),
    (2.506e9, {"model_type": "gemma", "hidden_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 8,
               "num_key_value_heads": 1, "head_dim": 256, "intermediate_size": 16384, "vocab_size": 256000}),
    (124.4e6, {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257,
               "n_positions": 1024}),
]  # fmt: skip


@pytest.mark.parametrize(("count", "config"), PUBLISHED_CONFIGS)
def test_a_published_config_has_the_published_parameter_count(count, config):
    assert shape_from_config(config).parameters == pytest.approx(count, rel=0.002)


def test_a_config_without_sizes_is_refused():
    with pytest.raises(Unsupported, match=r"base/config\.json: .*hidden_size"):
        shape_from_config({"model_type": "llama"}, "base/config.json")
    with pytest.raises(Unsupported, match="intermediate_size"):
        shape_from_config({"model_type": "llama", **TEXT, "intermediate_size": None})


def test_a_config_with_layers_without_end_is_refused():
    with pytest.raises(Unsupported, match="1,000,000,000 layers"):
        shape_from_config({**EXPERTS, "model_type": "qwen3_moe", "num_hidden_layers": 10**9})


@pytest.mark.parametrize("kind", ["falcon", "qwen2_moe", None])
def test_an_architecture_whose_parts_are_not_known_is_refused(kind):
    with pytest.raises(Unsupported, match=f"model_type '{kind}' is not one whose parts are known"):
        shape_from_config({**TEXT, "model_type": kind})


def test_targets_of_each_family_name_the_same_parts():
    assert roles_of(("q_proj", "v_proj")) == roles_of(("query", "value")) == ("q", "v")
    assert set(roles_of(("all-linear",))) == {"q", "k", "v", "o", "gate", "up", "down"}
    with pytest.raises(Unsupported, match="conv1d_7"):
        roles_of(("q_proj", "conv1d_7"))
