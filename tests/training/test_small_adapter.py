"""`save-adapter --dtype int8`: PEFT loads it, every later step stands on it, a bad one is refused."""

import json

import pytest
import torch

from qlx.adapters import compact, read_adapter
from qlx.checkpoint import open_checkpoint, read_probe
from qlx.errors import CheckFailed, Unsupported, UsageError
from qlx.merging import merge
from qlx.training import save_adapter
from qlx.verification import compare, verify
from qlx.weights import read_tensors, write_tensors
from tests.adapter_support import NF4, Case, make_adapter, make_base
from tests.isolation import run_without

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def small(tmp_path_factory, python_run, python_base):
    target = tmp_path_factory.mktemp("small") / "adapter"
    return save_adapter(python_run, target, base=str(python_base), dtype="int8")


def test_outputs_stay_and_the_factors_are_a_quarter(small, python_run):
    before, after = read_probe(python_run), read_probe(small.path)
    far = compare(before.reference, after.reference, before.mask)
    assert far.kl_mean <= 1e-4
    assert far.top1 >= 0.995
    assert far.kl_mean > 0
    recorded = small.manifest.probe.results[-1]
    assert recorded.metrics["kl_mean"] == far.kl_mean
    sizes = [(path / WEIGHTS).stat().st_size for path in (small.path, python_run)]
    assert sizes[0] < 0.35 * sizes[1]  # with the names of tensors
    stored = read_tensors(small.path / WEIGHTS).values()
    assert {tensor.dtype for tensor in stored} == {torch.int8}


def test_it_verifies_merges_and_saves_again(tmp_path, small, python_base):
    assert verify(small.path, base=python_base).passed
    merged = merge(python_base, [small.path], tmp_path / "merged")
    assert verify(merged.path).comparisons["reference"].relative < 1e-5
    again = save_adapter(small.path, tmp_path / "again")
    assert (again.path / WEIGHTS).read_bytes() == (small.path / WEIGHTS).read_bytes()
    assert verify(again.path, base=python_base).passed


PEFT = """
import peft, torch, transformers
from safetensors.torch import load_file
base, adapter = argv
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model = peft.PeftModel.from_pretrained(model, adapter)
layer = model.base_model.model.model.layers[1].mlp.up_proj
result = [layer.get_delta_weight("default").double().norm().item(), str(layer.lora_A["default"].weight.dtype)]
"""


def test_plain_peft_makes_the_same_update_of_it(small, python_base, python_run):
    found, dtype = run_without(("qlx", "bitsandbytes"), PEFT, python_base, small.path)
    delta, trained = (
        next(
            d for name, d in read_adapter(p).deltas.items() if name.endswith("layers.1.mlp.up_proj")
        )
        for p in (small.path, python_run)
    )
    ours, wanted = (d.scaling * (d.b.double() @ d.a.double()) for d in (delta, trained))
    assert dtype == "torch.float32"
    assert found == pytest.approx(float(ours.norm()), rel=1e-6)
    assert float((ours - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"alpha_pattern": {"q_proj": 3.0}, "rank_pattern": {"up_proj": 2}},
        {"modules_to_save": ("lm_head",)},
    ],
)
def test_every_kind_of_lora_keeps_its_outputs(tmp_path, options):
    base = make_base(tmp_path / "base", "llama")
    adapter = make_adapter(
        base, tmp_path / "adapter", Case("llama", NF4, size=0.3, options=options)
    )
    made = save_adapter(adapter.path, tmp_path / "small", base=str(base), dtype="int8")
    assert verify(made.path, base=base).passed
    assert made.manifest.adapter.alpha_pattern
    assert merge(base, [made.path], tmp_path / "merged")


def test_factors_that_8_bits_cannot_hold_are_refused(
    tmp_path, python_run, python_base, monkeypatch
):
    """Fewer levels, as a stand-in for factors with a few huge values."""
    monkeypatch.setattr(compact, "_LARGEST", 3)
    with pytest.raises(CheckFailed, match=r"in int8 the outputs are .* \(limit 0.0001\)"):
        save_adapter(python_run, tmp_path / "a", base=str(python_base), dtype="int8")
    assert not list(tmp_path.iterdir())


def test_refusals(tmp_path, small, python_base):
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in ("adapter_config.json", WEIGHTS):
        (plain / name).write_bytes((small.path / name).read_bytes())
    with pytest.raises(UsageError, match="without --dtype first"):
        save_adapter(plain, tmp_path / "a", base=str(python_base), dtype="int8")
    imported = save_adapter(plain, tmp_path / "imported", base=str(python_base))
    assert open_checkpoint(imported.path).manifest.adapter.alpha_pattern
    tensors = read_tensors(plain / WEIGHTS)
    key = next(name for name in tensors if name.endswith("lora_A.weight"))
    write_tensors(plain / WEIGHTS, {**tensors, key: tensors[key].to(torch.int16)})
    with pytest.raises(Unsupported, match=r"dtype torch\.int16"):
        read_adapter(plain)
    assert json.loads((plain / "adapter_config.json").read_text())["alpha_pattern"]
