"""The fast mode of NF4 and FP4: their codes as 8-bit integers, with the price measured and bounded."""

import numpy as np
import onnx
import pytest
import torch

from qlx.checkpoint import read_probe
from qlx.errors import CheckFailed
from qlx.exporting import export_onnx
from qlx.models import load_model
from qlx.packing import pack
from qlx.quant import packed_modules, packed_of_module
from qlx.runtime import OnnxPredictor
from qlx.verification import compare, verify
from qlx.verification.graph import graph_weights

SLOW = pytest.mark.exhaustive


def distance(checkpoint, reference):
    probe = read_probe(checkpoint.path)
    outputs = OnnxPredictor(checkpoint.path, threads=1).predict(probe.inputs)
    return compare(reference, outputs, probe.mask).relative


@pytest.fixture(scope="module")
def packs(merged, room):
    """{scheme: a packed language model}, made when asked for."""
    made = {}

    def of(scheme):
        if scheme not in made:
            target = room / f"fast-{scheme}"
            made[scheme] = pack(merged["causal-lm"].path, target, to=scheme, min_retention=0)
        return made[scheme]

    return of


def operators(checkpoint):
    """The products with packed weights in a graph."""
    graph = onnx.load(checkpoint.path / "model.onnx", load_external_data=False).graph
    return {
        node.op_type for node in graph.node if node.op_type.startswith("MatMul") and node.domain
    }


@pytest.mark.parametrize("scheme", ["nf4", pytest.param("fp4", marks=SLOW)])
def test_the_price_is_measured_recorded_and_bounded(packs, tmp_path, scheme):
    lines = []
    done = export_onnx(packs(scheme), tmp_path / "fast", accuracy_level=4, report=lines.append)
    assert operators(done) == {"MatMulNBits"}
    options = done.manifest.lineage[-1].options
    assert options["precision"] == scheme
    assert options["accuracy_level"] == 4
    assert 1e-4 < options["levels_rounded"] < 5e-3
    assert any(f"{100 * options['levels_rounded']:.2f} %" in line for line in lines)
    results = {result.against: result.metrics for result in done.manifest.probe.results}
    assert 1e-4 < results["the exported checkpoint"]["relative"] < 3e-2
    assert distance(done, read_probe(done.path).own) == 0
    assert verify(done.path).passed
    assert done.manifest.quantization == packs(scheme).manifest.quantization


def test_the_weights_in_the_graph_are_the_checkpoints_up_to_the_rounding(packs, tmp_path):
    done = export_onnx(packs("nf4"), tmp_path / "fast", accuracy_level=4)
    acting, gap, size = graph_weights(done.path / "model.onnx"), 0.0, 0.0
    for name, layer in packed_modules(load_model(packs("nf4"))):
        exact = packed_of_module(layer).values().numpy()
        # read through the kernel, which rounds the unit vectors it is given, too: exactly
        gap += float(np.square(acting[f"{name}.weight"]() - exact).sum())
        size += float(np.square(exact).sum())
    recorded = done.manifest.lineage[-1].options["levels_rounded"]
    assert (gap / size) ** 0.5 == pytest.approx(recorded, rel=0.05)


@pytest.mark.parametrize("wrong", [pytest.param("sign", marks=SLOW), "scheme"])
def test_wrong_levels_are_refused_and_nothing_is_left(packs, tmp_path, monkeypatch, wrong):
    from qlx.quant import eight_bits

    integers, steps = eight_bits.integer_levels("nf4")
    other = integers.clone()
    if wrong == "sign":
        other[3] = -other[3]
    else:
        other = eight_bits.integer_levels("fp4")[0]
    monkeypatch.setattr(eight_bits, "integer_levels", lambda scheme: (other, steps))
    assert not torch.equal(other, integers)
    with pytest.raises(CheckFailed, match=r"the exported checkpoint: relative.*--accuracy-level 4"):
        export_onnx(packs("nf4"), tmp_path / "fast", accuracy_level=4)
    assert not (tmp_path / "fast").exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize("key", [("vit", "nf4"), ("llama", "fp4")])
def test_an_adapter_stays_apart_from_its_fast_base(adapters, bases, tmp_path, key):
    done = export_onnx(adapters[key], tmp_path / "fast", base=str(bases[key[0]]), accuracy_level=4)
    assert operators(done) == {"MatMulNBits"}
    probe = read_probe(done.path)
    assert 1e-5 < distance(done, probe.reference) < 3e-2
    assert distance(done, probe.base) > 2 * distance(done, probe.reference)
    assert verify(done.path).passed
