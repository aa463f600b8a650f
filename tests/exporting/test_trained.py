"""Exports of really trained runs: the task's score survives, every layout agrees with the others."""

from dataclasses import replace

import numpy as np
import pytest

from qlx.checkpoint import open_checkpoint, read_probe
from qlx.exporting import export_onnx
from qlx.inputs import load_split
from qlx.merging import merge
from qlx.packing import pack
from qlx.recipe import load_recipe
from qlx.runtime import Classifier, OnnxPredictor, TextGenerator
from qlx.serving import load_engine
from qlx.verification import compare, evaluate, verify


@pytest.fixture(scope="module")
def digits(digits_base, digits_run, tmp_path_factory):
    """{layout: export} of the digits run."""
    room = tmp_path_factory.mktemp("digits")
    merged = merge(str(digits_base), [digits_run], room / "merged")
    packed = pack(merged.path, room / "packed", to="nf4", min_retention=0.0)
    return {
        "separate": export_onnx(digits_run, room / "onnx-separate", base=digits_base),
        "merged": export_onnx(merged, room / "onnx-merged"),
        "packed": export_onnx(packed, room / "onnx-packed"),
    }


def test_every_layout_keeps_the_probe(digits):
    for layout in ("separate", "merged"):
        probe = read_probe(digits[layout].path)
        outputs = OnnxPredictor(digits[layout].path, threads=1).predict(probe.inputs)
        found = compare(probe.reference, outputs, base=probe.base)
        assert found.relative < 1e-5
        assert found.top1 == 1
        assert found.retention > 0.9999
        assert verify(digits[layout].path).passed
    assert verify(digits["packed"].path).passed
    reference = read_probe(digits["packed"].path).reference
    outputs = OnnxPredictor(digits["packed"].path).predict(read_probe(digits["packed"].path).inputs)
    assert compare(reference, outputs).relative > 1e-3  # packing does change the model


def test_classifying_real_pictures_is_as_good_as_in_torch(digits, digits_run, digits_base):
    recipe = load_recipe(digits_run / "recipe.yaml")
    split = load_split(recipe.data, "eval")
    torch = load_engine(digits_run, base=digits_base).images
    expected = torch.classify(split.images)
    hits = [
        each.label == torch.labels[label]
        for each, label in zip(expected, split.labels, strict=True)
    ]
    for layout in ("separate", "merged"):
        found = Classifier(digits[layout].path, threads=1).classify(split.images)
        assert [each.label for each in found] == [each.label for each in expected]
        likely = [[each.probability for each in several] for several in (found, expected)]
        np.testing.assert_allclose(*likely, atol=1e-4)
        score = evaluate(digits[layout].path).metrics["accuracy"]
        assert score == pytest.approx(np.mean(hits))


def test_serving_gets_the_pixels_that_training_got(digits, digits_run):
    """Bit for bit: the probe holds what the training's own preprocessing made of held-out pictures."""
    recipe = load_recipe(digits_run / "recipe.yaml")
    pictures = load_split(recipe.data, "eval").images
    trained = read_probe(digits_run).inputs["pixel_values"]

    def found(preprocess):
        served = preprocess(pictures)
        assert served.dtype == trained.dtype
        return [any(np.array_equal(one, each) for each in served) for one in trained]

    served = Classifier(digits["merged"].path, threads=1).preprocess
    assert all(found(served))
    assert not any(found(replace(served, mean=(0.5, 0.5, 0.501))))  # negative control


def test_a_trained_language_model_writes_the_same_text(python_base, python_run, tmp_path):
    merged = merge(str(python_base), [python_run], tmp_path / "merged")
    engines = [
        load_engine(python_run, base=python_base).text,
        TextGenerator(export_onnx(merged, tmp_path / "onnx-merged").path, threads=1),
        TextGenerator(
            export_onnx(python_run, tmp_path / "onnx-separate", base=python_base).path, threads=1
        ),
    ]
    question = [{"role": "user", "content": "Return the sum of two numbers."}]
    texts = [engine.generate(engine.encode_chat(question)).text for engine in engines]
    assert texts[0] == texts[1] == texts[2]
    assert texts[0]
    manifest = open_checkpoint(tmp_path / "onnx-separate").manifest
    assert manifest.base == open_checkpoint(python_run).manifest.base
    assert manifest.quantization.scheme == "nf4"


def test_a_full_run_is_exported_too(digits_base, tmp_path):
    done = export_onnx(digits_base, tmp_path / "onnx")
    assert done.manifest.lineage[-1].options == {"precision": "fp32", "layout": "run"}
    assert verify(done.path).passed
