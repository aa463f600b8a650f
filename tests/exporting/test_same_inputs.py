"""Joined products give what the separate ones give, to the bit, and keep every weight findable by name."""

from collections import Counter

import numpy as np
import onnx
import pytest
import torch

from qlx.checkpoint import read_probe
from qlx.exporting import export_onnx
from qlx.packing import pack
from qlx.runtime import CausalDecoder, OnnxPredictor, open_model
from qlx.verification import verify
from qlx.verification.graph import _modules, graph_weights, joined_name
from tests.exporting.matrix import ARCHITECTURES, build
from tests.onnx_support import merged_checkpoint

SLOW = pytest.mark.exhaustive
BIASED = ("Qwen2", "OPT")
"""Their biases onnxruntime adds inside a product of its own, after a joined one apart: the last bits differ."""

CASES = [
    ("Llama", "int4"),
    pytest.param("Llama", "ternary", marks=SLOW),
    pytest.param("Llama", "nf4", marks=SLOW),
    pytest.param("Qwen2", "int8", marks=SLOW),
    pytest.param("Gemma 3", "int4", marks=SLOW),  # norms between products and attention
    pytest.param("OPT", "int4", marks=SLOW),  # generic attention
]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """{(architecture, scheme): a packed checkpoint}, made when asked for."""
    made = {}

    def of(name, scheme):
        if (name, scheme) not in made:
            room = tmp_path_factory.mktemp("joined")
            model = build(next(row for row in ARCHITECTURES if row.name == name))
            merged = merged_checkpoint(room / "merged", "causal-lm", model)
            made[name, scheme] = pack(merged.path, room / "packed", to=scheme, min_retention=0)
        return made[name, scheme]

    return of


def exported(checkpoint, target, monkeypatch, *, joined=True, level=4):
    with monkeypatch.context() as patches:
        if not joined:
            patches.setattr("qlx.exporting.graph.join_same_inputs", lambda graph: None)
        return export_onnx(checkpoint, target, accuracy_level=level)


def graph_of(checkpoint):
    return onnx.load(checkpoint.path / "model.onnx").graph


def count(checkpoint):
    return Counter(node.op_type for node in graph_of(checkpoint).node)


def outputs_of(checkpoint):
    """Logits of a padded batch, and of one sequence at once and then token by token."""
    model, probe = open_model(checkpoint.path, threads=1), read_probe(checkpoint.path)
    decoder, ids = CausalDecoder(model), probe.inputs["input_ids"][1:2]
    steps = [decoder.feed(ids[:, :5]), *(decoder.feed(ids[:, at : at + 1]) for at in (5, 6, 7))]
    return OnnxPredictor(model).predict(probe.inputs), np.concatenate(steps, axis=1)


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_joined_products_give_the_same_bits(packed, tmp_path, monkeypatch, name, scheme):
    source = packed(name, scheme)
    apart = exported(source, tmp_path / "apart", monkeypatch, joined=False)
    joined = exported(source, tmp_path / "joined", monkeypatch)
    assert count(joined)["MatMulNBits"] < count(apart)["MatMulNBits"]
    limit = 1e-5 if name in BIASED else 0
    for found, expected in zip(outputs_of(joined), outputs_of(apart), strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=limit)
    weights, wanted = (graph_weights(each.path / "model.onnx") for each in (joined, apart))
    named = {key for key in wanted if key.endswith("_proj.weight")}
    assert named <= weights.keys()
    for key in sorted(named)[:6]:
        np.testing.assert_array_equal(weights[key](), wanted[key]())
    assert verify(joined.path).passed


def test_a_layer_has_four_products_in_place_of_seven(packed, tmp_path, monkeypatch):
    found = count(exported(packed("Llama", "int4"), tmp_path / "fast", monkeypatch))
    assert (found["MatMulNBits"], found["GroupQueryAttention"]) == (8, 2)
    exact = exported(packed("Llama", "int4"), tmp_path / "exact", monkeypatch, level=0)
    assert count(exact)["MatMulNBits"] == 14
    names = {each.name for each in graph_of(exact).initializer}
    assert "model.layers.0.self_attn.q_proj.weight_codes" in names  # a tensor of its own


def test_other_rows_are_seen(packed, tmp_path, monkeypatch):
    """Keys and values exchanged inside a joined weight, which have one shape."""
    done = exported(packed("Llama", "int4"), tmp_path / "fast", monkeypatch)
    expected, _ = outputs_of(done)
    model = onnx.load(done.path / "model.onnx")
    for item in model.graph.initializer:
        if "k_proj:32+v_proj:32.weight" in item.name:
            array = onnx.numpy_helper.to_array(item)
            turned = np.concatenate([array[:64], array[96:], array[64:96]])
            item.CopyFrom(onnx.numpy_helper.from_array(turned, item.name))
    onnx.save(model, tmp_path / "turned.onnx")
    weights = graph_weights(tmp_path / "turned.onnx")
    right = graph_weights(done.path / "model.onnx")
    key, value = (f"model.layers.1.self_attn.{each}_proj.weight" for each in "kv")
    np.testing.assert_array_equal(weights[key](), right[value]())
    assert not np.array_equal(weights[key](), right[key]())
    assert not verify_file(tmp_path / "turned.onnx", done, expected)


def verify_file(file, done, expected):
    """Whether a graph gives the expected logits of the checkpoint's probe."""
    import onnxruntime as ort

    session, probe = ort.InferenceSession(file), read_probe(done.path)
    mask = probe.inputs["attention_mask"]
    empty = {
        each.name: np.zeros((len(mask), each.shape[1], 0, each.shape[3]), np.float32)
        for each in session.get_inputs()
        if each.name.startswith("past")
    }
    places = np.maximum(mask.cumsum(1) - 1, 0)
    (found,) = session.run(["logits"], {**probe.inputs, "position_ids": places, **empty})
    return np.allclose(found[mask > 0], expected[mask > 0], atol=1e-5)


def test_exports_are_the_same_bytes(packed, tmp_path, monkeypatch):
    first, second = (
        exported(packed("Llama", "int4"), tmp_path / name, monkeypatch) for name in "ab"
    )
    assert first.digest == second.digest
    apart = exported(packed("Llama", "int4"), tmp_path / "apart", monkeypatch, joined=False)
    assert apart.digest != first.digest


def test_a_joined_name_says_what_it_holds():
    name = joined_name("model.layers.3.mlp", {"gate_proj": 48, "up_proj": 80})
    assert name == "model.layers.3.mlp.gate_proj:48+up_proj:80"
    assert _modules(name) == {
        "model.layers.3.mlp.gate_proj": slice(0, 48),
        "model.layers.3.mlp.up_proj": slice(48, 128),
    }
    assert _modules("lm_head") == {"lm_head": slice(None)}
    assert list(_modules(joined_name("", {"a": 1, "b": 2}))) == ["a", "b"]
    assert torch.arange(128)[_modules(name)["model.layers.3.mlp.up_proj"]].numel() == 80
