"""The clip generator of the examples: what it draws is what it says, and the same every time."""

import csv
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qlx.inputs import read_clips

SCRIPT = Path(__file__).parents[1] / "examples" / "tennis_clips.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def drawn(script, tmp_path_factory):
    root = tmp_path_factory.mktemp("tennis")
    for condition in ("day", "night"):
        script["write_games"](
            root / condition,
            games=2,
            clips=2,
            frames=40,
            condition=condition,
            suffix=".png",
            quiet=True,
        )
    return root


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*.*"))}


def test_the_same_arguments_draw_the_same_bytes(script, tmp_path):
    options = {"games": 1, "clips": 1, "frames": 3, "size": (96, 54), "quiet": True}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        script["write_games"](tmp_path / name, seed=seed, **options)
    first, again, other = (contents(tmp_path / name) for name in "abc")
    assert len(first) == 4
    assert first == again
    assert first != other


def test_it_is_the_layout_that_is_read(drawn):
    clips = read_clips(drawn / "day")
    assert [len(clip) for clip in clips] == [40] * 4
    seen = np.concatenate([clip.places[:, 2] for clip in clips])
    assert (seen > 0).mean() > 0.8
    assert {1, 3} <= set(seen)  # easy, and hidden by a player
    for clip in clips:
        there = clip.places[clip.places[:, 2] > 0]
        assert (there[:, :2] >= 0).all()
        assert (there[:, :2] <= (319, 179)).all()


@pytest.mark.parametrize("condition", ["day", "night"])
def test_the_ball_is_where_the_label_says(drawn, condition):
    """What differs from the next frame but one is brightest in the ball's colour near the label."""
    hits = total = 0
    for clip in read_clips(drawn / condition):
        for at in range(0, len(clip) - 2, 3):
            x, y, visibility = clip.places[at]
            if visibility != 1:
                continue
            now, later = (np.asarray(Image.open(clip.frames[at + step]), float) for step in (0, 2))
            yellow = np.array([1.0, 1.0, -1.2])
            change = ((now - later) @ yellow)[
                round(y) - 4 : round(y) + 5, round(x) - 4 : round(x) + 5
            ]
            total += 1
            hits += change.size > 0 and change.max() > 60
    assert total > 20
    assert hits / total > 0.9


def test_night_is_darker_noisier_and_blurred(drawn):
    day, night = (
        np.asarray(Image.open(read_clips(drawn / name)[0].frames[0]), float)
        for name in ("day", "night")
    )
    assert night.mean() < 0.7 * day.mean()
    still = [
        np.asarray(Image.open(read_clips(drawn / name)[0].frames[at]), float)[150:, 140:180]
        for name in ("day", "night")
        for at in (0, 1)
    ]
    noise = [np.abs(first - second).mean() for first, second in (still[:2], still[2:])]
    assert noise[1] > 1.5 * noise[0]


def test_labels_say_what_happens(drawn):
    rows = []
    for file in sorted((drawn / "day").glob("game*/Clip*/Label.csv")):
        rows += csv.DictReader(file.read_text().splitlines())
    assert {row["visibility"] for row in rows} <= {"0", "1", "2", "3"}
    assert {"0", "2"} <= {row["status"] for row in rows if row["visibility"] != "0"}
    assert all((row["x-coordinate"] == "") == (row["visibility"] == "0") for row in rows)


def test_a_hit_ball_passes_the_net_and_lands_in_the_court(script):
    """Two hundred shots, followed until they bounce."""
    random = np.random.default_rng(0)
    for _ in range(200):
        rally = script["Rally"](random, script["CONDITIONS"]["day"])
        from_side, over = np.sign(rally.ball[1]), None
        for _ in range(3000):
            before = rally.ball[1]
            status = rally.step(0.001)
            if over is None and np.sign(rally.ball[1]) != np.sign(before):
                over = rally.ball[2]
            if status == script["BOUNCING"]:
                break
        assert over is not None
        assert over > script["NET_HEIGHT"] - 0.15
        assert np.sign(rally.ball[1]) == -from_side
        assert abs(rally.ball[1]) < script["HALF_LENGTH"] + 1.5
