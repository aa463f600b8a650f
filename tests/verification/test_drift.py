"""Drift of layers and weights: the formulas by hand, and the picture that shows them."""

import numpy as np
import pytest

from qlx.errors import UsageError
from qlx.verification import Drift, LayerDrift, WeightDrift, check_picture, draw
from qlx.verification.drift import LayerTally, weight_drift

RANDOM = np.random.default_rng(0)


def states(count=4, shape=(3, 5, 8)):
    return [RANDOM.normal(size=shape).astype(np.float32) for _ in range(count)]


def lazy(**weights):
    return {name.replace("_", "."): (lambda value=value: value) for name, value in weights.items()}


def test_equal_states_do_not_drift():
    reference, base = states(), states()
    tally = LayerTally(["a", "b"])
    tally.add(reference, reference, reference, base)
    layers = tally.layers()
    assert [layer.name for layer in layers] == ["embeddings", "a", "b", "head"]
    assert all((layer.drift, layer.own) == (0, 0) for layer in layers)
    assert all(layer.retention == pytest.approx(1) for layer in layers)


def test_the_layer_that_moved_is_named():
    reference, base = states(), states()
    free = [reference[0], reference[1] + 0.1, reference[2] + 0.2, reference[3] + 0.3]
    fed = [reference[0], reference[1] + 0.1, reference[2], reference[3]]
    tally = LayerTally(["a", "b"])
    tally.add(reference, free, fed, base)
    drift = Drift(tally.layers())
    assert drift.worst_layer.name == "a"
    norm = np.linalg.norm(reference[1])
    assert drift.layers[1].own == pytest.approx(0.1 * np.sqrt(reference[1].size) / norm, rel=1e-5)
    assert drift.layers[2].drift > 0 == drift.layers[2].own


def test_retention_is_the_share_of_the_adapters_effect():
    base, effect = np.zeros((2, 3)), np.ones((2, 3))
    for share, expected in ((0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (2.0, 2.0), (-1.0, -1.0)):
        tally = LayerTally([])
        tally.add([effect] * 2, [base + share * effect] * 2, [effect] * 2, [base] * 2)
        assert tally.layers()[0].retention == pytest.approx(expected)
    tally = LayerTally([])
    tally.add([effect] * 2, [effect] * 2, [effect] * 2, [effect] * 2)
    assert tally.layers()[0].retention is None  # nothing to keep


def test_noise_beside_the_effect_is_drift_and_no_loss():
    base = np.zeros((1, 4))
    effect, noise = np.array([[1.0, 0, 0, 0]]), np.array([[0, 0.5, 0, 0]])
    tally = LayerTally([])
    tally.add([effect] * 2, [effect + noise] * 2, [effect] * 2, [base] * 2)
    assert tally.layers()[0].retention == pytest.approx(1)
    assert tally.layers()[0].drift == pytest.approx(0.5)


def test_batches_add_up_and_padding_is_left_out():
    reference, free = states(), states()
    mask = np.ones((3, 5), bool)
    mask[:, 3:] = False
    spoiled = [array.copy() for array in free]
    for array in spoiled:
        array[:, 3:] = 1e6
    whole, parts = LayerTally(["a", "b"]), LayerTally(["a", "b"])
    whole.add(reference, free, free, mask=mask)
    for at in range(3):
        cut = [[array[at : at + 1] for array in batch] for batch in (reference, spoiled)]
        parts.add(cut[0], cut[1], cut[1], mask=mask[at : at + 1])
    assert [layer.drift for layer in parts.layers()] == pytest.approx(
        [layer.drift for layer in whole.layers()]
    )
    unmasked = LayerTally(["a", "b"])
    unmasked.add(reference, spoiled, spoiled)
    assert unmasked.layers()[0].drift > 1e4


def test_what_is_not_finite_drifts_as_far_as_can_be():
    reference, free = states(2), states(2)
    free[1][0, 0, 0] = np.nan
    tally = LayerTally([])
    tally.add(reference, free, free, states(2))
    assert tally.layers()[1].drift == np.finfo(np.float64).max
    assert tally.layers()[1].retention is None


def test_weights_are_compared_by_name():
    base, delta = RANDOM.normal(size=(4, 6)), RANDOM.normal(size=(4, 6))
    reference = lazy(x_weight=base + delta, y_weight=base, z_weight=base)
    candidate = lazy(x_weight=base + 0.25 * delta, y_weight=base, w_weight=base)
    found, unseen = weight_drift(reference, candidate, lazy(x_weight=base, y_weight=base))
    assert unseen == ("w.weight", "z.weight")
    first, second = found
    assert first.name == "x.weight"
    assert first.drift == pytest.approx(0.75 * np.linalg.norm(delta) / np.linalg.norm(base + delta))
    assert first.change == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(base))
    assert first.retention == pytest.approx(0.25)
    assert second == WeightDrift("y.weight", 0.0, 0.0, None)
    assert Drift(weights=found).worst_weight == first


def test_weights_of_other_shapes_are_not_compared():
    found, unseen = weight_drift(lazy(x=np.ones((2, 3))), lazy(x=np.ones((3, 2))))
    assert found == ()
    assert unseen == ("x",)


@pytest.fixture
def drift():
    layers = (LayerDrift("embeddings", 0, 0), LayerDrift("m.layers.0", 0.1, 0.1, 0.9))
    weights = (WeightDrift("m.layers.0.q.weight", 0.1), WeightDrift("norm.weight", 0.0))
    return Drift((*layers, LayerDrift("head", 0.1, 0.0)), weights)


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_a_picture_is_drawn_the_same_each_time(drift, tmp_path, name, start):
    draw(drift, tmp_path / name)
    first = (tmp_path / name).read_bytes()
    assert first.startswith(start)
    draw(drift, tmp_path / name)
    assert (tmp_path / name).read_bytes() == first
    draw(Drift(drift.layers[:2], drift.weights), tmp_path / name)
    assert (tmp_path / name).read_bytes() != first


def test_a_picture_of_what_is_not_visible_says_so(tmp_path):
    draw(Drift(), tmp_path / "empty.svg")
    assert (tmp_path / "empty.svg").stat().st_size > 1000


def test_what_is_not_finite_is_drawn_at_the_end_of_the_scale(drift, tmp_path):
    largest = float(np.finfo(np.float64).max)
    broken = (LayerDrift("m.layers.0", largest, largest), LayerDrift("head", 0, 0))
    draw(Drift(broken, drift.weights), tmp_path / "broken.png")
    assert (tmp_path / "broken.png").stat().st_size > 1000


def test_other_kinds_of_picture_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"\.png or an \.svg"):
        check_picture(tmp_path / "a.gif")
