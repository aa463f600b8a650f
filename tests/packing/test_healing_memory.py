"""Healing takes the memory of two layers and of the calibration data, however deep the model is."""

import sys

import pytest

from benchmarks.healing_memory import TINY, Case, models, peak

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]
CASE = Case(steps=2)
LAYERS = (2, 5)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("memory")
    tiny = models(root, TINY, 1)
    return {layers: (*models(root, CASE, layers), *tiny) for layers in LAYERS}


def test_the_bound_holds_whatever_the_depth(tmp_path, made):
    marks = {n: peak(made[n], tmp_path / f"{n}", CASE, "int4", "paged")["peak"] for n in LAYERS}
    assert max(marks.values()) <= CASE.bound
    assert marks[5] - marks[2] < CASE.layer / 2  # three layers more


def test_what_stays_in_memory_breaks_it(tmp_path, made):
    """Nothing is let go of, and that is all that differs."""
    assert peak(made[5], tmp_path / "held", CASE, "int4", "held")["peak"] > CASE.bound
