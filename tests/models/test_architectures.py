"""config.json is data: known architectures only, and nothing in it may name code."""

import json

import pytest

from qlx.errors import CorruptCheckpoint, InputRefused, UnsafeInput, Unsupported
from qlx.models import KNOWN, Labels, build_config, build_model, read_config
from qlx.recipe import ArchitectureSection


@pytest.mark.parametrize("task", KNOWN)
def test_every_known_type_exists_in_transformers(task):
    import transformers

    assert set(KNOWN[task]) <= set(transformers.CONFIG_MAPPING)


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"model_type": "llama", "auto_map": {"AutoConfig": "x.Y"}}, UnsafeInput),
        ({"model_type": "llama", "_attn_implementation": "evil/kernel"}, UnsafeInput),
        ({"model_type": "llama", "attn_implementation": "evil/kernel"}, UnsafeInput),
        ({"model_type": "llama", "text_config": [{"_internal": 1}]}, UnsafeInput),
        ({"model_type": "my_model"}, Unsupported),
        ({"model_type": "vit"}, Unsupported),
        ({}, Unsupported),
        ([], CorruptCheckpoint),
    ],
)
def test_dangerous_and_unknown_configurations_are_refused(config, error, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=r"config\.json"):
        read_config(tmp_path, "causal-lm")


def test_harmless_private_fields_pass(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "_name_or_path": "x/y"}')
    assert read_config(tmp_path, "causal-lm")["model_type"] == "llama"
    assert read_config(tmp_path)["model_type"] == "llama"
    with pytest.raises(InputRefused, match="missing"):
        read_config(tmp_path / "nowhere")


def test_models_from_nothing_are_the_same_for_the_same_seed():
    import torch

    section = ArchitectureSection(
        model_type="vit", hidden_size=64, heads=2, layers=1, intermediate_size=64
    )
    config = build_config(section, labels=Labels(("a", "b", "c")))
    assert config.id2label == {0: "a", 1: "b", 2: "c"}
    state = torch.random.get_rng_state()
    first, again, other = (
        build_model("image-classification", config, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    weights = [model.state_dict()["classifier.weight"] for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    with pytest.raises(Unsupported, match="class names"):
        build_config(section)
