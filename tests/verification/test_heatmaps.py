"""A heatmap model through every step: merged, packed, exported, verified, scored, and loaded without qlx."""

import json
import shutil

import numpy as np
import pytest
import torch

from qlx.checkpoint import open_checkpoint, read_manifest, read_probe, seal
from qlx.errors import CheckFailed
from qlx.exporting import export_onnx
from qlx.inputs import Score, log_softmax
from qlx.recipe import DataSection
from qlx.verification import compare, evaluate, replay, verify
from qlx.weights import read_tensors, write_tensors
from tests.isolation import DISTANCE, run_without

LIMITS = {
    "run": 1e-5, "adapter": 1e-5, "merged": 1e-5, "onnx": 1e-4, "onnx-separate": 1e-4,
    "onnx-fp16": 4e-3,
}  # fmt: skip
LOSSY = ("original", "packed", "fp4", "onnx-nf4", "onnx-fp4")


def base_for(models, name):
    return models["base"] if name in ("run", "adapter") else None


def last_results(path):
    return open_checkpoint(path).manifest.probe.results


@pytest.fixture
def dim(tennis_clips):
    return DataSection(source="tracknet", path=str(tennis_clips / "dim"), sigma=1.5)


@pytest.mark.parametrize("name", [*LIMITS, *LOSSY])
def test_every_kind_is_the_model_that_was_trained(tennis_models, name):
    report = verify(tennis_models[name], base=base_for(tennis_models, name))
    assert report.passed, report.checks
    assert report.scores["this checkpoint"].keys() >= {"f1", "pixel_error"}
    reference = report.comparisons["reference"]
    if name in LIMITS:
        assert reference.relative <= LIMITS[name]
        assert reference.top1_decided == 1
        assert reference.retention == pytest.approx(1, abs=1e-3)
    else:
        assert reference.relative > 1e-4
        assert 0.5 < reference.retention < 1 - 1e-6


def test_the_distance_is_over_the_cells_of_each_heatmap(tennis_models):
    probe = read_probe(tennis_models["packed"])
    assert probe.reference.shape == (6, 1, 24, 40)
    found = compare(probe.reference, probe.own, probe.mask, probe.base)
    rows = [array.reshape(6, -1).astype(np.float64) for array in (probe.reference, probe.own)]
    reference, own = (log_softmax(array) for array in rows)
    assert found.kl_mean == pytest.approx((np.exp(reference) * (reference - own)).sum(1).mean())
    assert found.top1 == np.mean(rows[0].argmax(1) == rows[1].argmax(1))
    assert found.positions == 6


def test_a_scored_probe_is_scored_as_its_frames_are(tennis_run):
    probe = read_probe(tennis_run)
    assert probe.labels.shape == (6, 1, 5)
    score = Score("heatmap")
    score.add(probe.reference, probe.labels)
    assert score.metrics()["pixel_error"] < 20


def _flip(tensors):
    name = next(name for name in tensors if "layer.1.attention.output.dense.lora_B" in name)
    tensors[name] = -tensors[name]


def _flip_merged(tensors, base):
    name = next(name for name in tensors if "layer.1.attention.output.dense.weight" in name)
    tensors[name] = 2 * base[name] - tensors[name]


def _old_head(tensors):
    tensors["head.conv.weight"] = tensors["head.conv.weight"].flip(-1)


@pytest.mark.parametrize(
    "defect", ["flipped delta in the adapter", "flipped delta", "mirrored head"]
)
def test_a_wrong_model_is_found(tennis_models, tmp_path, defect):
    kind = "adapter" if "adapter" in defect else "merged"
    path = shutil.copytree(tennis_models[kind], tmp_path / kind)
    file = path / ("adapter_model.safetensors" if kind == "adapter" else "model.safetensors")
    tensors = read_tensors(file)
    if kind == "adapter":
        _flip(tensors)
    elif defect == "flipped delta":
        _flip_merged(tensors, read_tensors(tennis_models["base"]))
    else:
        _old_head(tensors)
    write_tensors(file, tensors)
    seal(path, read_manifest(path)[0])
    assert not verify(path, base=base_for(tennis_models, kind)).passed
    if kind == "merged":
        with pytest.raises(CheckFailed):
            export_onnx(path, tmp_path / "onnx")
        assert not (tmp_path / "onnx").exists()


def test_the_score_of_every_kind(tennis_models, dim):
    """Training's own score, within what a lossy step may cost; the base is worse."""
    after = open_checkpoint(tennis_models["run"]).manifest.lineage[-1].options["after"]
    for name in ("adapter", "merged", "onnx", "onnx-separate"):
        found = evaluate(tennis_models[name], base=base_for(tennis_models, name), data=dim)
        assert (found.task, found.count) == ("heatmap", 40)
        assert found.metrics["f1"] == pytest.approx(after["f1"]), name
        assert found.metrics["pixel_error"] == pytest.approx(after["pixel_error"], rel=1e-3)
    for name in ("packed", "onnx-nf4"):
        assert evaluate(tennis_models[name], data=dim).metrics["f1"] > after["f1"] - 0.15
    base = evaluate(tennis_models["base"], data=dim)
    assert base.metrics["f1"] < after["f1"]


def test_packed_and_exported_weights_are_the_linear_ones(tennis_models):
    spec = open_checkpoint(tennis_models["packed"]).manifest.quantization
    assert len(spec.modules) == 2 * 6
    assert not any("head" in name or "embeddings" in name for name in spec.modules)
    config = json.loads((tennis_models["packed"] / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert config["id2label"] == {"0": "ball"}


def test_a_batch_of_any_size(tennis_models):
    from qlx.runtime import OnnxPredictor

    probe = read_probe(tennis_models["onnx"])
    predictor = OnnxPredictor(tennis_models["onnx"])
    whole = predictor.predict(probe.inputs)
    single = predictor.predict({"pixel_values": probe.inputs["pixel_values"][:1]})
    np.testing.assert_allclose(whole[:1], single, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        whole, replay(open_checkpoint(tennis_models["merged"])), rtol=1e-3, atol=1e-3
    )


PLAIN = DISTANCE + "result = distance(plain_model(argv[0]), argv[0], argv[1])\n"
GUARDED = """
import bitsandbytes
def exact(model):
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model
"""


def test_merged_loads_in_plain_transformers(tennis_models):
    found = run_without(
        ("qlx", "peft", "bitsandbytes"), PLAIN, tennis_models["merged"], "reference"
    )
    assert found <= 1e-5
    assert run_without(("qlx",), PLAIN, tennis_models["merged"], "base") > 1e-3


@pytest.mark.parametrize("kind", ["packed", "fp4"])
def test_packed_loads_in_plain_transformers(tennis_models, kind):
    code = DISTANCE + GUARDED + "result = distance(exact(plain_model(argv[0])), argv[0], 'own')\n"
    assert run_without(("qlx",), code, tennis_models[kind]) <= 1e-4


def test_the_adapter_loads_in_plain_peft(tennis_models):
    """On the base in full precision, so only near what training saw; and far from no adapter at all."""
    code = DISTANCE + (
        "import peft\n"
        "model = peft.PeftModel.from_pretrained(plain_model(argv[1]), argv[0])\n"
        "result = distance(model, argv[0]), distance(model, argv[0], 'base')\n"
    )
    near, far = run_without(("qlx",), code, tennis_models["adapter"], tennis_models["base"])
    assert near < far / 2


def test_onnx_runs_in_plain_onnxruntime(tennis_models):
    code = """
import numpy, onnxruntime
from safetensors.numpy import load_file
probe = load_file(argv[0] + "/probe.safetensors")
session = onnxruntime.InferenceSession(argv[0] + "/model.onnx")
(given,) = session.run(["heatmaps"], {"pixel_values": probe["input.pixel_values"]})
result = float(numpy.abs(given - probe["output.reference"]).max())
"""
    assert run_without(("qlx", "torch", "transformers"), code, tennis_models["onnx"]) < 1e-3


def test_a_comparison_looks_into_the_layers(tennis_models):
    report = verify(
        tennis_models["packed"],
        against=tennis_models["merged"],
        base=tennis_models["base"],
        layers=True,
    )
    assert report.drift is not None
    assert [layer.name for layer in report.drift.layers] == [
        "embeddings", "backbone.encoder.layer.0", "backbone.encoder.layer.1", "head",
    ]  # fmt: skip
    assert len(report.drift.weights) >= 12
    assert torch.isfinite(torch.tensor([weight.drift for weight in report.drift.weights])).all()
