"""The whole way with really trained adapters: NF4, FP4, int8 and ternary; a vision, a heatmap and a language model."""

import pytest

from qlx.checkpoint import read_probe, seal
from qlx.merging import merge
from qlx.verification import compare, verify
from tests.conftest import DIGITS_RUN, PYTHON_RUN, TENNIS_RUN, recipe_of

RUNS = ["digits_run", "digits_run_fp4", "python_run", "python_run_fp4", "tennis_run"]


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


CONTENT = {"digits": DIGITS_RUN, "python": PYTHON_RUN, "tennis": TENNIS_RUN}
SCHEMES = {
    "int8": {"quant_type": "int8"},
    "ternary": {"quant_type": "ternary", "group_size": 64},
    "nf4-plain": {"quant_type": "nf4", "double_quant": False},
    "fp4-double": {"quant_type": "fp4", "double_quant": True},
    "int4": {"quant_type": "int4", "group_size": 32, "symmetric": False},
}
DEFAULT = [(kind, name) for kind in ("digits", "python") for name in ("int8", "ternary")]


def cases():
    """Every task with every scheme; what is not in the default suite is exhaustive."""
    for kind in CONTENT:
        for name in SCHEMES:
            marks = () if (kind, name) in DEFAULT else pytest.mark.exhaustive
            yield pytest.param((kind, name), id=f"{kind}-{name}", marks=marks)


@pytest.fixture(params=cases())
def quantized_pair(request, trained):
    """A base and an adapter that was trained on it with its weights in the codes of a scheme."""
    kind, name = request.param
    base, content = request.getfixturevalue(f"{kind}_base"), CONTENT[kind]
    sections = {"name": f"{kind}-{name}", "quantization": SCHEMES[name]}
    if kind == "tennis":
        clips = request.getfixturevalue("tennis_clips") / "dim"
        sections["data"] = {**content["data"], "path": str(clips)}
    return base, trained(f"{kind}-{name}", recipe_of(content, base, **sections))


def test_on_codes_of_any_scheme_as_trained_equals_the_unmerged_model(tmp_path, quantized_pair):
    """With the negative control: the weights merged onto the original base fail in their place."""
    base, run = quantized_pair
    merged = merge(base, [run], tmp_path / "merged", dtype="float32")
    report = verify(merged.path, tighten={"top1": 1.0})
    assert report.passed
    found = report.comparisons["reference"]
    assert (found.relative < 1e-5, found.top1) == (True, 1.0)
    probe = read_probe(run)
    assert compare(probe.reference, probe.base, probe.mask).relative > 0.05
    against = verify(merged.path, against=run, base=base)
    assert against.passed
    original = merge(base, [run], tmp_path / "original", dtype="float32", onto="original")
    weights = (original.path / "model.safetensors").read_bytes()
    (merged.path / "model.safetensors").write_bytes(weights)
    seal(merged.path, merged.manifest)
    failed = [check.name for check in verify(merged.path).failures]
    assert "reference: relative" in failed
