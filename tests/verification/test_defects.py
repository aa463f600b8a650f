"""Every known defect is caught in really trained models: ViT and Llama on NF4 and FP4 bases, ViTPose on NF4.

The same checkpoints pass untouched. docs/verify.md lists the defects; a test keeps it complete.
"""

import re
from pathlib import Path

import pytest

from qlx.verification import verify
from tests.defects import (
    CONFIGURED,
    DRAWN,
    IN_ADAPTER,
    MERGED,
    PACKED,
    ROUNDED,
    TRAINED,
    family_of,
    spoil,
    spoil_config,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "verify.md"
FAMILIES = [*TRAINED, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in DRAWN)]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return family_of(request, tmp_path_factory.mktemp(request.param), request.param)


def named(defects):
    return pytest.mark.parametrize("defect", defects, ids=lambda defect: defect.name)


def failures(report):
    return [check.name for check in report.failures]


def spoiled(family, target, kind, defect):
    """A copy of one kind with the defect, sealed again."""
    if family.kind not in defect.kinds:
        pytest.skip(f"a {family.kind} has no such part")
    path = family.copy(kind, target)
    return spoil(path, lambda tensors: defect.change(family, tensors))


@pytest.mark.parametrize("kind", ["adapter", "merged", "merged16", "packed"])
def test_untouched_checkpoints_pass(family, kind):
    report = verify(family.root / kind, base=family.base if kind == "adapter" else None)
    assert report.passed, failures(report)


@named(MERGED)
def test_a_defect_in_a_merge_is_caught(family, tmp_path, defect):
    assert failures(verify(spoiled(family, tmp_path, "merged", defect)))


@named(ROUNDED)
def test_a_defect_in_a_rounded_merge_is_caught_by_its_own_outputs(family, tmp_path, defect):
    def change(tensors):
        wide = {name: tensor.float() for name, tensor in tensors.items()}
        defect.change(family, wide)
        tensors.update({name: tensor.bfloat16() for name, tensor in wide.items()})

    report = verify(spoil(family.copy("merged16", tmp_path), change))
    assert any(name.startswith("own") for name in failures(report))


@named(IN_ADAPTER)
def test_a_defect_in_an_adapter_is_caught(family, tmp_path, defect):
    assert failures(verify(spoiled(family, tmp_path, "adapter", defect), base=family.base))


@pytest.mark.parametrize("name", CONFIGURED)
def test_a_changed_scaling_is_caught(family, tmp_path, name):
    path = spoil_config(family.copy("adapter", tmp_path), CONFIGURED[name])
    assert "reference: relative" in failures(verify(path, base=family.base))


@named(PACKED)
def test_a_defect_in_a_pack_is_caught_by_its_own_outputs(family, tmp_path, defect):
    report = verify(spoiled(family, tmp_path, "packed", defect))
    assert any(name.startswith("own") for name in failures(report))


def test_there_are_enough_and_the_document_lists_them_all():
    defects = [*MERGED, *IN_ADAPTER, *PACKED]
    assert len(defects) + len(CONFIGURED) >= 50
    assert len({defect.name for defect in defects}) == len(defects)
    text = DOCUMENT.read_text()
    for defect in defects:
        assert f"| {defect.text} |" in text, defect.name
    for name in CONFIGURED:
        assert f"| {name} |" in text, name


def relative(report):
    """The largest relative error of a report, as a multiple of its limit; None if it is not finite."""
    found = [check for check in report.checks if check.name.endswith("relative") and check.limit]
    return max(
        (check.value / check.limit for check in found if check.value is not None), default=None
    )


def sizes(family, target):
    """How far each defect moves a family's outputs, by the defect's text."""
    for kind, defects in (("merged", MERGED), ("adapter", IN_ADAPTER), ("packed", PACKED)):
        for defect in (one for one in defects if family.kind in one.kinds):
            place = target / kind / defect.name.replace(" ", "_")
            place.mkdir(parents=True)
            path = spoiled(family, place, kind, defect)
            yield (
                defect.text,
                relative(verify(path, base=family.base if kind == "adapter" else None)),
            )
    for name, change in CONFIGURED.items():
        place = target / name.replace(" ", "_")
        place.mkdir()
        path = spoil_config(family.copy("adapter", place), change)
        yield name, relative(verify(path, base=family.base))


@pytest.mark.exhaustive
def test_the_document_gives_the_smallest_error_of_each(request, tmp_path):
    smallest = {}
    for name in TRAINED:
        root = tmp_path / name
        (root / "family").mkdir(parents=True)
        for text, size in sizes(family_of(request, root / "family", name), root):
            if size is not None:
                smallest[text] = min(size, smallest.get(text, size))
    document = DOCUMENT.read_text()
    for text, size in smallest.items():
        printed = re.search(rf"\| {re.escape(text)} \| ([\d. ]+) \|", document)
        assert printed, text
        assert float(printed[1].replace(" ", "")) == pytest.approx(size, rel=0.25), text
        assert size > 1
