"""The metrics of places, against cases counted by hand."""

import numpy as np
import pytest

from qlx.inputs import Score

WIDTH, HEIGHT = 80, 48  # the frame; the heatmap has cells of 4 pixels


def heatmap(x=None, y=None, top=4.0):
    """Logits with one peak at a place of the frame that is a cell's centre (…, 1.5, 5.5, …)."""
    logits = np.full((12, 20), -6.0)
    if x is not None:
        logits[int((y + 0.5) // 4), int((x + 0.5) // 4)] = top
    return logits


def score(*cases):
    """Metrics of (heatmap, (x, y, visibility)) pairs."""
    total = Score("heatmap")
    logits = np.stack([case[0] for case in cases])[:, None]
    labels = np.array([[(*case[1], WIDTH, HEIGHT)] for case in cases], np.float32)
    total.add(logits[:1], labels[:1])
    if len(cases) > 1:
        total.add(logits[1:], labels[1:])
    return total


def test_counted_by_hand():
    total = score(
        (heatmap(21.5, 17.5), (21.5, 17.5, 1)),  # hit, 0 pixels away
        (heatmap(21.5, 17.5), (24.5, 21.5, 2)),  # hit, exactly 5 pixels away (3, 4)
        (
            heatmap(21.5, 17.5),
            (24.6, 21.5, 1),
        ),  # just over 5: a false positive, and no false negative
        (heatmap(41.5, 17.5), (21.5, 17.5, 3)),  # 20 away: the same; hidden balls count
        (heatmap(21.5, 17.5, top=-1.0), (21.5, 17.5, 1)),  # the right place, not sure: missed
        (heatmap(21.5, 17.5), (0, 0, 0)),  # nothing there: a false positive
        (heatmap(), (0, 0, 0)),  # nothing there, nothing said
    )
    assert total.count == 7
    assert total.keypoints.counts == {
        "hit": 2, "misplaced": 2, "imagined": 1, "missed": 1, "quiet": 1,
    }  # fmt: skip
    found = total.metrics()
    assert found["precision"] == pytest.approx(2 / 5)
    assert found["recall"] == pytest.approx(2 / 3)
    assert found["f1"] == pytest.approx(2 * (2 / 5) * (2 / 3) / (2 / 5 + 2 / 3))
    away = [0, 5, np.hypot(3.1, 4), 20, 0]
    assert found["pixel_error"] == pytest.approx(np.mean(away), abs=1e-4)
    assert found["pck"] == pytest.approx(2 / 5)  # 2 % of the diagonal are 1.87 pixels


def test_distances_are_those_of_the_original_frame():
    """The same heatmap of a frame twice as large is twice as far off."""
    logits = heatmap(21.5, 17.5)[None, None]
    total = Score("heatmap")
    total.add(logits, np.array([[[2 * 21.5 + 0.5 + 8, 2 * 17.5 + 0.5, 1, 2 * WIDTH, 2 * HEIGHT]]]))
    assert total.metrics()["pixel_error"] == pytest.approx(8)
    assert total.metrics()["f1"] == 0


def test_several_keypoints_count_each():
    total = Score("heatmap")
    pair = np.stack([heatmap(21.5, 17.5), heatmap(41.5, 17.5)])[None]
    labels = np.array([[(21.5, 17.5, 1, WIDTH, HEIGHT), (21.5, 17.5, 1, WIDTH, HEIGHT)]])
    total.add(pair, labels)
    assert total.count == 2
    assert total.metrics()["precision"] == 0.5


def test_where_no_ball_is_ever_there():
    found = score((heatmap(), (0, 0, 0))).metrics()
    assert found == {"f1": 0.0, "precision": 0.0, "recall": 0.0}


def test_a_broken_model_has_no_pixel_error():
    broken = heatmap(21.5, 17.5)
    broken[3, 3] = np.nan
    found = score((broken, (21.5, 17.5, 1)), (heatmap(21.5, 17.5), (21.5, 17.5, 1))).metrics()
    assert np.isnan(found["pixel_error"])
    assert np.isnan(found["pck"])
