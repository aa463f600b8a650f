"""The plan against real peaks of trainings on this machine, the short way of benchmarks/plan.py."""

import sys

import pytest

from benchmarks.plan import CASES, measured, planned

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]


def test_plans_are_within_a_fifth_of_real_peaks():
    plans = {name: planned(CASES[name]) for name in ("nf4-ckpt", "full")}
    peaks = {name: measured(CASES[name])[1] for name in plans}
    for name, plan in plans.items():
        assert plan == pytest.approx(peaks[name], rel=0.2), name
    assert plans["nf4-ckpt"] != pytest.approx(peaks["full"], rel=0.2)  # the control
