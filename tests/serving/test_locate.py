"""Places over HTTP, by ONNX and by torch."""

import base64

import pytest

from qlx.runtime import Locator
from qlx.serving import load_engine
from tests.serving.support import served


@pytest.fixture(scope="module")
def frame(tennis_clips):
    return next(tennis_clips.glob("bright/game1/Clip2/0003.png"))


@pytest.fixture(scope="module")
def places(tennis_models, image_engine):
    graph = load_engine(tennis_models["onnx"], name="finder", threads=1)
    torch = load_engine(tennis_models["adapter"], name="trainer", base=tennis_models["base"])
    with served([graph, torch, image_engine]) as client:
        yield client


def test_a_frame_as_base64_and_as_raw_bytes(places, frame, tennis_models):
    ((expected,),) = Locator(tennis_models["onnx"], threads=1).locate([frame])
    image = base64.b64encode(frame.read_bytes()).decode()
    raw = {"content": frame.read_bytes(), "headers": {"content-type": "image/png"}}
    for answer in (
        places.post("/v1/locate", json={"image": image}),
        places.post("/v1/locate", json={"image": [image], "model": "finder"}),
        places.post("/v1/locate", **raw),
    ):
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert found["model"] == "finder"
        (ball,) = found["keypoints"]
        assert ball["name"] == "ball"
        assert (ball["x"], ball["y"]) == pytest.approx((expected.x, expected.y))
        assert ball["found"] == (ball["score"] >= 0.5)
    (again,) = places.post("/v1/locate?model=trainer", **raw).json()["keypoints"]
    assert (again["x"], again["y"]) == pytest.approx((expected.x, expected.y), abs=0.01)


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("locate", {"image": [""]}, 400, "not an image"),
        ("locate", {"image": []}, 400, "field image"),
        ("locate", {"image": "???"}, 400, "not base64"),
        ("locate", {"model": "looker", "image": ""}, 400, "does not find places"),
        ("classify", {"model": "finder", "image": ""}, 400, "does not classify images"),
        ("locate", {"model": "nobody", "image": ""}, 404, "no model 'nobody'"),
    ],
)
def test_what_cannot_be_answered_says_why(places, path, body, status, message):
    answer = places.post(f"/v1/{path}", json=body)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]


def test_too_many_frames_are_refused(places, frame):
    image = base64.b64encode(frame.read_bytes()).decode()
    no_image = base64.b64encode(b"nothing that could be decoded").decode()
    for frames in ([image] * 3, [no_image] * 3):  # counted before they are decoded
        answer = places.post("/v1/locate", json={"image": frames})
        assert answer.status_code == 400
        assert "sees 1 frames at once, not 3" in answer.json()["error"]["message"]


def test_the_page_asks_for_places(places):
    page = places.get("/").text
    assert "v1/locate" in page
    assert "v1/classify" not in page
