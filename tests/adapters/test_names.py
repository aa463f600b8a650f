"""Names in memory to names on disk, checked against what transformers itself writes."""

import subprocess
import sys

import pytest

from qlx.adapters import disk_names
from qlx.errors import Mismatch
from qlx.weights import open_weights

transformers = pytest.importorskip("transformers")
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": 3,
}


def text(cls):
    return cls(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        vocab_size=30,
    )


MODELS = {
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL)),
    "deit": lambda: transformers.DeiTForImageClassification(transformers.DeiTConfig(**SMALL)),
    "beit": lambda: transformers.BeitForImageClassification(transformers.BeitConfig(**SMALL)),
    "dinov2": lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**SMALL)),
    "llama": lambda: transformers.LlamaForCausalLM(text(transformers.LlamaConfig)),
    "bert": lambda: transformers.BertForSequenceClassification(text(transformers.BertConfig)),
}


def shapes(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", MODELS)
def test_every_parameter_finds_its_own_tensor(kind, tmp_path):
    """One to one, and each with the shape and the values that the parameter has."""
    from qlx.weights import read_tensor

    model = MODELS[kind]()
    model.save_pretrained(tmp_path)
    weights = open_weights(tmp_path)
    names = disk_names(shapes(model), weights)
    assert sorted(names.values()) == sorted(weights)
    for name, parameter in model.named_parameters():
        assert (read_tensor(weights, names[name]) == parameter).all(), name


def test_a_base_saved_without_its_head(tmp_path):
    """The adapter's names have the prefix of the task model, the base's files do not."""
    model = MODELS["vit"]()
    model.vit.save_pretrained(tmp_path)
    names = disk_names(["vit.layers.1.mlp.fc2.weight"], open_weights(tmp_path))
    (found,) = names.values()
    assert found.endswith("encoder.layer.1.output.dense.weight")
    assert disk_names(["layers.1.mlp.fc2.weight"], ["vit.encoder.layer.1.output.dense.weight"]) == {
        "layers.1.mlp.fc2.weight": "vit.encoder.layer.1.output.dense.weight"
    }


def test_nothing_is_guessed():
    with pytest.raises(Mismatch, match=r"no tensor for parameter 'a\.q_proj\.weight'"):
        disk_names(["a.q_proj.weight"], ["a.k_proj.weight"])
    both = ["x.a.q.weight", "y.a.q.weight"]
    with pytest.raises(Mismatch, match=r"x\.a\.q\.weight, y\.a\.q\.weight"):
        disk_names(["a.q.weight"], both)


def test_importing_quant_and_adapters_imports_no_slow_library():
    code = (
        "import sys, qlx.quant, qlx.adapters; "
        "print([m for m in ('bitsandbytes', 'peft', 'transformers', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
