"""Every cell of the merge matrix, made for real: see `tests.merging.matrix`."""

import json
import os

import pytest
import torch

from qlx.checkpoint import seal
from qlx.errors import CheckFailed, Mismatch
from qlx.merging import merge
from qlx.verification import verify
from qlx.weights import read_tensors
from tests.adapter_support import make_base
from tests.merging.matrix import (
    DOCUMENT,
    DTYPES,
    FEATURES,
    KINDS,
    document,
    make,
    trained,
    worst_excess,
)

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

CELLS = [
    (feature, kind, dtype) for feature in FEATURES for kind in feature.peft for dtype in DTYPES
]
# The default suite takes each feature once: on the kind that comes next in turn, in one dtype in turn.
CHOSEN = {
    (feature.name, sorted(feature.peft)[at % len(feature.peft)], sorted(DTYPES)[at % len(DTYPES)])
    for at, feature in enumerate(FEATURES)
}


def cells():
    for feature, kind, dtype in CELLS:
        chosen = (feature.name, kind, dtype) in CHOSEN
        marks = [] if chosen else [pytest.mark.exhaustive]
        yield pytest.param(feature, kind, dtype, marks=marks, id=f"{feature.name}-{kind}-{dtype}")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def base(kind, dtype, tied):
        key = (kind, dtype, tied)
        if key not in made:
            made[key] = make_base(tmp_path_factory.mktemp("base"), kind, DTYPES[dtype], tied=tied)
        return made[key]

    return base


@pytest.mark.parametrize(("feature", "kind", "dtype"), list(cells()))
def test_cell(tmp_path, bases, feature, kind, dtype):
    base = bases(kind, dtype, feature.tied)
    refused = feature.expected(kind)
    made = make(base, tmp_path, kind, feature, oracle=refused is None)
    before = sorted(os.listdir(tmp_path))
    if refused is not None:
        with pytest.raises(refused.error, match=refused.reason):
            merge(base, [made.adapter.path], tmp_path / "merged")
        assert sorted(os.listdir(tmp_path)) == before
        return
    merged = merge(base, [made.adapter.path], tmp_path / "merged")
    stored, result = read_tensors(base), read_tensors(merged.path)
    assert worst_excess(made, result) <= 1
    touched = trained(made, stored)
    assert all(torch.equal(stored[name], result[name]) for name in set(stored) - touched)
    assert all(not torch.equal(stored[n], result[n]) for n in touched & set(stored) & set(result))
    reference = verify(merged.path).comparisons["reference"]
    assert reference.relative < {"fp32": 1e-5, "bf16": 3e-2, "fp16": 4e-3}[dtype]
    if dtype == "fp32":
        assert reference.top1 == 1


@pytest.mark.parametrize("kind", KINDS)
def test_another_scaling_breaks_both_checks(tmp_path, bases, kind):
    """Negative control: the oracle and the probe must see an alpha that is a fifth too large."""
    base = bases(kind, "fp32", False)
    name = "`target_parameters`: fused experts" if kind == "mixtral" else "LoRA"
    feature = next(feature for feature in FEATURES if feature.name == name)
    made = make(base, tmp_path, kind, feature)
    path = made.adapter.path / "adapter_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"lora_alpha": fields["lora_alpha"] * 1.2}))
    seal(made.adapter.path, made.adapter.manifest)
    with pytest.raises(CheckFailed, match="differs"):
        merge(base, [made.adapter.path], tmp_path / "merged")
    assert worst_excess(made, read_tensors(base)) > 1


PLAIN = (
    ("LoRA", "vit"),
    ("transposed and plain layers together", "gpt2"),
    ("tied: embedding and head", "qwen3"),
    ("tied: trained tokens", "llama"),
    ("`target_parameters`: router and experts, with patterns", "mixtral"),
    ("`target_modules: all-linear`", "qwen3_moe"),
    ("PiSSA, converted by PEFT", "llama"),
)


@pytest.mark.parametrize(("name", "kind"), PLAIN)
def test_a_plain_directory_merges_to_the_same_tensors(tmp_path, bases, name, kind):
    """As people have them: what PEFT saved, without any record of ours."""
    feature = next(feature for feature in FEATURES if feature.name == name)
    base = bases(kind, "fp32", feature.tied)
    made = make(base, tmp_path, kind, feature, oracle=False)
    recorded = read_tensors(merge(base, [made.adapter.path], tmp_path / "recorded").path)
    plain = read_tensors(merge(base, [tmp_path / "peft"], tmp_path / "plain").path)
    assert plain.keys() == recorded.keys()
    assert all(torch.equal(plain[name], recorded[name]) for name in plain)


def test_a_plain_directory_with_another_vocabulary_says_what_to_do(tmp_path, bases):
    feature = next(feature for feature in FEATURES if feature.name == "resized vocabulary")
    base = bases("llama", "fp32", False)
    make(base, tmp_path, "llama", feature, oracle=False)
    with pytest.raises(Mismatch, match="resize the base alike"):
        merge(base, [tmp_path / "peft"], tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_the_document_is_current():
    assert DOCUMENT.read_text() == document(), "run python -m tests.merging.matrix"
