"""Merging against an fp64 oracle, against PEFT's unmerged forward, and against the untouched base.

The probe of every adapter here is PEFT's own forward of the unmerged model, so a merge that
appears at all has been compared with it; the oracle is written out by hand from the files.
"""

import json
import math
import os

import numpy as np
import pytest
import torch

from qlx.adapters import merged_weight
from qlx.checkpoint import (
    QuantSpec,
    open_checkpoint,
    read_probe,
    resolve_source,
    seal,
    write_probe,
)
from qlx.errors import CheckFailed, Mismatch, Unsupported, UsageError
from qlx.merging import merge
from qlx.models import load_model, make_probe
from qlx.quant import dequantize_tensor, quantize_tensor
from qlx.verification import compare, verify
from qlx.weights import open_weights, read_tensors, write_tensors
from tests.adapter_support import FP4, NF4, NONE, Case, make_adapter, make_base

EPS = 2.0**-23
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 30.0}},
    "some": {"target_modules": ("q_proj", "v_proj")},
    "gaussian": {"init_lora_weights": "gaussian"},
}
VIT_OPTIONS = OPTIONS | {
    "bias-all": {"bias": "all"},
    "bias-lora": {"bias": "lora_only"},
    "head": {"modules_to_save": ("classifier",)},
}
LLAMA_OPTIONS = OPTIONS | {"head": {"modules_to_save": ("lm_head",)}}
CASES = [("vit", name) for name in VIT_OPTIONS] + [("llama", name) for name in LLAMA_OPTIONS]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Directories of tiny bases by (kind, dtype), made once."""
    made = {}

    def base(kind, dtype=torch.float32, **options):
        key = (kind, dtype, *sorted(options.items()))
        if key not in made:
            made[key] = make_base(tmp_path_factory.mktemp("base"), kind, dtype, **options)
        return made[key]

    return base


def oracle(base, adapter, quantized):
    """The merged weights in fp64 by their names in the files, and a bound on fp32's own error."""
    manifest = adapter.manifest
    config = json.loads((adapter.path / "adapter_config.json").read_text())
    tensors = read_tensors(adapter.path / "adapter_model.safetensors")
    stored = read_tensors(base)
    merged, bound = {}, {}
    for module, name in manifest.adapter.tensors.items():
        prefix = f"base_model.model.{module}"
        a = tensors[f"{prefix}.lora_A.weight"].double()
        b = tensors[f"{prefix}.lora_B.weight"].double()
        leaf = module.rpartition(".")[2]
        rank = config["rank_pattern"].get(leaf, config["r"])
        alpha = config["alpha_pattern"].get(leaf, config["lora_alpha"])
        scaling = alpha / math.sqrt(rank) if config["use_rslora"] else alpha / rank
        assert scaling != 1
        weight = stored[name]
        if quantized and name in manifest.quantization.tensors:
            weight = dequantize_tensor(
                quantize_tensor(weight, manifest.quantization), torch.float32
            )
        total = weight.double() + scaling * (b @ a)
        size = weight.double().abs() + scaling * (b.abs() @ a.abs())
        if config["use_dora"]:
            magnitude = tensors[f"{prefix}.lora_magnitude_vector"].double()
            factor = (magnitude / total.norm(dim=1))[:, None]
            total, size = total * factor, size * factor * 4
        merged[name], bound[name] = total, size * EPS * 8
    return merged, bound


@pytest.mark.parametrize("quant", [NONE, NF4], ids=["none", "nf4"])
@pytest.mark.parametrize(("kind", "option"), CASES)
def test_every_adapter_equals_the_oracle_and_pefts_forward(tmp_path, bases, kind, option, quant):
    base = bases(kind)
    options = (VIT_OPTIONS if kind == "vit" else LLAMA_OPTIONS)[option]
    adapter = make_adapter(base, tmp_path / "adapter", Case(kind, quant, options=options))
    merged = merge(base, [adapter.path], tmp_path / "merged")
    wanted, bound = oracle(base, adapter, quant.quantized)
    result = read_tensors(merged.path)
    for name, value in wanted.items():
        assert ((result[name].double() - value).abs() <= bound[name]).all(), name
    report = verify(merged.path)
    assert report.passed
    assert report.comparisons["reference"].relative < 1e-5
    assert report.comparisons["reference"].top1 == 1.0


OTHER_LAYERS = {
    "lora-bias": ("vit", {"target_modules": ["q_proj", "fc1"], "lora_bias": True}),
    "convolution": ("vit", {"target_modules": ["projection", "v_proj"]}),
    "convolution-dora": ("vit", {"target_modules": ["projection"], "use_dora": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "some-layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "expression": ("llama", {"target_modules": r".*layers\.0\..*(up|down)_proj"}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "qwen3": ("qwen3", {"target_modules": ["q_proj", "o_proj", "gate_proj"], "use_rslora": True}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "conv1d-dora": ("gpt2", {"target_modules": ["c_fc"], "fan_in_fan_out": True, "use_dora": True}),
    "pissa-like": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
}


@pytest.mark.parametrize("name", OTHER_LAYERS)
def test_other_layers_equal_pefts_forward(tmp_path, bases, name):
    kind, options = OTHER_LAYERS[name]
    base = bases(kind)
    adapter = make_adapter(base, tmp_path / "adapter", Case(kind, peft=options))
    merged = merge(base, [adapter.path], tmp_path / "merged")
    report = verify(merged.path)
    assert report.passed
    assert report.comparisons["reference"].relative < 1e-5
    before, after = read_tensors(base), read_tensors(merged.path)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    adapted = set(adapter.manifest.adapter.tensors.values())
    assert changed >= adapted
    assert changed - adapted <= {key.replace(".weight", ".bias") for key in adapted}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quant", [NONE, NF4, FP4], ids=["none", "nf4", "fp4"])
@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_sixteen_bit_bases_are_rounded_once(tmp_path, bases, kind, dtype, quant):
    base = bases(kind, dtype)
    adapter = make_adapter(base, tmp_path / "adapter", Case(kind, quant))
    merged = merge(base, [adapter.path], tmp_path / "merged")
    wanted, bound = oracle(base, adapter, quant.quantized)
    result = read_tensors(merged.path)
    for name, value in wanted.items():
        assert result[name].dtype == dtype
        limit = value.abs() * HALF_ULP[dtype] + bound[name] + 2.0**-25
        assert ((result[name].double() - value).abs() <= limit).all(), name
    report = verify(merged.path)
    assert report.passed
    assert 0 < report.comparisons["reference"].relative < 0.02
    assert merged.manifest.lineage[-1].options["exact"] is False


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_rounding_twice_would_be_noticed(tmp_path, bases, kind):
    """Negative control of the test above: through fp16 into bf16 breaks the bound of half an ulp."""
    base = bases(kind, torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter", Case(kind))
    wanted, bound = oracle(base, adapter, False)
    excess = [
        (value.to(torch.float8_e5m2).to(torch.bfloat16).double() - value).abs()
        > value.abs() * HALF_ULP[torch.bfloat16] + bound[name] + 2.0**-25
        for name, value in wanted.items()
    ]
    assert all(item.any() for item in excess)


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_no_other_byte_of_the_base_changes(tmp_path, bases, kind):
    base = bases(kind)
    before = {name: os.stat(base / name) for name in os.listdir(base)}
    options = {"target_modules": ("q_proj",)}
    adapter = make_adapter(base, tmp_path / "adapter", Case(kind, NF4, options=options))
    merged = merge(base, [adapter.path], tmp_path / "merged")
    weights = open_weights(base)
    old = (base / "model.safetensors").read_bytes()
    new = (merged.path / "model.safetensors").read_bytes()
    touched = set(adapter.manifest.quantization.tensors)
    assert touched >= set(adapter.manifest.adapter.tensors.values())
    assert old[: next(iter(weights.headers.values())).data_start] == new[: len(old) - sum(
        info.nbytes for info in weights.values()
    )]  # fmt: skip
    for name, info in weights.items():
        same = old[info.begin : info.end] == new[info.begin : info.end]
        assert same == (name not in touched), name
    assert {name: os.stat(base / name) for name in os.listdir(base)} == before


def test_merging_twice_gives_the_same_bytes(tmp_path, bases):
    base = bases("llama")
    adapter = make_adapter(base, tmp_path / "adapter", Case(quant=NF4))
    first = merge(base, [adapter.path], tmp_path / "first")
    second = merge(base, [adapter.path], tmp_path / "second")
    assert first.digest == second.digest


def test_shards_stay_shards(tmp_path, bases):
    base = bases("llama")
    adapter = make_adapter(base, tmp_path / "adapter", Case(quant=NF4))
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    tensors = read_tensors(base)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, chosen in parts.items():
        write_tensors(sharded / file, {name: tensors[name] for name in chosen})
    weight_map = {name: file for file, chosen in parts.items() for name in chosen}
    (sharded / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (sharded / "config.json").write_bytes((base / "config.json").read_bytes())
    one = merge(base, [adapter.path], tmp_path / "one")
    two = merge(sharded, [adapter.path], tmp_path / "two")
    assert sorted(path.name for path in open_weights(two.path).files) == sorted(parts)
    left, right = read_tensors(one.path), read_tensors(two.path)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_another_dtype_rewrites_every_float(tmp_path, bases):
    base = bases("llama")
    adapter = make_adapter(base, tmp_path / "adapter", Case(quant=NF4))
    exact = read_tensors(merge(base, [adapter.path], tmp_path / "exact").path)
    merged = merge(base, [adapter.path], tmp_path / "half", dtype="bfloat16")
    half = read_tensors(merged.path)
    assert all(torch.equal(half[name], exact[name].bfloat16()) for name in exact)
    assert json.loads((merged.path / "config.json").read_text())["dtype"] == "bfloat16"
    report = verify(merged.path)
    assert report.passed
    assert report.comparisons["own"].relative < 1e-6


@pytest.mark.parametrize("saved", [(), ("lm_head",)], ids=["base's head", "trained head"])
def test_the_head_alone_can_have_another_dtype(tmp_path, bases, saved):
    base = bases("llama")
    adapter = make_adapter(
        base, tmp_path / "adapter", Case(quant=NF4, options={"modules_to_save": saved})
    )
    exact = read_tensors(merge(base, [adapter.path], tmp_path / "exact").path)
    merged = merge(base, [adapter.path], tmp_path / "half", head_dtype="float16")
    half = read_tensors(merged.path)
    assert half["lm_head.weight"].dtype == torch.float16
    assert torch.equal(half["lm_head.weight"], exact["lm_head.weight"].half())
    assert all(torch.equal(half[name], exact[name]) for name in exact if name != "lm_head.weight")
    options = merged.manifest.lineage[-1].options
    assert (options["dtype"], options["head_dtype"], options["exact"]) == (
        "float32",
        "float16",
        False,
    )
    report = verify(merged.path)
    assert report.passed
    assert 1e-5 < report.comparisons["reference"].relative < 8 * HALF_ULP[torch.float16]


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("vit", False)])
def test_a_head_without_a_tensor_of_its_own_has_no_dtype(tmp_path, bases, kind, tied):
    base = bases(kind, tied=tied)
    adapter = make_adapter(base, tmp_path / "adapter", Case(kind))
    with pytest.raises(Unsupported, match="--head-dtype"):
        merge(base, [adapter.path], tmp_path / "merged", head_dtype="float16")
    assert not (tmp_path / "merged").exists()


def test_a_wider_dtype_makes_a_sixteen_bit_base_exact(tmp_path, bases):
    base = bases("llama", torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter", Case())
    merged = merge(base, [adapter.path], tmp_path / "merged", dtype="float32")
    assert merged.manifest.lineage[-1].options["exact"] is True
    assert verify(merged.path).comparisons["reference"].relative < 1e-5


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_onto_the_original_base_states_its_price_and_is_proven_otherwise(tmp_path, bases, kind):
    base = bases(kind)
    adapter = make_adapter(base, tmp_path / "adapter", Case(kind, NF4))
    merged = merge(base, [adapter.path], tmp_path / "merged", onto="original")
    wanted, bound = oracle(base, adapter, quantized=False)
    result = read_tensors(merged.path)
    assert all(
        ((result[name].double() - wanted[name]).abs() <= bound[name]).all() for name in wanted
    )
    report = verify(merged.path)
    assert report.passed
    assert report.comparisons["own"].relative < 1e-5  # PEFT on the unquantized base
    assert report.comparisons["reference"].relative > 1e-2  # the price
    recorded = {result.against: result.metrics for result in merged.manifest.probe.results}
    assert recorded["reference"]["relative"] > 1e-2
    assert recorded["own"]["relative"] < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_onto_the_original_base_in_sixteen_bits_is_held_to_the_unmerged_model(
    tmp_path, bases, monkeypatch, dtype
):
    base = bases("llama")
    adapter = make_adapter(base, tmp_path / "adapter", Case(quant=NF4))
    merged = merge(base, [adapter.path], tmp_path / "merged", onto="original", dtype=dtype)
    recorded = {result.against: result.metrics for result in merged.manifest.probe.results}
    price = recorded["unmerged on the original base"]
    assert 1e-5 < price["relative"] < 8 * HALF_ULP[getattr(torch, dtype)]
    assert "retention" not in price
    assert recorded["reference"]["relative"] > 1e-2
    assert verify(merged.path).passed
    monkeypatch.setattr("qlx.merging.blocks.merged_weight", WRONG_FORMULAS["sign"])
    with pytest.raises(CheckFailed, match="unmerged on the original base: relative"):
        merge(base, [adapter.path], tmp_path / "wrong", onto="original", dtype=dtype)


def test_as_trained_is_what_training_saw_and_original_is_not(tmp_path, bases):
    base = bases("llama")
    adapter = make_adapter(base, tmp_path / "adapter", Case(quant=NF4))
    merged = merge(base, [adapter.path], tmp_path / "merged")
    assert merged.manifest.lineage[-1].options["onto"] == "as-trained"
    probe = read_probe(adapter.path)
    from qlx.verification import replay

    trained = replay(merged)
    original = replay(merge(base, [adapter.path], tmp_path / "original", onto="original"))
    assert compare(probe.reference, trained, probe.mask).relative < 1e-5
    assert compare(probe.reference, original, probe.mask).relative > 1e-2


def test_a_base_loaded_in_sixteen_bits_is_merged_as_it_was_seen(tmp_path, bases):
    base = bases("llama")
    adapter = make_adapter(base, tmp_path / "adapter", Case(stored="bfloat16"))
    merged = merge(base, [adapter.path], tmp_path / "merged")
    stored, result = read_tensors(base), read_tensors(merged.path)
    adapted = set(adapter.manifest.adapter.tensors.values())
    for name in set(stored) - adapted:
        assert torch.equal(result[name], stored[name].bfloat16().float())
    assert verify(merged.path).comparisons["reference"].relative < 1e-5


def test_a_quantized_model_with_tied_embeddings_merges(tmp_path, bases):
    base = bases("qwen3", tied=True)
    adapter = make_adapter(base, tmp_path / "adapter", Case("qwen3", NF4))
    merged = merge(base, [adapter.path], tmp_path / "merged")
    assert "lm_head.weight" not in open_weights(merged.path)
    assert verify(merged.path).passed


def leaves_nothing(directory):
    return not [item for item in os.listdir(directory) if item.startswith((".qlx", "merged"))]


def test_an_untrained_adapter_is_refused(tmp_path, bases):
    base = bases("llama")
    adapter = make_adapter(base, tmp_path / "adapter", Case(size=0.0))
    with pytest.raises(CheckFailed, match="changes no tensor"):
        merge(base, [adapter.path], tmp_path / "merged")
    assert leaves_nothing(tmp_path)


def test_a_delta_below_the_precision_of_the_dtype_is_refused(tmp_path, bases):
    base = bases("llama", torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter", Case(size=0.0005))
    with pytest.raises(CheckFailed, match="would erase"):
        merge(base, [adapter.path], tmp_path / "merged")
    assert leaves_nothing(tmp_path)
    merged = merge(base, [adapter.path], tmp_path / "merged", dtype="float32")
    assert merged.manifest.lineage[-1].options["erased_share"] == 0


def test_the_erased_share_is_measured_and_its_limit_can_be_set(tmp_path, bases):
    base = bases("llama", torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter", Case(size=0.01))
    merged = merge(base, [adapter.path], tmp_path / "merged")
    share = merged.manifest.lineage[-1].options["erased_share"]
    assert 0 < share < 0.5
    with pytest.raises(CheckFailed, match="--dtype float32"):
        merge(base, [adapter.path], tmp_path / "other", max_erased=share / 2)


WRONG_FORMULAS = {
    "sign": lambda base, delta: base - (merged_weight(base, delta) - base),
    "scaling": lambda base, delta: base + 2 * (merged_weight(base, delta) - base),
    "a-little": lambda base, delta: base + 1.001 * (merged_weight(base, delta) - base),
    "reversed": lambda base, delta: base + (merged_weight(base, delta) - base).flip(0),
    "one-layer": lambda base, delta: (
        base + 1e-3 if delta.module.endswith("1.self_attn.q_proj") else merged_weight(base, delta)
    ),
}


@pytest.mark.parametrize("wrong", WRONG_FORMULAS)
def test_a_wrong_merge_finds_itself_out_before_it_appears(tmp_path, bases, monkeypatch, wrong):
    base = bases("llama")
    adapter = make_adapter(base, tmp_path / "adapter", Case(quant=NF4))
    monkeypatch.setattr("qlx.merging.blocks.merged_weight", WRONG_FORMULAS[wrong])
    with pytest.raises(CheckFailed, match=r"reference: relative.*run `qlx verify ADAPTER --base"):
        merge(base, [adapter.path], tmp_path / "merged")
    assert leaves_nothing(tmp_path)


def without(adapter, *names):
    """The same adapter with some modules' B set to zero, as if they had never been trained."""
    path = adapter.path / "adapter_model.safetensors"
    tensors = read_tensors(path)
    zeroed = {k: torch.zeros_like(t) for k, t in tensors.items() if k.endswith("B.weight")}
    chosen = {key: zero for key, zero in zeroed.items() if any(name in key for name in names)}
    assert chosen
    write_tensors(path, tensors | chosen)
    probe = read_probe(adapter.path)
    model = load_model(adapter, resolve_source(str(adapter.path.parent / "base")))
    again = make_probe(model, adapter.manifest.task, probe.inputs, None, True)
    write_probe(adapter.path / "probe.safetensors", again)
    seal(adapter.path, adapter.manifest)
    return open_checkpoint(adapter.path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quant", [NONE, NF4], ids=["none", "nf4"])
def test_a_module_without_an_update_keeps_its_bytes_and_is_named(tmp_path, dtype, quant):
    base = make_base(tmp_path / "base", "llama", dtype)
    adapter = without(make_adapter(base, tmp_path / "adapter", Case(quant=quant)), "0.mlp.up_proj")
    lines = []
    merged = merge(base, [adapter.path], tmp_path / "merged", report=lines.append)
    name = "model.layers.0.mlp.up_proj.weight"
    options = merged.manifest.lineage[-1].options
    assert options["untouched_tensors"] == [name]
    assert options["adapted_tensors"] == 13
    (line,) = [line for line in lines if "warning" in line]
    assert "1 tensor is zero" in line
    assert name in line
    stored, result = read_tensors(base)[name], read_tensors(merged.path)[name]
    seen = stored
    if quant.quantized:
        seen = dequantize_tensor(quantize_tensor(stored, quant), torch.float32).to(dtype)
    assert torch.equal(result.view(torch.uint8), seen.view(torch.uint8))
    assert verify(merged.path).passed


def test_negative_zeros_of_an_untouched_tensor_survive(tmp_path):
    base = make_base(tmp_path / "base", "llama")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = read_tensors(base)
    tensors[name][0] = -0.0
    write_tensors(base / "model.safetensors", tensors, metadata={"format": "pt"})
    adapter = without(make_adapter(base, tmp_path / "adapter", Case()), "0.mlp.up_proj")
    result = read_tensors(merge(base, [adapter.path], tmp_path / "merged").path)[name]
    assert torch.equal(result.view(torch.uint8), tensors[name].view(torch.uint8))


def test_an_empty_adapter_is_refused_whatever_is_allowed(tmp_path, bases):
    base = bases("llama", torch.bfloat16)
    empty = make_adapter(base, tmp_path / "empty", Case(size=0.0))
    with pytest.raises(CheckFailed, match=r"changes no tensor: .* never trained"):
        merge(base, [empty.path], tmp_path / "merged", max_erased=1.0)
    assert leaves_nothing(tmp_path)


def test_a_tensor_whose_update_is_rounded_away_is_refused_with_both_ways_out(tmp_path, bases):
    base = bases("llama", torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter", Case())
    path = adapter.path / "adapter_model.safetensors"
    tensors = read_tensors(path)
    name = "model.layers.0.self_attn.q_proj"
    row = read_tensors(base)[f"{name}.weight"][0].float().abs()
    a, b = (f"base_model.model.{name}.lora_{part}.weight" for part in "AB")
    zeros = {key: torch.zeros_like(tensors[key]) for key in (a, b)}
    zeros[a][0, row.argmax()], zeros[b][0, 0] = row.max() * 1e-4, 1.0  # of one large value
    write_tensors(path, tensors | zeros)
    seal(adapter.path, adapter.manifest)
    with pytest.raises(CheckFailed, match="of 1 of 14 tensors altogether") as caught:
        merge(base, [adapter.path], tmp_path / "merged")
    assert "--dtype float32" in str(caught.value)
    assert "--allow-erased 1" in str(caught.value)
    assert leaves_nothing(tmp_path)


def test_a_head_below_the_precision_of_the_dtype_is_found_too(tmp_path, bases):
    base = bases("vit", torch.bfloat16)
    options = {"modules_to_save": ("classifier",)}
    adapter = make_adapter(base, tmp_path / "adapter", Case("vit", options=options))
    path = adapter.path / "adapter_model.safetensors"
    tensors = read_tensors(path)
    stored = read_tensors(base)["classifier.weight"].float()
    name = next(key for key in tensors if key.endswith("classifier.weight"))
    write_tensors(path, tensors | {name: stored * (1 + 2.0**-11)})
    seal(adapter.path, adapter.manifest)
    with pytest.raises(CheckFailed, match=r"classifier\.weight"):
        merge(base, [adapter.path], tmp_path / "merged")


def test_the_wrong_base_is_refused(tmp_path, bases):
    adapter = make_adapter(bases("llama"), tmp_path / "adapter", Case())
    with pytest.raises(Mismatch, match="not the base"):
        merge(bases("llama", seed=5), [adapter.path], tmp_path / "merged")
    assert leaves_nothing(tmp_path)


def test_other_codes_than_recorded_are_refused(tmp_path, bases):
    from qlx.checkpoint import seal

    base = bases("llama")
    adapter = make_adapter(base, tmp_path / "adapter", Case(quant=NF4))
    spec = adapter.manifest.quantization
    for changes in ({"scheme": "fp4"}, {"double_quant": False}, {"tensors": spec.tensors[1:]}):
        other = adapter.manifest.model_copy(
            update={"quantization": spec.model_copy(update=changes)}
        )
        seal(adapter.path, other)
        with pytest.raises(Mismatch, match="other codes"):
            merge(base, [adapter.path], tmp_path / "merged")
    assert leaves_nothing(tmp_path)


def test_as_trained_needs_a_record(tmp_path, bases):
    from qlx.checkpoint import seal

    base = bases("llama")
    adapter = make_adapter(base, tmp_path / "adapter", Case())
    seal(
        adapter.path,
        adapter.manifest.model_copy(update={"lineage": (), "quantization": QuantSpec()}),
    )
    with pytest.raises(Unsupported, match="no record"):
        merge(base, [adapter.path], tmp_path / "merged", onto="as-trained")
    assert (
        merge(base, [adapter.path], tmp_path / "merged").manifest.lineage[-1].options["exact"]
        is True
    )


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_one_side_of_tied_embeddings_unties_them(tmp_path, bases, target):
    base = bases("llama", tied=True)
    options = {"target_modules": ("q_proj",), "modules_to_save": (target,)}
    adapter = make_adapter(base, tmp_path / "adapter", Case(options=options))
    merged = merge(base, [adapter.path], tmp_path / "merged")
    before, after = read_tensors(base), read_tensors(merged.path)
    assert "lm_head.weight" not in before
    sides = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}
    other = next(name for side, name in sides.items() if side != target)
    assert torch.equal(after[other], before["model.embed_tokens.weight"])
    assert not torch.equal(after[sides[target]], before["model.embed_tokens.weight"])
    assert json.loads((merged.path / "config.json").read_text())["tie_word_embeddings"] is False
    assert verify(merged.path).comparisons["reference"].relative < 1e-5


def test_no_adapter_is_an_error(tmp_path, bases):
    with pytest.raises(UsageError, match="--adapter"):
        merge(bases("llama"), [], tmp_path / "merged")


def test_an_existing_output_is_kept_unless_forced(tmp_path, bases):
    base = bases("llama")
    adapter = make_adapter(base, tmp_path / "adapter", Case())
    first = merge(base, [adapter.path], tmp_path / "merged")
    with pytest.raises(UsageError, match="exists"):
        merge(base, [adapter.path], tmp_path / "merged")
    again = merge(base, [adapter.path], tmp_path / "merged", force=True, dtype="bfloat16")
    assert open_checkpoint(tmp_path / "merged").digest == again.digest != first.digest


def test_the_probe_is_carried_unchanged(tmp_path, bases):
    base = bases("vit")
    adapter = make_adapter(base, tmp_path / "adapter", Case("vit", NF4))
    merged = merge(base, [adapter.path], tmp_path / "merged")
    assert (merged.path / "probe.safetensors").read_bytes() == (
        adapter.path / "probe.safetensors"
    ).read_bytes()
    (result,) = merged.manifest.probe.results
    assert (result.step, result.against, result.passed) == ("merge", "reference", True)
    assert np.isfinite(list(result.metrics.values())).all()
