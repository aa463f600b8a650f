"""Other kinds of PEFT adapters: merged by PEFT, proven by us; each kind made, saved and merged."""

import json
import os

import pytest
import torch

from qlx.checkpoint import read_probe
from qlx.errors import (
    CheckFailed,
    CorruptCheckpoint,
    InputRefused,
    Mismatch,
    UnsafeInput,
    Unsupported,
    UsageError,
)
from qlx.exporting import export_onnx
from qlx.merging import Combination, merge, outline, through_peft
from qlx.merging.through_peft import KINDS, NOT_MERGEABLE
from qlx.models import load_base
from qlx.training import save_adapter
from qlx.verification import compare, evaluate, verify
from qlx.weights import read_tensors, write_tensors
from tests.adapter_support import make_base

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

# Fields of each kind's configuration, beside the targets, that a model of width 64 needs.
OPTIONS = {
    "ADALORA": {"total_step": 10},
    "BEFT": {"target_modules": ["q_proj", "fc1"]},
    "BOFT": {"boft_block_size": 8},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 50},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["norm"]},
    "OFT": {"oft_block_size": 16, "r": 0},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [1, 90]},
    "VBLORA": {"num_vectors": 32, "vector_length": 16, "r": 2, "topk": 2},
}
ON_VIT = ("BEFT",)
FAMOUS = ("LOHA", "LOKR", "VERA", "IA3", "OFT", "ADALORA", "TRAINABLE_TOKENS", "BEFT")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def base(kind, dtype=torch.float32, **options):
        key = (kind, dtype, *options)
        if key not in made:
            made[key] = make_base(tmp_path_factory.mktemp("base"), kind, dtype, **options)
        return made[key]

    return base


def make(base, directory, kind, task="causal-lm", size=0.05, **more):
    """A PEFT directory of some kind, its parameters moved as training would."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    fields = {"target_modules": ["q_proj", "o_proj"]} | OPTIONS.get(kind, {}) | more
    torch.manual_seed(0)
    model = load_base(base, task)
    adapted = peft.get_peft_model(model, PEFT_TYPE_TO_CONFIG_MAPPING[kind](**fields))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * size)
    adapted.save_pretrained(directory)
    return directory


def kinds():
    for kind in KINDS:
        marks = [] if kind in FAMOUS else [pytest.mark.exhaustive]
        yield pytest.param(kind, marks=marks)


@pytest.mark.parametrize("kind", list(kinds()))
def test_each_kind_merges_exactly(tmp_path, bases, kind):
    model, task = ("vit", "image-classification") if kind in ON_VIT else ("llama", "causal-lm")
    base = bases(model)
    directory = make(base, tmp_path / "adapter", kind, task)
    merged = merge(base, [directory], tmp_path / "merged")
    report = verify(merged.path)
    assert report.passed
    assert report.comparisons["reference"].relative < 1e-5
    probe = read_probe(merged.path / "probe.safetensors")
    assert compare(probe.base, probe.reference, probe.mask).relative > 1e-3
    step = merged.manifest.lineage[-1]
    assert (step.options["through"], step.options["peft_type"]) == ("peft", kind)
    before, after = read_tensors(base), read_tensors(merged.path)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == step.options["adapted_tensors"] > 0
    targets = (OPTIONS.get(kind, {}).get("target_modules") or ["q_proj", "o_proj"]) + ["query"]
    assert all(any(part in name for part in (*targets, "intermediate.dense")) for name in changed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sixteen_bit_base_keeps_its_dtype_and_its_other_bytes(tmp_path, bases, dtype):
    base = bases("llama", dtype)
    directory = make(base, tmp_path / "adapter", "LOHA", size=0.3)
    merged = merge(base, [directory], tmp_path / "merged")
    before, after = read_tensors(base), read_tensors(merged.path)
    exact = read_tensors(merge(base, [directory], tmp_path / "exact", dtype="float32").path)
    for name, value in before.items():
        assert after[name].dtype == dtype
        touched = name.endswith(("q_proj.weight", "o_proj.weight"))
        assert torch.equal(after[name], value) is not touched
        assert torch.equal(after[name], exact[name].to(dtype))  # rounded once
    assert verify(merged.path).passed


def test_in_the_end_a_coarse_dtype_is_judged_by_what_it_does_to_the_unmerged_model(
    tmp_path, bases, monkeypatch
):
    base = bases("llama", torch.bfloat16)
    directory = make(base, tmp_path / "adapter", "LOHA", size=0.3)
    monkeypatch.setattr("qlx.verification.thresholds.ROUNDING_GROWTH", 0.0)
    merged = merge(base, [directory], tmp_path / "merged")
    assert read_probe(merged.path).native is not None
    report = verify(merged.path)
    assert report.passed
    assert 0 < report.comparisons["reference"].relative <= 2 * report.noise_floor
    changed = through_peft._changed
    monkeypatch.setattr(through_peft, "_changed", lambda *p: dict(list(changed(*p).items())[1:]))
    with pytest.raises(CheckFailed, match="differs"):  # negative control
        merge(base, [directory], tmp_path / "wrong")


@pytest.mark.parametrize("kind", NOT_MERGEABLE)
def test_what_is_no_weight_is_refused_with_its_reason(tmp_path, bases, kind):
    directory = tmp_path / "adapter"
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    with pytest.raises(Unsupported, match=NOT_MERGEABLE[kind][:30]):
        merge(bases("llama"), [directory], tmp_path / "merged")
    assert os.listdir(tmp_path) == ["adapter"]


def test_every_kind_that_peft_has_is_decided():
    from peft import PeftType

    known = {*KINDS, *NOT_MERGEABLE, "LORA"}
    assert {kind.value for kind in PeftType} - known == set()


def test_unknown_kinds_pickles_and_missing_files_are_refused(tmp_path, bases):
    directory = tmp_path / "adapter"
    directory.mkdir()
    config = directory / "adapter_config.json"
    for kind, file, error in (
        ("NEWEST", None, Unsupported),
        ("LOHA", None, CorruptCheckpoint),
        ("LOHA", "adapter_model.bin", UnsafeInput),
    ):
        config.write_text(json.dumps({"peft_type": kind}))
        if file:
            (directory / file).write_bytes(b"x")
        with pytest.raises(error):
            merge(bases("llama"), [directory], tmp_path / "merged")


def test_a_tensor_without_a_place_is_refused(tmp_path, bases):
    base = bases("llama")
    directory = make(base, tmp_path / "adapter", "LOHA")
    path = directory / "adapter_model.safetensors"
    tensors = read_tensors(path)
    name = next(iter(tensors))
    write_tensors(path, {**tensors, name.replace("layers.0", "layers.7"): tensors[name]})
    with pytest.raises(Mismatch, match=r"layers\.7.*has no place"):
        merge(base, [directory], tmp_path / "merged")
    write_tensors(path, {key: value for key, value in tensors.items() if key != name})
    with pytest.raises(Mismatch, match="is missing for"):
        merge(base, [directory], tmp_path / "merged")


def test_an_untrained_adapter_is_an_error(tmp_path, bases):
    base = bases("llama")
    directory = make(base, tmp_path / "adapter", "LOHA", size=0.0, init_weights=True)
    with pytest.raises(CheckFailed, match="changes no tensor"):
        merge(base, [directory], tmp_path / "merged")
    assert os.listdir(tmp_path) == ["adapter"]


def test_a_tied_embedding_is_refused(tmp_path, bases):
    base = bases("llama", tied=True)
    directory = make(base, tmp_path / "adapter", "TRAINABLE_TOKENS")
    with pytest.raises(Unsupported, match="tied"):
        merge(base, [directory], tmp_path / "merged")


def test_other_kinds_are_merged_alone_and_onto_the_base_as_it_is(tmp_path, bases):
    base = bases("llama")
    directory = make(base, tmp_path / "adapter", "IA3")
    with pytest.raises(Unsupported, match=r"adapter: only LoRA adapters can be combined.*IA3"):
        merge(base, [directory, directory], tmp_path / "merged")
    with pytest.raises(Unsupported, match="without --weight"):
        merge(base, [directory], tmp_path / "merged", combination=Combination(weights=(0.5,)))
    with pytest.raises(UsageError, match="--max-ram"):
        merge(base, [directory], tmp_path / "merged", max_ram=10**9)
    with pytest.raises(UsageError, match="--dry-run"):
        outline(base, [directory])
    with pytest.raises(Unsupported, match="no record"):
        merge(base, [directory], tmp_path / "merged", onto="as-trained")


@pytest.mark.parametrize(
    "call", [export_onnx, lambda path, out: verify(path), lambda path, out: evaluate(path)]
)
def test_other_commands_name_the_kind_and_what_takes_it(tmp_path, bases, call):
    directory = make(bases("llama"), tmp_path / "adapter", "IA3")
    with pytest.raises(InputRefused, match=r"of type IA3.*`qlx merge`"):
        call(directory, tmp_path / "out")
    with pytest.raises(Unsupported, match=r"of type IA3.*`qlx merge`"):
        save_adapter(directory, tmp_path / "out", base=str(bases("llama")))


def test_a_module_without_an_update_is_named(tmp_path, bases):
    base = bases("llama")
    directory = make(base, tmp_path / "adapter", "LOHA")
    path = directory / "adapter_model.safetensors"
    still = {k: torch.zeros_like(v) if "0.self_attn.q_proj" in k else v
             for k, v in read_tensors(path).items()}  # fmt: skip
    write_tensors(path, still)
    lines = []
    merged = merge(base, [directory], tmp_path / "merged", report=lines.append)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert merged.manifest.lineage[-1].options["untouched_tensors"] == [name]
    assert any("1 tensor is zero" in line and name in line for line in lines)


def test_a_wrong_merge_would_be_noticed(tmp_path, bases, monkeypatch):
    """Negative control: a merge that loses one layer differs from the unmerged model."""
    base = bases("llama")
    directory = make(base, tmp_path / "adapter", "LOHA")
    changed = through_peft._changed

    def forgetful(*parts):
        found = changed(*parts)
        return dict(list(found.items())[1:])

    monkeypatch.setattr(through_peft, "_changed", forgetful)
    with pytest.raises(CheckFailed, match="differs"):
        merge(base, [directory], tmp_path / "merged")
