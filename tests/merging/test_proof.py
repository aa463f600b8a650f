"""A merge is proven by a replay, by layers where memory is short, by sampled rows at the very least."""

import sys
from dataclasses import replace

import pytest
import torch

from qlx.checkpoint import resolve_source
from qlx.errors import CheckFailed, NoRoom
from qlx.merging import blocks, budget, merge, plan_of, proof, write_merge
from qlx.merging.budget import estimate, threads_within
from qlx.merging.sampled import check_sample
from qlx.verification import verify
from qlx.weights import open_weights, read_tensors, write_tensors
from tests.adapter_support import NF4, Case, make_adapter, make_base

MERGE = sys.modules["qlx.merging.merge"]  # the package has a function of that name

CASES = {
    "plain": ("llama", {}),
    "dora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "conv1d-dora": ("gpt2", {"target_modules": ["c_fc"], "fan_in_fan_out": True, "use_dora": True}),
    "convolution": ("vit", {"target_modules": ["projection", "v_proj"]}),
    "bias": ("vit", {"target_modules": ["q_proj", "fc1"], "lora_bias": True}),
    "experts": ("qwen3_moe", {"target_modules": ["q_proj"]}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base in bf16 and an adapter trained on it in NF4."""
    root = tmp_path_factory.mktemp("made")
    base = make_base(root / "base", "llama", torch.bfloat16)
    return base, make_adapter(base, root / "adapter", Case(quant=NF4))


def only(*hows):
    return lambda plan, max_ram: list(hows)


def options(merged):
    return merged.manifest.lineage[-1].options


def test_a_replay_by_layers_gives_the_same_merge_and_the_same_verdict(tmp_path, made, monkeypatch):
    base, adapter = made
    loaded = merge(base, [adapter.path], tmp_path / "loaded", dtype="float32")
    monkeypatch.setattr(MERGE, "proofs_within", only("replay by layers"))
    layers = merge(base, [adapter.path], tmp_path / "layers", dtype="float32")
    assert options(loaded)["proof"] == "replay"
    assert options(layers)["proof"] == "replay by layers"
    left, right = (m.manifest.probe.results[-1].metrics for m in (loaded, layers))
    assert right["relative"] == pytest.approx(left["relative"], abs=1e-6)
    assert max(left["relative"], right["relative"]) < 1e-5
    weights = [(m.path / "model.safetensors").read_bytes() for m in (loaded, layers)]
    assert weights[0] == weights[1]
    assert verify(layers.path).passed


@pytest.mark.parametrize("how", ["replay", "replay by layers", "sampled rows"])
def test_every_proof_finds_a_wrong_merge(tmp_path, made, monkeypatch, how):
    base, adapter = made
    right = blocks.merged_weight
    monkeypatch.setattr(MERGE, "proofs_within", only(how))
    monkeypatch.setattr(blocks, "merged_weight", lambda w, d: w - (right(w, d) - w))
    with pytest.raises(CheckFailed, match=r"differs from|row \d+ of"):
        merge(base, [adapter.path], tmp_path / "merged", dtype="float32")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_sampled_rows_say_so_and_can_be_verified_later(tmp_path, made, monkeypatch, dtype):
    base, adapter = made
    monkeypatch.setattr(MERGE, "proofs_within", only("sampled rows"))
    merged = merge(base, [adapter.path], tmp_path / "merged", dtype=dtype)
    assert options(merged)["proof"] == "sampled rows"
    assert options(merged)["checked_rows"] > len(open_weights(merged.path))
    assert merged.manifest.probe.results == ()
    assert verify(merged.path).passed


@pytest.mark.parametrize(
    ("name", "quant"),
    [(name, False) for name in CASES] + [(n, True) for n in CASES if not n.startswith("conv1d")],
)
def test_the_sample_passes_what_is_right_and_names_what_is_not(tmp_path, name, quant):
    kind, peft = CASES[name]
    base = make_base(tmp_path / "base", kind, torch.bfloat16)
    case = Case(kind, NF4, peft=peft) if quant else Case(kind, peft=peft)
    adapter = make_adapter(base, tmp_path / "adapter", case)
    plan = plan_of(adapter, resolve_source(str(base)), None, None, True)
    (tmp_path / "merged").mkdir()
    write_merge(plan, tmp_path / "merged")
    assert check_sample(plan, open_weights(tmp_path / "merged")) > 0
    file = tmp_path / "merged" / "model.safetensors"
    right = read_tensors(file)
    changed = sorted(plan.changes)
    for victim in (changed[0], changed[-1], next(n for n in right if n not in plan.changes)):
        wrong = right[victim].clone()
        first = wrong.view(wrong.shape[0], -1)[0]
        first[-1] += first[-1].abs() * 2**-5 + 2**-8
        write_tensors(file, {**right, victim: wrong})
        with pytest.raises(CheckFailed, match=f"row 0 of '{victim}'"):
            check_sample(plan, open_weights(tmp_path / "merged"))


@pytest.mark.parametrize("how", ["replay", "replay by layers"])
@pytest.mark.parametrize("fits", [True, False])
def test_a_coarse_dtype_is_judged_by_the_unmerged_model_wherever_that_fits(
    tmp_path, made, monkeypatch, how, fits
):
    """The general limit is put out of reach, so that only the measured noise floor can save it."""
    base, adapter = made
    rest = ["replay"] if fits else []
    monkeypatch.setattr(MERGE, "proofs_within", only(how, *rest))
    monkeypatch.setattr("qlx.verification.thresholds.ROUNDING_GROWTH", 0.0)
    if fits or how == "replay":
        merged = merge(base, [adapter.path], tmp_path / "merged")
        assert options(merged)["proof"] == how
        assert verify(merged.path).noise_floor is not None
    else:
        with pytest.raises(CheckFailed, match="merge with --dtype float32"):
            merge(base, [adapter.path], tmp_path / "merged")


def test_a_model_that_cannot_be_run_by_layers_is_proven_another_way(tmp_path, monkeypatch):
    base = make_base(tmp_path / "base", "qwen3_moe")
    adapter = make_adapter(base, tmp_path / "adapter", Case("qwen3_moe"))
    monkeypatch.setattr(MERGE, "proofs_within", only("replay by layers", "sampled rows"))
    assert options(merge(base, [adapter.path], tmp_path / "merged"))["proof"] == "sampled rows"


def test_the_proof_follows_the_memory(made, monkeypatch):
    plan = plan_of(made[1], resolve_source(str(made[0])), None, None, True)
    held = budget.memory_held()
    monkeypatch.setattr(proof, "memory_held", lambda: held)
    needs = {how: proof.proof_bytes(plan, how) for how in ("replay", "replay by layers")}
    enough = held + max(needs.values())
    assert proof.proofs_within(plan, None) == ["replay", "replay by layers", "sampled rows"]
    assert proof.proofs_within(plan, enough)[0] == "replay"
    assert proof.proofs_within(plan, held + min(needs.values()) - 1) == ["sampled rows"]
    monkeypatch.setattr(proof, "_LOADED", 0)
    assert proof.proofs_within(plan, enough)[0] == "replay by layers"


def test_threads_follow_the_memory_and_below_the_floor_the_number_is_named(made, monkeypatch):
    plan = plan_of(made[1], resolve_source(str(made[0])), None, None, True)
    monkeypatch.setattr(budget, "memory_held", lambda: 300 * 2**20)
    figures = estimate(plan)
    assert figures.threads == budget.cores()
    assert threads_within(plan, figures.floor) == 1
    with pytest.raises(NoRoom, match=f"this merge needs {figures.floor} ") as refused:
        threads_within(plan, figures.floor - 1)
    assert refused.value.exit_code == 5


def test_the_estimate_counts_the_bytes(made):
    base, adapter = made
    plan = plan_of(adapter, resolve_source(str(base)), None, None, True)
    figures, infos = estimate(plan), open_weights(base)
    assert figures.read == sum(info.nbytes for info in infos.values())
    assert figures.copied + figures.rewritten == figures.read
    assert figures.rewritten == sum(infos[name].nbytes for name in plan.changes)
    assert (figures.tensors, figures.touched) == (len(infos), len(plan.changes))
    assert figures.seconds > 0
    wider = estimate(replace(plan, cast="F32"))
    assert wider.copied == 0
