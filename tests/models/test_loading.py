"""Loading: bases plain and quantized in both modes, every torch kind, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch

from qlx.checkpoint import Checkpoint, QuantSpec, open_checkpoint, read_probe, resolve_source
from qlx.errors import CorruptCheckpoint, InputRefused, Mismatch, UnsafeInput, Unsupported
from qlx.models import (
    Labels,
    empty_model,
    forward_logits,
    load_base,
    load_model,
    quantized_fingerprint,
    tensor_names,
    torch_float,
    with_quantized_names,
)
from qlx.weights import read_tensors, write_tensors
from tests.adapter_support import make_base

SPEC = {"method": "qlora", "weight_bits": 4, "group_size": 64, "backend": "bitsandbytes"}


@pytest.fixture
def copy_of(tmp_path):
    """A plain transformers directory with the files of a base, to be changed."""

    def copy(path):
        target = tmp_path / "copy"
        shutil.copytree(
            path, target, ignore=shutil.ignore_patterns("qlx.json", "*.jsonl", "optimizer*")
        )
        return target

    return copy


@pytest.mark.parametrize("name", ["digits_base", "python_base"])
@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_both_modes_give_the_same_codes(name, scheme, double_quant, request):
    path = request.getfixturevalue(name)
    task = open_checkpoint(path).manifest.task
    probe = read_probe(path)
    prints, outputs = [], []
    for mode in ("manual", "hf"):
        spec = QuantSpec(scheme=scheme, double_quant=double_quant, mode=mode, **SPEC)
        model = load_base(path, task, quant=spec)
        full = with_quantized_names(model, spec, path)
        assert len(full.modules) == len(full.tensors) > 0
        prints.append((full.fingerprint, full.modules, full.tensors))
        outputs.append(forward_logits(model, task, probe.inputs))
        assert quantized_fingerprint(model, tensor_names(model, path)) == full.fingerprint, (
            "a forward changed the codes"
        )
    assert prints[0] == prints[1]
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=0, atol=1e-5 * np.abs(outputs[0]).max())
    other = QuantSpec(scheme="fp4" if scheme == "nf4" else "nf4", double_quant=double_quant, **SPEC)
    assert (
        with_quantized_names(load_base(path, task, quant=other), other, path).fingerprint
        != prints[0][0]
    )


def test_empty_model_has_no_memory(python_base):
    model = empty_model(python_base, "causal-lm")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert tensor_names(model) == tensor_names(load_base(python_base, "causal-lm"))


def test_wrong_base_is_a_mismatch(digits_run, digits_base, copy_of):
    changed = copy_of(digits_base)
    tensors = read_tensors(changed)
    tensors["classifier.bias"][0] += 1
    write_tensors(changed / "model.safetensors", tensors)
    run = open_checkpoint(digits_run)
    load_model(run, resolve_source(str(digits_base)))
    with pytest.raises(Mismatch, match="not the base"):
        load_model(run, resolve_source(str(changed)))


def test_other_codes_than_training_saw_are_a_mismatch(digits_run, digits_base):
    run = open_checkpoint(digits_run)
    spec = run.manifest.quantization.model_copy(update={"double_quant": False})
    forged = Checkpoint(
        run.path, run.manifest.model_copy(update={"quantization": spec}), run.digest
    )
    with pytest.raises(Mismatch, match="other codes"):
        load_model(forged, resolve_source(str(digits_base)))


def test_weights_that_are_not_there_are_not_invented(digits_base, copy_of):
    directory = copy_of(digits_base)
    tensors = read_tensors(directory)
    del tensors["classifier.weight"]
    write_tensors(directory / "model.safetensors", tensors)
    with pytest.raises(InputRefused, match=r"classifier\.weight"):
        load_base(directory, "image-classification")
    head = Labels(tuple("abcd"))
    assert load_base(directory, "image-classification", new_head=head).config.num_labels == 4
    del tensors["vit.layernorm.weight"]
    write_tensors(directory / "model.safetensors", tensors)
    with pytest.raises(InputRefused, match="layernorm"):
        load_base(directory, "image-classification", new_head=head)


def test_pickled_weights_are_not_read(digits_base, copy_of):
    directory = copy_of(digits_base)
    torch.save(read_tensors(directory), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(InputRefused, match="safetensors"):
        load_base(directory, "image-classification")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"auto_map": {"AutoModelForImageClassification": "evil.Model"}}, UnsafeInput),
        ({"quantization_config": {"quant_method": "quark"}}, Unsupported),
    ],
)
def test_configurations_with_code_or_unknown_quantization_are_refused(
    change, error, digits_base, copy_of
):
    directory = copy_of(digits_base)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(error):
        load_base(directory, "image-classification")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", "64"),  # a type that transformers refuses with an error of its own
        ("num_hidden_layers", []),
        ("num_attention_heads", 0),
        ("num_channels", -1),  # a size that torch refuses
        ("patch_size", None),
        ("layer_norm_eps", "small"),
    ],
)
def test_a_field_of_the_wrong_type_is_refused_with_file_and_reason(tmp_path, field, value):
    base = make_base(tmp_path / "base", "vit")
    config = json.loads((base / "config.json").read_text()) | {field: value}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptCheckpoint, match=r"base/config\.json: transformers cannot use it"):
        load_base(base, "image-classification")


def test_computing_in_bfloat16_is_close_but_not_the_same(python_run, python_base):
    run, base = open_checkpoint(python_run), resolve_source(str(python_base))
    probe = read_probe(python_run)
    logits = forward_logits(
        load_model(run, base, compute_dtype=torch.bfloat16), "causal-lm", probe.inputs
    )
    error = np.abs(logits - probe.reference).max() / np.abs(probe.reference).max()
    assert 1e-4 < error < 0.1


def test_forward_leaves_mode_and_refuses_missing_inputs(digits_base):
    model = load_base(digits_base, "image-classification").train()
    probe = read_probe(digits_base)
    forward_logits(model, "image-classification", probe.inputs)
    assert model.training
    with pytest.raises(InputRefused, match="pixel_values"):
        forward_logits(model, "image-classification", {})
    with pytest.raises(Unsupported):
        torch_float("int8")
