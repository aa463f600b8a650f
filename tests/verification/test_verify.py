"""`verify`: what passes, what is corrupt, what does not belong together, what is merely different."""

import json
import sys

import numpy as np
import pytest

from qlx.checkpoint import (
    read_manifest,
    read_probe,
    seal,
    write_probe,
)
from qlx.errors import CorruptCheckpoint, InputRefused, Mismatch, UsageError
from qlx.testing import assert_equivalent, assert_verified
from qlx.verification import to_json, verify
from qlx.verification.side import Side
from tests.adapter_support import make_base
from tests.defects import MERGED, family_of, spoil

judging = sys.modules["qlx.verification.verify"]  # the package has a function of that name

FAMILIES = ("vit", "llama-fp4")  # drawn with a saved head, and really trained


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return family_of(request, tmp_path_factory.mktemp(request.param), request.param)


def spoiled(family, target, name):
    """A merged copy with one of the known defects."""
    (defect,) = (defect for defect in MERGED if defect.name == name)
    path = family.copy("merged", target)
    return spoil(path, lambda tensors: defect.change(family, tensors))


def failures(report):
    assert json.loads(to_json(report))["passed"] is report.passed
    return [check.name for check in report.failures]


@pytest.mark.parametrize("kind", ["adapter", "merged", "merged16", "packed"])
def test_untouched_checkpoints_pass(family, kind):
    report = verify(family.root / kind, base=family.base if kind == "adapter" else None)
    assert report.passed, failures(report)
    assert len(report.checks) >= 4


@pytest.mark.parametrize("kind", ["adapter", "merged", "packed"])
def test_any_flipped_byte_is_corruption(family, tmp_path, kind):
    path = family.copy(kind, tmp_path)
    random = np.random.default_rng(0)
    for file in sorted(path.iterdir()) + 8 * [path / "qlx.json"]:  # the manifest seals itself
        data = bytearray(file.read_bytes())
        at = int(random.integers(len(data)))
        data[at] ^= 1 << int(random.integers(8))
        file.write_bytes(data)
        with pytest.raises(InputRefused) as caught:
            verify(path, base=family.base if kind == "adapter" else None)
        assert caught.value.exit_code == 3, file.name
        data[at] = (family.root / kind / file.name).read_bytes()[at]
        file.write_bytes(data)
    assert verify(path, base=family.base if kind == "adapter" else None).passed


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_a_missing_or_an_added_file_is_corruption(family, tmp_path, kind):
    path = family.copy(kind, tmp_path)
    (path / "extra.txt").write_text("x")
    with pytest.raises(CorruptCheckpoint, match=r"extra\.txt"):
        verify(path)
    (path / "extra.txt").unlink()
    (path / "config.json").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"config\.json"):
        verify(path)


def test_the_wrong_base_is_a_mismatch(family):
    for kind in ("adapter", "merged"):
        with pytest.raises(Mismatch, match="not the base"):
            verify(family.root / kind, base=family.other_base)


def test_a_base_that_is_not_here_is_asked_for(family, tmp_path):
    path = family.copy("adapter", tmp_path)
    manifest = read_manifest(path)[0]
    elsewhere = manifest.base.model_copy(update={"name": "nowhere/to/be/found"})
    seal(path, manifest.model_copy(update={"base": elsewhere}))
    with pytest.raises(InputRefused, match="--base"):
        verify(path)


def test_a_dtype_that_transformers_would_round_to_is_caught(family, tmp_path):
    path = family.copy("merged", tmp_path)
    config = json.loads((path / "config.json").read_text())
    assert config["dtype"] == "float32"
    (path / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    seal(path, read_manifest(path)[0])
    assert failures(verify(path)) == ["dtype"]


def test_a_probe_of_another_model_is_caught(family, tmp_path):
    path = family.copy("merged", tmp_path)
    probe = read_probe(path)
    wrong = type(probe)(probe.task, probe.inputs, probe.base, probe.base)
    write_probe(path / "probe.safetensors", wrong)
    seal(path, read_manifest(path)[0])
    assert "reference: relative" in failures(verify(path))


def test_no_probe_is_no_verification(family, tmp_path):
    path = family.copy("merged", tmp_path)
    (path / "probe.safetensors").unlink()
    manifest = read_manifest(path)[0].model_copy(update={"probe": None})
    seal(path, manifest)
    with pytest.raises(InputRefused, match="no probe"):
        verify(path)
    report = verify(path, against=family.merged.path)
    assert report.passed


def test_a_lossy_history_without_own_outputs_is_refused(family, tmp_path):
    path = family.copy("packed", tmp_path)
    probe = read_probe(path)
    write_probe(path / "probe.safetensors", type(probe)(probe.task, probe.inputs, probe.reference))
    seal(path, read_manifest(path)[0])
    with pytest.raises(Mismatch, match="no outputs of its own"):
        verify(path)


def test_limits_can_be_tightened_only(family):
    path = family.merged.path
    assert not verify(path, tighten={"max_abs": 0.0}).passed
    assert verify(path, tighten={"kl_mean": 1e-6}).passed
    with pytest.raises(UsageError, match="looser"):
        verify(path, tighten={"relative": 1.0})


@pytest.mark.parametrize("kind", ["merged16", "packed", "adapter"])
def test_kinds_are_compared_with_each_other(family, kind):
    report = verify(family.merged.path, against=family.root / kind, base=family.base)
    assert report.passed, failures(report)
    back = verify(family.root / kind, against=family.merged.path, base=family.base)
    assert back.passed, failures(back)
    if kind == "adapter":
        assert report.comparisons["against"].relative < 2e-5


@pytest.mark.parametrize("defect", ["sign", "one delta dropped", "layers exchanged"])
def test_a_defect_shows_against_another_kind(family, tmp_path, defect):
    path = spoiled(family, tmp_path, defect)
    assert failures(verify(family.root / "adapter", against=path, base=family.base))


def test_probes_of_different_inputs_are_not_compared(family, tmp_path):
    path = family.copy("merged", tmp_path)
    probe = read_probe(path)
    inputs = {name: array[::-1].copy() for name, array in probe.inputs.items()}
    write_probe(path / "probe.safetensors", type(probe)(probe.task, inputs, probe.reference))
    seal(path, read_manifest(path)[0])
    with pytest.raises(Mismatch, match="different inputs"):
        verify(family.merged.path, against=path)


def test_a_failure_says_what_to_do(family, tmp_path):
    path = spoiled(family, tmp_path, "sign")
    alone = verify(path)
    assert any("what to do" in note and "--against ADAPTER" in note for note in alone.notes)
    pair = verify(path, against=family.merged.path)
    assert any("what to do" in note and "another base" in note for note in pair.notes)
    fine = (verify(family.merged.path), verify(family.merged.path, against=family.root / "packed"))
    assert not any("what to do" in note for report in fine for note in report.notes)


@pytest.mark.parametrize("kind", ["merged", "packed"])
def test_a_wrong_base_that_is_not_needed_is_said_to_be_both(family, tmp_path, kind):
    other = make_base(tmp_path / "other", "llama", seed=9)
    with pytest.raises(Mismatch, match=f"not the base of .*{kind}.*--base can be left out"):
        verify(family.root / kind, base=other)
    with pytest.raises(Mismatch, match="--base can be left out"):
        verify(family.root / kind, against=family.merged.path, base=other)
    with pytest.raises(Mismatch, match="pass the right --base"):
        verify(family.root / "adapter", base=other)


@pytest.mark.parametrize("against", [False, True])
def test_limits_are_refused_before_a_model_is_run(family, against, monkeypatch):
    def never(*args):
        raise AssertionError("was run")

    monkeypatch.setattr(judging, "predictor_of", never)
    monkeypatch.setattr(Side, "outputs", never)
    other = family.root / "merged" if against else None
    for limits in ({"top1": 2}, {"relative": 1.0}):
        with pytest.raises(UsageError):
            verify(family.merged.path, against=other, tighten=limits)


def test_assertions_for_other_peoples_suites(family, tmp_path):
    assert assert_verified(family.merged.path, kl_mean=1e-6).passed
    assert assert_equivalent(family.merged.path, family.root / "packed").passed
    path = spoiled(family, tmp_path, "sign")
    with pytest.raises(AssertionError, match="reference: relative"):
        assert_verified(path)
    with pytest.raises(AssertionError, match="against: relative"):
        assert_equivalent(path, family.merged.path)
