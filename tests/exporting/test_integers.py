"""Exports of packed integers: their own codes in the graph, and what rounding inputs costs."""

import numpy as np
import onnx
import pytest
import torch

from qlx.checkpoint import QuantSpec, read_probe, resolve_source
from qlx.errors import CheckFailed, UsageError
from qlx.exporting import export_onnx
from qlx.models import load_model
from qlx.packing import pack
from qlx.quant import packed_modules
from qlx.quant.bits import unpack_integers
from qlx.runtime import OnnxPredictor
from qlx.verification import compare, verify
from qlx.verification.graph import graph_weights
from tests.adapter_support import Case, make_adapter

SCHEMES = ("int8", "int4", "ternary")
SLOW = pytest.mark.exhaustive


def distance(checkpoint, reference):
    """Relative distance of an ONNX checkpoint's outputs on its own probe from `reference`."""
    probe = read_probe(checkpoint.path)
    outputs = OnnxPredictor(checkpoint.path, threads=1).predict(probe.inputs)
    return compare(reference, outputs, probe.mask).relative


def codes_in_graph(checkpoint):
    """{module: its codes [out, in] as the graph holds them}."""
    model = onnx.load(checkpoint.path / "model.onnx")
    arrays = {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            sizes = {each.name: each.i for each in node.attribute}
            rows = torch.from_numpy(arrays[node.input[1]].reshape(sizes["N"], -1).copy())
            module = node.input[1].removesuffix(".weight_codes")
            found[module] = unpack_integers(rows, sizes["bits"], sizes["K"])
    return found


@pytest.fixture(scope="module")
def packed(merged, room):
    """{(task, scheme): a packed checkpoint}, made when asked for."""
    made = {}

    def of(task, scheme):
        if (task, scheme) not in made:
            target = room / f"integers-{task}-{scheme}"
            made[task, scheme] = pack(merged[task].path, target, to=scheme, min_retention=0)
        return made[task, scheme]

    return of


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("task", [pytest.param("image-classification", marks=SLOW), "causal-lm"])
def test_a_pack_is_exported_with_its_own_codes(packed, tmp_path, task, scheme):
    source = packed(task, scheme)
    done = export_onnx(source, tmp_path / "onnx")
    modules = dict(packed_modules(load_model(source)))
    graph = codes_in_graph(done)
    assert graph.keys() == modules.keys() == set(source.manifest.quantization.modules)
    assert all(torch.equal(graph[name], modules[name].packed.integers()) for name in graph)
    acting = graph_weights(done.path / "model.onnx")
    for name, layer in modules.items():
        np.testing.assert_allclose(
            acting[f"{name}.weight"](), layer.packed.values().numpy(), rtol=1e-6, atol=1e-9
        )
    probe = read_probe(done.path)
    assert distance(done, probe.own) < 1e-5
    assert distance(done, probe.own * 1.001) > 1e-4
    assert done.manifest.lineage[-1].options["accuracy_level"] == 0
    assert verify(done.path).passed


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [("vit", "int4"), ("llama", "ternary"), pytest.param("llama", "int8", marks=SLOW)],
)
def test_an_adapter_stays_apart_from_its_integers(bases, tmp_path, kind, scheme):
    spec = QuantSpec(method="qlora", scheme=scheme, group_size=64, backend="qlx")
    adapter = make_adapter(bases[kind], tmp_path / "adapter", Case(kind, spec))
    done = export_onnx(adapter, tmp_path / "onnx", base=str(bases[kind]))
    assert verify(done.path).passed
    probe = read_probe(done.path)
    assert distance(done, probe.reference) < 1e-5
    assert distance(done, probe.base) > 1e-2
    model = load_model(adapter, resolve_source(str(bases[kind])))
    inside = {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): layer.packed.integers()
        for name, layer in packed_modules(model)
    }
    graph = codes_in_graph(done)
    assert graph.keys() == inside.keys()
    assert all(torch.equal(graph[name], inside[name]) for name in graph)


def test_rounding_inputs_is_recorded_with_its_price(packed, tmp_path):
    done = export_onnx(packed("causal-lm", "int4"), tmp_path / "fast", accuracy_level=4)
    assert done.manifest.lineage[-1].options["accuracy_level"] == 4
    results = {result.against: result.metrics for result in done.manifest.probe.results}
    assert 1e-4 < results["the exported checkpoint"]["relative"] < 3e-2
    assert distance(done, read_probe(done.path).own) == 0
    assert verify(done.path).passed
    exact = export_onnx(packed("causal-lm", "int4"), tmp_path / "exact")
    assert distance(exact, read_probe(done.path).own) > 1e-4


def test_a_graph_that_rounds_too_much_is_refused(packed, tmp_path, monkeypatch):
    limits = {"8-bit inputs": 1e-6, "float16": 1e-6}
    monkeypatch.setattr("qlx.verification.thresholds.UNIT_ROUNDOFF", limits)
    with pytest.raises(CheckFailed, match=r"the exported checkpoint: relative.*--accuracy-level"):
        export_onnx(packed("causal-lm", "int4"), tmp_path / "fast", accuracy_level=4)
    assert not (tmp_path / "fast").exists()


def test_an_accuracy_level_is_for_integers(merged, tmp_path):
    with pytest.raises(UsageError, match="int4, int2, ternary weights; these are fp32"):
        export_onnx(merged["causal-lm"], tmp_path / "out", accuracy_level=4)
    with pytest.raises(UsageError, match="accuracy level 3"):
        export_onnx(merged["causal-lm"], tmp_path / "out", accuracy_level=3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.exhaustive
def test_exports_of_integers_are_byte_identical(packed, tmp_path):
    first, second = (export_onnx(packed("causal-lm", "int4"), tmp_path / n) for n in "ab")
    assert first.digest == second.digest
    assert np.array_equal(*(read_probe(each.path).own for each in (first, second)))
