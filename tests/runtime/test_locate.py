"""Places without torch: the pixels training saw, and where the ball is in the frame as it was given."""

import numpy as np
import pytest
from PIL import Image

from qlx.errors import InputRefused
from qlx.inputs import keypoint_batches, load_split, open_image
from qlx.recipe import DataSection
from qlx.runtime import Classifier, Locator
from tests.isolation import run_without


@pytest.fixture(scope="module")
def locator(tennis_models):
    return Locator(tennis_models["onnx"], threads=1)


@pytest.fixture(scope="module")
def held_out(tennis_clips):
    data = DataSection(source="tracknet", path=str(tennis_clips / "dim"))
    return load_split(data, "eval")


def test_the_pixels_are_those_of_training(locator, held_out, tennis_run):
    from qlx.checkpoint import read_probe

    (batch,) = keypoint_batches(held_out, locator.preprocess, 64)
    probe = read_probe(tennis_run)
    rows = [round(at * 39 / 5) for at in range(6)]  # the probe keeps six, spread over the clips
    np.testing.assert_array_equal(batch.inputs["pixel_values"][rows], probe.inputs["pixel_values"])
    np.testing.assert_array_equal(batch.labels[rows], probe.labels)


def test_places_are_in_pixels_of_the_frame(locator, held_out):
    """Most are found, near the label; a frame twice as large gives places twice as far."""
    frames = [item[-1] for item in held_out.frames]
    found = [places[0] for places in locator.locate(frames)]
    assert {place.name for place in found} == {"ball"}
    away = [
        np.hypot(place.x - x, place.y - y)
        for place, (x, y, _) in zip(found, held_out.places[:, 0], strict=True)
        if place.found
    ]
    assert len(away) > len(frames) / 3
    assert np.median(away) < 3
    best = max(range(len(frames)), key=lambda at: found[at].score)
    image = open_image(frames[best])
    double = image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST)
    ((large,),) = locator.locate([double])
    assert (large.x, large.y) == pytest.approx(
        (2 * found[best].x + 0.5, 2 * found[best].y + 0.5), abs=1.5
    )


def test_a_path_an_image_and_an_array_are_the_same(locator, held_out):
    path = held_out.frames[0][-1]
    image = Image.open(path)
    answers = locator.locate([path, image, np.asarray(image), [path]])
    assert all(answer == answers[0] for answer in answers)


def test_what_is_no_clip_is_refused(locator, tmp_path, vit):
    image = Image.new("RGB", (20, 20))
    with pytest.raises(InputRefused, match="1 frames at once, not 3"):
        locator.locate([[image] * 3])
    with pytest.raises(InputRefused, match="no frame"):
        locator.locate([[]])
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(InputRefused, match=r"text\.png"):
        locator.locate([tmp_path / "text.png"])
    with pytest.raises(InputRefused, match="does not find places"):
        Locator(vit[0].path)
    with pytest.raises(InputRefused, match="does not classify"):
        Classifier(locator.model)


def test_it_runs_where_there_is_no_torch(tennis_models, held_out, locator):
    path = held_out.frames[0][-1]
    ((expected,),) = locator.locate([path])
    code = (
        "from qlx.runtime import Locator\n"
        "((place,),) = Locator(argv[0], threads=1).locate([argv[1]])\n"
        "result = place.x, place.y, place.score\n"
    )
    blocked = ("torch", "transformers", "peft", "bitsandbytes")
    found = run_without(blocked, code, tennis_models["onnx"], path)
    assert found == pytest.approx([expected.x, expected.y, expected.score], abs=1e-6)
