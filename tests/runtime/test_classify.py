"""Classification of pictures, with the preprocessing that the checkpoint carries."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from qlx.checkpoint import read_manifest, seal
from qlx.errors import CorruptCheckpoint, InputRefused
from qlx.runtime import Classifier, class_labels


def picture(seed, size=(40, 30)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_probabilities_are_those_of_torch(vit):
    checkpoint, model = vit
    classifier = Classifier(checkpoint.path, threads=1)
    images = [picture(seed) for seed in range(35)]
    with torch.inference_mode():
        logits = model(pixel_values=torch.from_numpy(classifier.preprocess(images))).logits
    expected = torch.softmax(logits.double(), -1).numpy()
    for found, row in zip(classifier.classify(images), expected, strict=True):
        np.testing.assert_allclose(list(found.probabilities.values()), row, atol=1e-6)
        assert found.label == f"class {row.argmax()}"
        assert found.probability == pytest.approx(row.max())


def test_arrays_and_pictures_are_the_same(vit):
    classifier = Classifier(vit[0].path)
    assert classifier.classify([np.asarray(picture(1))]) == classifier.classify([picture(1)])
    assert classifier.classify([]) == []


def test_a_language_model_does_not_classify(llama):
    with pytest.raises(InputRefused, match="causal-lm"):
        Classifier(llama[0].path)


@pytest.mark.parametrize(
    "labels", [{"0": "a"}, {"0": "a", "2": "b"}, None, {str(i): "a" for i in range(5)}]
)
def test_labels_that_do_not_fit_are_refused(vit, tmp_path, labels):
    shutil.copytree(vit[0].path, tmp_path / "copy")
    file = tmp_path / "copy" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"id2label": labels}))
    seal(tmp_path / "copy", read_manifest(tmp_path / "copy")[0])
    with pytest.raises(CorruptCheckpoint, match="label"):
        Classifier(tmp_path / "copy").classify([picture(0)])


def test_labels_are_read_from_an_object(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CorruptCheckpoint, match=r"config\.json: holds a list"):
        class_labels(tmp_path)
