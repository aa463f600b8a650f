"""The whole way with really trained adapters: NF4 and FP4, a vision and a language model."""

import pytest

from qlx.checkpoint import read_probe
from qlx.merging import merge
from qlx.verification import compare, verify

RUNS = ["digits_run", "digits_run_fp4", "python_run", "python_run_fp4"]


@pytest.fixture(params=RUNS)
def pair(request):
    base = request.getfixturevalue(request.param.partition("_")[0] + "_base")
    return base, request.getfixturevalue(request.param)


def test_as_trained_in_fp32_equals_the_unmerged_model(tmp_path, pair):
    base, run = pair
    merged = merge(base, [run], tmp_path / "merged")
    found = verify(merged.path).comparisons["reference"]
    assert found.relative < 1e-5
    assert found.top1 == 1.0
    assert merged.manifest.lineage[-1].options["exact"] is True
    probe = read_probe(run)
    effect = compare(probe.reference, probe.base, probe.mask)
    assert effect.relative > 0.05  # the adapter matters, so agreement means something


def test_the_original_base_gives_another_model(tmp_path, pair):
    base, run = pair
    merged = merge(base, [run], tmp_path / "merged", onto="original")
    report = verify(merged.path)
    assert report.passed
    assert report.comparisons["reference"].relative > 1e-3
    assert report.comparisons["own"].relative < 1e-5


def test_the_recorded_base_is_found_by_its_name(tmp_path, pair, monkeypatch):
    base, run = pair
    merged = merge(base, [run], tmp_path / "merged")
    monkeypatch.chdir(base.parent)
    assert merged.manifest.base.name == base.name
    assert merge(None, [run], tmp_path / "again").digest == merged.digest
