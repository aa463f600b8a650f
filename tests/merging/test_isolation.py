"""A merge needs neither transformers nor PEFT; its result needs no qlx.

Each test runs in a process of its own in which the package in question cannot be imported.
"""

import pytest
import torch

from qlx.merging import merge
from qlx.weights import read_tensors
from tests.adapter_support import NF4, Case, make_adapter, make_base
from tests.isolation import run_without

STREAM = """
from pathlib import Path
from qlx.checkpoint import open_checkpoint, resolve_source
from qlx.merging import plan_of, write_merged
adapter, base, target = open_checkpoint(Path(argv[0])), resolve_source(argv[1]), Path(argv[2])
target.mkdir()
roundings = write_merged(plan_of(adapter, base, None, None, True), target)
result = [item.name for item in roundings]
"""

RELATIVE = """
import numpy, torch
from safetensors.numpy import load_file
probe = load_file(argv[0] + "/probe.safetensors")
inputs = {name[6:]: torch.from_numpy(value) for name, value in probe.items() if name.startswith("input.")}
def distance(model):
    with torch.inference_mode():
        given = model.eval()(**inputs).logits.float().numpy()
    wanted = probe["output.reference"]
    if "attention_mask" in inputs:
        rows = inputs["attention_mask"].numpy().astype(bool)
        given, wanted = given[rows], wanted[rows]
    return float(numpy.linalg.norm(given - wanted) / numpy.linalg.norm(wanted))
"""

PLAIN_TRANSFORMERS = (
    "import transformers\n"
    + RELATIVE
    + """
auto = {"vit": "AutoModelForImageClassification", "llama": "AutoModelForCausalLM"}[argv[1]]
result = distance(getattr(transformers, auto).from_pretrained(argv[0]))
"""
)

PLAIN_PEFT = (
    "import transformers, peft\n"
    + RELATIVE
    + """
auto = {"vit": "AutoModelForImageClassification", "llama": "AutoModelForCausalLM"}[argv[1]]
base = getattr(transformers, auto).from_pretrained(argv[2])
result = distance(peft.PeftModel.from_pretrained(base, argv[0]))
"""
)


@pytest.fixture(scope="module", params=["vit", "llama"])
def trained(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    base = make_base(root / "base", request.param)
    quantized = make_adapter(base, root / "quantized", Case(request.param, NF4))
    merged = merge(base, [quantized.path], root / "merged")
    return request.param, base, quantized, merged


def test_merging_imports_neither_transformers_nor_peft(trained, tmp_path):
    _, base, adapter, merged = trained
    blocked = ("transformers", "peft", "bitsandbytes")
    names = run_without(blocked, STREAM, adapter.path, base, tmp_path / "out")
    assert sorted(names) == sorted(adapter.manifest.adapter.tensors.values())
    left, right = read_tensors(tmp_path / "out"), read_tensors(merged.path)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_merged_directory_loads_in_plain_transformers(trained):
    kind, _, _, merged = trained
    assert run_without(("qlx", "peft"), PLAIN_TRANSFORMERS, merged.path, kind) < 1e-5


def test_an_adapter_loads_in_plain_peft(trained, tmp_path):
    kind, base, quantized, _ = trained
    adapter = make_adapter(base, tmp_path / "adapter", Case(kind))
    assert run_without(("qlx",), PLAIN_PEFT, adapter.path, kind, base) < 1e-5
    on_the_wrong_values = run_without(("qlx",), PLAIN_PEFT, quantized.path, kind, base)
    assert on_the_wrong_values > 1e-3  # it was trained on the quantized base
