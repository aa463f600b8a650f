"""Places between frames and cells, the target, and peaks found between the cells."""

import numpy as np
import pytest
from PIL import Image

from qlx.inputs import find_peaks, gaussian_target, rescaled


def logits_of(probability):
    clipped = np.clip(probability, 1e-9, 1 - 1e-9)
    return np.log(clipped / (1 - clipped))


def test_places_move_as_resizing_moves_pixels():
    """A bright spot in a picture is where `rescaled` says in the picture made larger and smaller."""
    pixels = np.zeros((40, 60), np.uint8)
    pixels[16:20, 30:36] = 255
    middle = np.array([32.5, 17.5])
    for size in ((120, 120), (30, 20), (60, 80)):
        small = np.asarray(Image.fromarray(pixels).resize(size, 2), np.float64)
        y, x = np.mgrid[: size[1], : size[0]]
        found = np.array([(small * x).sum(), (small * y).sum()]) / small.sum()
        np.testing.assert_allclose(rescaled(middle, (60, 40), size), found, atol=0.02)
        np.testing.assert_allclose(rescaled(found, size, (60, 40)), middle, atol=0.05)


def test_the_target_is_a_bell_where_something_is():
    places = np.array([[3.0, 2.0], [1.0, 1.0]])
    target = gaussian_target(places, np.array([True, False]), (5, 8), 1.5)
    assert target.shape == (2, 5, 8)
    assert target[0, 2, 3] == 1
    assert target[0, 2, 5] == pytest.approx(np.exp(-4 / 4.5))
    assert target[0, 4, 4] == pytest.approx(np.exp(-5 / 4.5))
    assert not target[1].any()


@pytest.mark.parametrize("sigma", [0.8, 1.0, 2.0])
def test_peaks_lie_between_the_cells(sigma):
    """A hundred bells at known places, several to a batch: far better than the highest cell."""
    random = np.random.default_rng(0)
    places = random.uniform(3, [36, 20], (50, 2, 2))
    there = np.array([True, True])
    maps = np.stack([gaussian_target(pair, there, (24, 40), sigma) for pair in places])
    cells, scores = find_peaks(logits_of(0.9 * maps))
    highest = maps.reshape(50, 2, -1).argmax(-1)
    cell = np.stack([highest % 40, highest // 40], axis=-1)
    error = np.linalg.norm(cells - places, axis=-1)
    of_the_cell = np.linalg.norm(cell - places, axis=-1)
    assert error.max() < 1e-3
    assert of_the_cell.mean() > 0.3
    np.testing.assert_allclose(scores, 0.9 * maps.max(axis=(-2, -1)), rtol=1e-5)


def test_a_peak_survives_noise_better_than_its_cell():
    random = np.random.default_rng(1)
    places = random.uniform(3, [36, 20], (200, 1, 2))
    maps = np.stack([gaussian_target(p, np.array([True]), (24, 40), 1.5) for p in places])
    noisy = logits_of(0.8 * maps + 0.01) + random.normal(0, 0.05, maps.shape)
    cells, _ = find_peaks(noisy)
    highest = noisy.reshape(200, -1).argmax(-1)
    cell = np.stack([highest % 40, highest // 40], axis=-1)
    error = np.linalg.norm(cells[:, 0] - places[:, 0], axis=-1).mean()
    assert error < 0.5 * np.linalg.norm(cell - places[:, 0], axis=-1).mean()


@pytest.mark.parametrize("corner", [(0, 0), (0, 39), (23, 0), (23, 39)])
def test_a_peak_at_the_border_is_its_cell(corner):
    logits = np.full((24, 40), -5.0)
    logits[corner] = 2.0
    (x, y), score = find_peaks(logits)
    assert (y, x) == corner
    assert score == pytest.approx(1 / (1 + np.exp(-2.0)))


def test_a_flat_heatmap_and_a_broken_one():
    (x, y), score = find_peaks(np.full((4, 6), -3.0))
    assert (x, y) == (0, 0)
    assert score < 0.05
    broken = np.zeros((2, 4, 6))
    broken[1, 2, 2] = np.nan
    places, scores = find_peaks(broken)
    assert np.isfinite(places[0]).all()
    assert np.isnan(places[1]).all()
    assert np.isnan(scores[1])
