"""A merge needs neither transformers nor PEFT; its result needs no qlx.

Each test runs in a process of its own in which the package in question cannot be imported.
"""

import pytest
import torch

from qlx.merging import merge
from qlx.weights import read_tensors
from tests.adapter_support import NF4, Case, make_adapter, make_base
from tests.isolation import DISTANCE, run_without

STREAM = """
from pathlib import Path
from qlx.checkpoint import open_checkpoint, resolve_source
from qlx.merging import plan_of, write_merge
adapter, base, target = open_checkpoint(Path(argv[0])), resolve_source(argv[1]), Path(argv[2])
target.mkdir()
roundings = write_merge(plan_of(adapter, base, None, None, True), target).roundings
result = [item.name for item in roundings]
"""

PLAIN_TRANSFORMERS = (
    "import transformers\n"
    + DISTANCE
    + "result = [distance(plain_model(path), path) for path in argv]\n"
)

PLAIN_PEFT = (
    "import transformers, peft\n"
    + DISTANCE
    + """
result = []
for base, path in zip(argv[::2], argv[1::2]):
    result.append(distance(peft.PeftModel.from_pretrained(plain_model(base), path), path))
"""
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """By kind: the base, an adapter trained on it quantized, the two merged, an adapter without."""
    root = tmp_path_factory.mktemp("made")
    found = {}
    for kind in ("vit", "llama"):
        base = make_base(root / f"{kind}-base", kind)
        quantized = make_adapter(base, root / f"{kind}-quantized", Case(kind, NF4))
        merged = merge(base, [quantized.path], root / f"{kind}-merged")
        plain = make_adapter(base, root / f"{kind}-plain", Case(kind))
        found[kind] = (base, quantized, merged, plain)
    return found


def test_merging_imports_neither_transformers_nor_peft(made, tmp_path):
    for kind, (base, adapter, merged, _) in made.items():
        blocked = ("transformers", "peft", "bitsandbytes")
        names = run_without(blocked, STREAM, adapter.path, base, tmp_path / kind)
        assert sorted(names) == sorted(adapter.manifest.adapter.tensors.values())
        left, right = read_tensors(tmp_path / kind), read_tensors(merged.path)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_merged_directory_loads_in_plain_transformers(made):
    paths = [merged.path for _, _, merged, _ in made.values()]
    distances = run_without(("qlx", "peft"), PLAIN_TRANSFORMERS, *paths)
    assert len(distances) == 2
    assert max(distances) < 1e-5


def test_an_adapter_loads_in_plain_peft(made):
    right = [item for base, _, _, plain in made.values() for item in (base, plain.path)]
    wrong = [item for base, quantized, _, _ in made.values() for item in (base, quantized.path)]
    distances = run_without(("qlx",), PLAIN_PEFT, *right, *wrong)
    assert max(distances[:2]) < 1e-5
    assert min(distances[2:]) > 1e-3  # these were trained on the quantized base
