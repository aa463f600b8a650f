"""The four renderings of a report agree with each other and can be parsed."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest

from qlx.verification import Check, Report, compare, rows, to_json, to_junit, to_markdown


@pytest.fixture
def report():
    same = np.eye(3)
    return Report(
        subject="merged",
        kind="merged",
        task="causal-lm",
        digest="sha256:" + "0" * 64,
        against="unmerged, fp32",
        checks=(
            Check("integrity", True, "5 files match"),
            Check("reference: relative", False, "fp32 | same function", 0.25, 1e-5, "≤"),
        ),
        comparisons={"reference": compare(same, same * 1.25)},
        notes=("limits: fp32",),
    )


def test_passes_only_with_comparisons_and_without_failures(report):
    passing = Report("a", "merged", "causal-lm", "d", "b", report.checks[:1], report.comparisons)
    assert passing.passed
    assert not report.passed
    assert [check.name for check in report.failures] == ["reference: relative"]
    nothing_compared = Report("a", "merged", "causal-lm", "d", "b", report.checks[:1])
    assert not nothing_compared.passed


def test_rows(report):
    assert rows(report) == [
        ("integrity", "5 files match", "", "ok"),
        ("reference: relative", "0.25", "≤ 1e-05", "FAILED"),
    ]


def test_json_says_everything(report):
    value = json.loads(to_json(report))
    assert value["passed"] is False
    assert value["checks"][1]["value"] == 0.25
    assert value["comparisons"]["reference"]["relative"] == pytest.approx(0.25)


def test_junit_counts_failures(report):
    suite = ElementTree.fromstring(to_junit(report))
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    (failure,) = suite.iter("failure")
    assert failure.get("message") == "0.25 ≤ 1e-05"


def test_markdown_escapes_the_table(report):
    text = to_markdown(report)
    assert text.startswith("### qlx verify: FAILED")
    assert "| reference: relative | 0.25 | ≤ 1e-05 | FAILED |" in text
    assert text.endswith("- limits: fp32\n")
