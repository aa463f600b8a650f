"""Each graph pass on a graph small enough to check by eye."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

from qlx.errors import Unsupported
from qlx.exporting import SeparateLora, passes, write_graph
from qlx.exporting import graph as graph_module
from qlx.exporting.graph import build_graph
from qlx.exporting.rotations import halve_rotations
from tests.onnx_support import inputs_for, tiny_vit


def small(rows=3, columns=4, *, shared=False):
    """Y = x · Wᵀ + b, traced by hand: a Transpose, a MatMul and an Add."""
    random = np.random.default_rng(1)
    weight = ir.tensor(
        random.standard_normal((rows, columns)).astype(np.float32), name="layer.weight"
    )
    bias = ir.tensor(random.standard_normal(rows).astype(np.float32), name="layer.bias")
    values = [
        ir.Value(name=t.name, shape=t.shape, type=ir.TensorType(t.dtype), const_value=t)
        for t in (weight, bias)
    ]
    x = ir.Value(
        name="pixel_values", shape=ir.Shape(["s0", columns]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    turn = ir.node("Transpose", [values[0]], {"perm": [1, 0]})
    product = ir.node("MatMul", [x, turn.outputs[0]])
    total = ir.node("Add", [product.outputs[0], values[1]])
    nodes, outputs = [turn, product, total], [total.outputs[0]]
    if shared:
        nodes.append(ir.node("Identity", [values[0]]))
        nodes[-1].outputs[0].name = "weight_again"
        outputs.append(nodes[-1].outputs[0])
    total.outputs[0].name = "logits"
    for value in outputs:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [x], outputs, nodes=nodes, initializers=values, opset_imports={"": 20}, name="g"
    )
    return ir.Model(graph, ir_version=10)


def run(model, x):
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    return session.run(["logits"], {"pixel_values": x})[0]


X = np.random.default_rng(2).standard_normal((2, 4)).astype(np.float32)


@pytest.mark.parametrize("rows", [3, 3000])
def test_weights_are_stored_transposed_whatever_their_size(rows):
    model = small(rows)
    before = run(model, X)
    passes.transpose_weights(model)
    np.testing.assert_array_equal(run(model, X), before)
    assert sorted(model.graph.initializers) == ["layer.bias", "layer.weight.T"]
    assert [node.op_type for node in model.graph] == ["MatMul", "Add"]


def test_a_weight_used_elsewhere_too_is_left_alone():
    model = small(shared=True)
    passes.transpose_weights(model)
    assert sorted(model.graph.initializers) == ["layer.bias", "layer.weight"]


def test_float16_is_for_large_weights_and_keeps_the_arithmetic():
    model = small(3000)
    before = run(model, X)
    passes.transpose_weights(model)
    passes.store_as_float16(model)
    after = run(model, X)
    assert after.dtype == np.float32
    assert 0 < np.abs(after - before).max() < 1e-2
    kinds = {name: value.const_value.dtype for name, value in model.graph.initializers.items()}
    assert kinds == {"layer.weight.T": ir.DataType.FLOAT16, "layer.bias": ir.DataType.FLOAT16}
    little = small(3)
    passes.store_as_float16(little)
    assert {value.const_value.dtype for value in little.graph.initializers.values()} == {
        ir.DataType.FLOAT
    }


def test_renaming_keeps_the_function():
    model = small()
    before = run(model, X)
    passes.rename_initializers(model, {"layer.weight": "better", "absent": "ignored"})
    np.testing.assert_array_equal(run(model, X), before)
    assert sorted(model.graph.initializers) == ["better", "layer.bias"]


def test_metadata_goes_and_the_function_stays():
    model = small()
    before = run(model, X)
    for holder in (model, model.graph, *model.graph):
        holder.metadata_props["trace"] = "/home/somebody/secret.py"
    model.graph[0].doc_string = model.doc_string = "/home/somebody"
    passes.strip_metadata(model)
    assert b"somebody" not in ir.to_proto(model).SerializeToString()
    np.testing.assert_array_equal(run(model, X), before)


def test_contrib_operators_are_imported_if_and_only_if_used():
    model = small()
    model.opset_imports["com.microsoft"] = 1
    passes.import_contrib_operators(model)
    assert "com.microsoft" not in model.opset_imports
    model.graph[0].domain = "com.microsoft"
    passes.import_contrib_operators(model)
    assert model.opset_imports["com.microsoft"] == 1


def test_free_axes_have_names():
    model = small()
    passes.name_interface(model)
    assert str(model.graph.inputs[0].shape) == "[batch,4]"


class Pair(nn.Module):
    """Two identical branches: an optimiser would fold their equal weights into one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (
            SeparateLora(nn.Linear(64, 64), torch.randn(64, 4), torch.zeros(4, 64))
            for _ in range(2)
        )


def test_equal_weights_stay_apart_under_their_names():
    """An adapter that did nothing in two layers must still be there twice, to be replaced."""
    model = tiny_vit()
    pair = Pair()
    pair.second.load_state_dict(pair.first.state_dict())
    for index, lora in enumerate((pair.first, pair.second)):
        attention = model.vit.layers[index].attention
        lora.base = attention.q_proj
        attention.q_proj = lora
    built = build_graph(model.eval(), "image-classification")
    names = [f"vit.layers.{i}.attention.q_proj.lora_{m}" for i in (0, 1) for m in "AB"]
    assert set(names) <= set(built.graph.initializers)


def test_a_large_classifier_keeps_its_weights_outside(monkeypatch, tmp_path):
    model = tiny_vit()
    pixels = inputs_for("image-classification")
    graph = build_graph(model, "image-classification")
    (tmp_path / "inside").mkdir()
    write_graph(graph, tmp_path / "inside", "image-classification")
    assert [path.name for path in (tmp_path / "inside").iterdir()] == ["model.onnx"]
    monkeypatch.setattr(graph_module, "INLINE_LIMIT", 1000)
    (tmp_path / "outside").mkdir()
    write_graph(graph, tmp_path / "outside", "image-classification")
    assert (tmp_path / "outside" / "model.onnx.data").stat().st_size > 100_000
    first, second = (
        ort.InferenceSession(tmp_path / place / "model.onnx").run(["logits"], pixels)[0]
        for place in ("inside", "outside")
    )
    np.testing.assert_array_equal(first, second)


class Undecided(nn.Module):
    """Asks its input which way to go, which no fixed graph can do."""

    def __init__(self):
        super().__init__()
        self.config = tiny_vit().config
        self.layer = nn.Linear(16, 5)

    def forward(self, pixel_values):
        rows = pixel_values[:, 0, 0]
        return self.layer(rows) if rows.sum() > 0 else self.layer(-rows)


def test_a_model_that_cannot_be_traced_is_refused_with_the_reason():
    with pytest.raises(Unsupported, match="Undecided: torch cannot export"):
        build_graph(Undecided().eval(), "image-classification")


def chain(other_shape):
    """A sum, reshaped there and back, then its RMS norm and the sum itself."""
    kind, shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "sequence", 4])
    x = ir.Value(name="pixel_values", shape=shape, type=kind)
    weight, other, there, back = (
        ir.Value(name=n, shape=ir.Shape(t.shape), type=ir.TensorType(t.dtype), const_value=t)
        for n, t in {
            "weight": ir.tensor(np.arange(1, 5, dtype=np.float32)),
            "other": ir.tensor(np.full(other_shape, 0.5, np.float32)),
            "there": ir.tensor(np.array([-1, 4])),
            "back": ir.tensor(np.array([2, 3, 4])),
        }.items()
    )
    scaled = ir.node("Mul", [x, other])
    total = ir.node("Add", [x, scaled.outputs[0] if other_shape else other])
    flat = ir.node("Reshape", [total.outputs[0], there])
    whole = ir.node("Reshape", [flat.outputs[0], back])
    norm = ir.node("RMSNormalization", [whole.outputs[0], weight], {"axis": -1, "epsilon": 1e-3})
    both = ir.node("Add", [norm.outputs[0], total.outputs[0]])
    for node in (scaled, total, whole, norm, both):
        node.outputs[0].shape, node.outputs[0].type = shape, kind
    flat.outputs[0].shape, flat.outputs[0].type = ir.Shape(["rows", 4]), kind
    both.outputs[0].name = "logits"
    nodes = [scaled, total, flat, whole, norm, both]
    constants = [weight, other, there, back]
    graph = ir.Graph(
        [x],
        [both.outputs[0]],
        nodes=nodes,
        initializers=constants,
        opset_imports={"": 23},
        name="g",
    )
    return ir.Model(graph, ir_version=10)


SMALL = np.random.default_rng(4).standard_normal((2, 3, 4)).astype(np.float32)


def test_reshapes_there_and_back_go_and_a_sum_joins_its_norm():
    model = chain((4,))
    before = run(model, SMALL)
    passes.drop_reshapes(model)
    assert [node.op_type for node in model.graph] == ["Mul", "Add", "RMSNormalization", "Add"]
    np.testing.assert_array_equal(run(model, SMALL), before)
    passes.fuse_residual_norms(model)
    passes.import_contrib_operators(model)
    found = [node.op_type for node in model.graph]
    assert found == ["Mul", "SkipSimplifiedLayerNormalization", "Add"]
    np.testing.assert_allclose(run(model, SMALL), before, rtol=1e-5)


def test_a_sum_of_other_shapes_keeps_its_norm_apart():
    model = chain(())
    passes.drop_reshapes(model)
    passes.fuse_residual_norms(model)
    assert "RMSNormalization" in [node.op_type for node in model.graph]


def turning(*, same=True, ends=3, axis=-1):
    """Cosine and scaled sin of angles written twice (or beside others), of which the first `ends` are read."""
    kind = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="pixel_values", shape=ir.Shape(["batch", 3]), type=kind)
    constants = {
        "zero": np.array([0]), "ends": np.array([ends]), "axis": np.array([axis]), "one": np.array([1]),
        "scale": np.array(1.5, np.float32),
    }  # fmt: skip
    known = {
        name: ir.Value(name=name, shape=ir.Shape(t.shape), type=ir.TensorType(t.dtype), const_value=t)
        for name, t in ((name, ir.tensor(array)) for name, array in constants.items())
    }  # fmt: skip
    other = ir.node("Mul", [x, known["scale"]])
    twice = ir.node("Concat", [x, x if same else other.outputs[0]], {"axis": -1})
    cos, sin = ir.node("Cos", [twice.outputs[0]]), ir.node("Sin", [twice.outputs[0]])
    scaled = ir.node("Mul", [sin.outputs[0], known["scale"]])
    cut = [known[name] for name in ("zero", "ends", "axis", "one")]
    halves = [ir.node("Slice", [each.outputs[0], *cut]) for each in (cos, scaled)]
    total = ir.node("Add", [half.outputs[0] for half in halves])
    unused = ir.node("Add", [x, known["scale"]])
    nodes = [other, twice, cos, sin, scaled, *halves, total, unused]
    for node in nodes:
        node.outputs[0].type = kind
    total.outputs[0].name = "logits"
    graph = ir.Graph(
        [x], total.outputs, nodes=nodes, initializers=list(known.values()), opset_imports={"": 23}, name="g"
    )  # fmt: skip
    return ir.Model(graph, ir_version=10)


def test_the_half_of_a_rotation_that_is_read_is_all_that_is_computed():
    model = turning()
    before = run(model, SMALL[0, :, :3])
    halve_rotations(model)
    passes.drop_unused(model)
    assert Counter(node.op_type for node in model.graph) == {"Cos": 1, "Sin": 1, "Mul": 1, "Add": 1}
    assert list(model.graph.initializers) == ["scale"]
    np.testing.assert_array_equal(run(model, SMALL[0, :, :3]), before)


@pytest.mark.parametrize("odd", [{"same": False}, {"ends": 2}, {"ends": 4}, {"axis": 0}])
def test_a_slice_of_anything_else_stays(odd):
    model = turning(**odd)
    before = run(model, SMALL[0, :, :3])
    halve_rotations(model)
    assert sum(node.op_type == "Slice" for node in model.graph) == 2
    passes.drop_unused(model)
    assert sum(node.op_type == "Concat" for node in model.graph) == 1
    np.testing.assert_array_equal(run(model, SMALL[0, :, :3]), before)
