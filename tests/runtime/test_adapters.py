"""Choosing adapters when a graph runs: by name, by row, step by step; a wrong name is never the base."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qlx.checkpoint import read_probe
from qlx.errors import CorruptCheckpoint, UsageError
from qlx.runtime import (
    CausalDecoder,
    Classifier,
    Locator,
    OnnxPredictor,
    TextGenerator,
    open_model,
)
from tests.runtime.test_without_torch import BARRED, ROOT

PROMPT = [9, 8, 7, 200, 31, 60]


@pytest.fixture(scope="module")
def text(swappable_python):
    return open_model(swappable_python, threads=1)


@pytest.fixture(scope="module")
def images(swappable_digits):
    return open_model(swappable_digits, threads=1)


def test_an_adapter_decodes_step_by_step_what_it_prefills(text):
    ids = np.array([PROMPT])
    for name in (None, "first", "second"):
        whole = CausalDecoder(text, adapter=name).feed(ids)
        decoder = CausalDecoder(text, adapter=name)
        parts = [decoder.feed(ids[:, cut]) for cut in (slice(0, 3), slice(3, 4), slice(4, 6))]
        np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=2e-5)
        other = CausalDecoder(text, adapter="first" if name is None else None).feed(ids)
        assert np.abs(other - whole).max() > 1e-2


def test_rows_decode_with_adapters_of_their_own_and_padding(text):
    names = ["second", None, "first"]
    ids = np.array([PROMPT, PROMPT[::-1], PROMPT])
    mask = np.ones_like(ids)
    mask[0, :2] = mask[2, :1] = 0
    decoder = CausalDecoder(text, 3, adapter=names)
    cuts = [slice(0, 3), slice(3, 4), slice(4, 5), slice(5, 6)]
    mixed = np.concatenate([decoder.feed(ids[:, cut], mask[:, cut]) for cut in cuts], axis=1)
    for row, name in enumerate(names):
        kept = ids[row][mask[row].astype(bool)]
        alone = CausalDecoder(text, adapter=name).feed(kept[None])[0]
        found = mixed[row][mask[row].astype(bool)]
        assert np.abs(found - alone).max() <= 1e-5 * np.abs(alone).max()


def test_generation_with_an_adapter_is_that_of_the_trained_model(
    swappable_python, python_base, python_run, python_second
):
    from qlx.serving import load_engine

    generator = TextGenerator(swappable_python, threads=1)
    question = [{"role": "user", "content": "Return the sum of two numbers."}]
    prompt, texts = generator.encode_chat(question), []
    for name, run in (("first", python_run), ("second", python_second)):
        expected = load_engine(run, base=python_base).text.generate(prompt)
        swapped = generator.with_adapter(name)
        assert swapped.generate(prompt) == expected
        assert TextGenerator(generator.model, adapter=name).generate(prompt) == expected
        assert swapped.codec is generator.codec
        texts.append(expected.text)
    assert len({*texts, generator.generate(prompt).text}) == 3


def test_images_of_one_call_have_adapters_of_their_own(images):
    random = np.random.default_rng(3)
    pictures = [random.integers(0, 256, (16, 16), dtype=np.uint8) for _ in range(40)]
    base = Classifier(images)
    alone = {name: base.with_adapter(name).classify(pictures) for name in (None, "first", "second")}
    names = [(None, "first", "second")[at % 3] for at in range(40)]
    for at, found in enumerate(base.with_adapter(names).classify(pictures)):
        wanted = list(alone[names[at]][at].probabilities.values())
        np.testing.assert_allclose(list(found.probabilities.values()), wanted, atol=1e-5)
    assert base.classify(pictures) == alone[None]
    with pytest.raises(UsageError, match="40 rows, the batch has 3"):
        base.with_adapter(names).classify(pictures[:3])
    with pytest.raises(UsageError, match="40 rows, the batch has 80"):
        base.with_adapter(names).classify(pictures * 2)


@pytest.mark.parametrize("name", ["third", "First", "", "../first", ["first", "third"], []])
def test_a_wrong_name_is_an_error_that_lists_the_right_ones(images, text, name):
    words = "at least one row" if name == [] else "there are first, second"
    for build in (
        lambda: OnnxPredictor(images, adapter=name),
        lambda: Classifier(images, adapter=name),
        lambda: Classifier(images).with_adapter(name),
        lambda: CausalDecoder(text, 2, adapter=name),
    ):
        with pytest.raises(UsageError, match=words):
            build()


def test_a_graph_without_adapters_says_so(vit):
    assert open_model(vit[0].path).adapters.names == ()
    with pytest.raises(UsageError, match="no swappable adapters"):
        OnnxPredictor(vit[0].path, adapter="first")


def test_adapters_are_listed_and_read_once(images):
    assert images.adapters.names == ("first", "second")
    first = images.adapters.choose("first")
    assert images.adapters.choose("first").inputs is first.inputs
    same = images.adapters.choose(["first", "first"])
    assert same.inputs is first.inputs
    with pytest.raises(UsageError, match="2 rows, the batch has 5"):
        same.for_batch(5)


def test_a_file_that_changes_under_a_running_model_is_refused(swappable_digits, tmp_path):
    copy = shutil.copytree(swappable_digits, tmp_path / "copy")
    model = open_model(copy)
    shutil.copyfile(copy / "first.onnx_adapter", copy / "second.onnx_adapter")
    with pytest.raises(CorruptCheckpoint, match="changed since"):
        OnnxPredictor(model, adapter="second")
    OnnxPredictor(model, adapter="first")


USE = (
    BARRED
    + """
import numpy as np
from qlx.checkpoint import read_probe
from qlx.runtime import OnnxPredictor
from qlx.verification import verify
directory = sys.argv[1]
for name in ("first", "second"):
    probe = read_probe(f"{directory}/{name}.probe.safetensors")
    found = OnnxPredictor(directory, adapter=name).predict(probe.inputs)
    error = np.linalg.norm(found - probe.reference) / np.linalg.norm(probe.reference)
    assert error < 1e-5, error
    assert np.linalg.norm(found - probe.base) > 1e-2 * np.linalg.norm(probe.base)
assert verify(directory).passed
"""
)


def test_adapters_need_no_torch(swappable_digits):
    command = [sys.executable, "-c", USE, str(swappable_digits)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_each_adapter_has_a_probe_of_its_own(swappable_python):
    probes = {
        name: read_probe(Path(swappable_python) / f"{name}.probe.safetensors").reference
        for name in ("first", "second")
    }
    assert not np.array_equal(*probes.values())


@pytest.mark.exhaustive
def test_places_are_found_with_an_adapter(tennis_base, tennis_run, tennis_models, tmp_path):
    from qlx.exporting import export_adapters

    done = export_adapters(tennis_base, [("dim", tennis_run)], tmp_path / "onnx")
    frames = [np.full((48, 80, 3), shade, np.uint8) for shade in (20, 90)]
    frames[1][20:24, 30:34] = 255
    wanted = Locator(tennis_models["onnx-separate"], threads=1).locate(frames)
    base = Locator(done.path, threads=1)
    mixed = base.with_adapter(["dim", None]).locate(frames)
    for found in (
        base.with_adapter("dim").locate(frames),
        Locator(done.path, adapter="dim").locate(frames),
    ):
        assert [[place.score for place in each] for each in found] == [
            [pytest.approx(place.score, rel=1e-4) for place in each] for each in wanted
        ]
    scores = [each[0].score for each in (*mixed, *wanted, *base.locate(frames))]
    assert scores[0] == pytest.approx(scores[2], rel=1e-4)
    assert scores[1] == pytest.approx(scores[5], rel=1e-4)
    assert scores[0] != pytest.approx(scores[4], rel=1e-3)
