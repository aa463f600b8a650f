"""Packing: the gate, what is packed, the stored codes, and plain transformers loading the result."""

import json
import os
import re

import numpy as np
import pytest
import torch

from qlx.checkpoint import QuantSpec, open_checkpoint, read_probe
from qlx.errors import CheckFailed, InputRefused, Mismatch, Unsupported, UsageError
from qlx.merging import merge
from qlx.packing import pack
from qlx.quant import packed_fingerprint, packed_from_entries, quantize_tensor
from qlx.verification import verify
from qlx.weights import read_tensors
from tests.adapter_support import FP4, NF4, NONE, Case, make_adapter
from tests.isolation import DISTANCE, run_without
from tests.packing.conftest import KINDS


@pytest.mark.parametrize("to", ["nf4", "fp4"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_large_delta_survives_and_the_result_verifies(tmp_path, bases, merged, kind, to):
    lines = []
    packed = pack(
        merged[kind].path,
        tmp_path / "p",
        to=to,
        base=bases[kind],
        min_retention=0.8,
        report=lines.append,
    )
    report = verify(packed.path)
    assert report.passed
    assert report.comparisons["own"].relative <= 1e-4
    assert report.comparisons["reference"].retention >= 0.8
    options = packed.manifest.lineage[-1].options
    assert options["weight_retention"] > 0.9
    assert sum("weight change survives" in line for line in lines) == len(
        merged[kind].manifest.adapter.tensors
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_delta_below_a_step_fails_the_gate_and_leaves_nothing(tmp_path, bases, kind):
    adapter = make_adapter(bases[kind], tmp_path / "adapter", Case(kind, NF4, size=0.02))
    small = merge(bases[kind], [adapter.path], tmp_path / "merged")
    with pytest.raises(CheckFailed, match="retention") as caught:
        pack(small.path, tmp_path / "packed", to="nf4", base=bases[kind])
    assert "keep the adapter separate" in str(caught.value)
    assert "weight keeps least of its weight change" in str(caught.value)
    assert not [name for name in os.listdir(tmp_path) if "packed" in name]


def test_the_gate_is_recorded_and_verify_holds_to_it(tmp_path, merged):
    packed = pack(merged["vit"].path, tmp_path / "p", to="nf4", min_retention=0.5)
    (gate,) = [check for check in verify(packed.path).checks if "retention" in check.name]
    assert (gate.limit, gate.passed) == (0.5, True)
    assert not verify(packed.path, tighten={"retention": 0.9999}).passed


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_those_of_the_codec_and_the_rest_is_untouched(tmp_path, merged, kind):
    packed = pack(merged[kind].path, tmp_path / "p", to="nf4", min_retention=0)
    spec = packed.manifest.quantization
    before, after = read_tensors(merged[kind].path), read_tensors(packed.path)
    for name in spec.tensors:
        wanted, stored = quantize_tensor(before[name], spec), packed_from_entries(after, name)
        assert torch.equal(stored.codes, wanted.codes)
        assert torch.equal(stored.absmax, wanted.absmax)
    assert spec.fingerprint == packed_fingerprint(
        (name, packed_from_entries(after, name)) for name in spec.tensors
    )
    assert set(spec.tensors) == set(merged[kind].manifest.quantization.tensors)
    others = set(before) - set(spec.tensors)
    assert any("embed" in name for name in others)
    assert any(name.startswith(("classifier", "lm_head")) for name in others)
    assert all(torch.equal(after[name], before[name]) for name in others)


def test_without_a_record_every_eligible_layer_is_packed_and_no_other(tmp_path, bases):
    adapter = make_adapter(bases["vit"], tmp_path / "adapter", Case("vit", NONE))
    plain = merge(bases["vit"], [adapter.path], tmp_path / "merged")
    packed = pack(plain.path, tmp_path / "p", to="nf4", min_retention=0)
    names = packed.manifest.quantization.tensors
    assert len(names) == 12
    assert all("encoder.layer" in name for name in names)
    assert packed.manifest.quantization.skip_modules == ("classifier",)
    assert packed.manifest.quantization.double_quant is True


def test_groups_that_do_not_divide_a_row_leave_it_alone(tmp_path, merged):
    packed = pack(merged["llama"].path, tmp_path / "p", to="nf4", group_size=128, min_retention=0)
    assert packed.manifest.quantization.tensors == (
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    )
    assert verify(packed.path).passed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quant", [NONE, NF4, FP4], ids=["none", "nf4", "fp4"])
def test_an_adapter_is_merged_on_the_way(tmp_path, bases, kind, quant):
    adapter = make_adapter(bases[kind], tmp_path / "adapter", Case(kind, quant))
    whole = merge(bases[kind], [adapter.path], tmp_path / "merged")
    direct = pack(adapter.path, tmp_path / "a", to="nf4", base=bases[kind], min_retention=0)
    twice = pack(whole.path, tmp_path / "b", to="nf4", base=bases[kind], min_retention=0)
    assert direct.manifest.quantization == twice.manifest.quantization
    left, right = read_tensors(direct.path), read_tensors(twice.path)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    shares = [made.manifest.lineage[-1].options["weight_retention"] for made in (direct, twice)]
    assert shares[0] == pytest.approx(shares[1])


def test_packing_the_base_again_without_an_adapter_keeps_the_codes(tmp_path, merged):
    """The codes of a weight that lies on the grid already are found again."""
    first = pack(
        merged["llama"].path, tmp_path / "p", to="nf4", double_quant=False, min_retention=0
    )
    spec = first.manifest.quantization
    after = read_tensors(first.path)
    from qlx.quant import dequantize_tensor

    for name in spec.tensors:
        packed = packed_from_entries(after, name)
        again = quantize_tensor(dequantize_tensor(packed), spec)
        assert torch.equal(again.codes, packed.codes)


def test_a_gate_of_one_does_not_read_as_if_it_were_met(tmp_path, merged):
    """The failing value differs from its limit in the message, however close it comes."""
    with pytest.raises(CheckFailed) as caught:
        pack(merged["llama"].path, tmp_path / "p", to="nf4", min_retention=1.0)
    value = re.search(r"retention (\S+) \(limit ≥ 1\)", str(caught.value))
    assert float(value[1]) < 1


@pytest.mark.parametrize("size", [0, -64, 7, 100, 8192])
def test_sizes_that_the_scheme_does_not_take_are_refused_with_those_it_does(tmp_path, merged, size):
    with pytest.raises(UsageError, match=f"--group-size {size}: nf4 takes one of 32, 64, 128"):
        pack(merged["vit"].path, tmp_path / "p", to="nf4", group_size=size)


def test_groups_wider_than_every_layer_are_refused_with_the_widths(tmp_path, merged):
    with pytest.raises(Unsupported, match=r"\(64, 128\); choose a smaller --group-size"):
        pack(merged["llama"].path, tmp_path / "p", to="nf4", group_size=4096)


def test_refusals(tmp_path, bases, merged):
    with pytest.raises(UsageError, match="nf4, fp4"):
        pack(merged["vit"].path, tmp_path / "p", to="int3")
    with pytest.raises(UsageError, match="from 0 to 1"):
        pack(merged["vit"].path, tmp_path / "p", to="nf4", min_retention=1.5)
    with pytest.raises(Mismatch, match="not the base"):
        pack(merged["vit"].path, tmp_path / "p", to="nf4", base=bases["llama"])
    packed = pack(merged["vit"].path, tmp_path / "p", to="nf4", min_retention=0)
    with pytest.raises(InputRefused, match="'packed' cannot be packed"):
        pack(packed.path, tmp_path / "q", to="nf4")
    assert sorted(os.listdir(tmp_path)) == ["p"]


PLAIN_BITSANDBYTES = (
    "import transformers, bitsandbytes\n"
    + DISTANCE
    + """
result = {}
for path in argv:
    model = plain_model(path)
    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    for layer in layers:  # its AVX512-BF16 kernel rounds to bfloat16 and repacks weights in place
        layer.support_avx512bf16_for_cpu = False
    result[path] = [len(layers), distance(model, path, "own")]
"""
)


def test_plain_transformers_with_bitsandbytes_gives_our_outputs(tmp_path, merged):
    made = [
        pack(
            merged[kind].path,
            tmp_path / f"{kind}-{to}-{double_quant}",
            to=to,
            double_quant=double_quant,
            min_retention=0,
        )
        for kind in KINDS
        for to in ("nf4", "fp4")
        for double_quant in (True, False)
    ]
    found = run_without(("qlx", "peft"), PLAIN_BITSANDBYTES, *(packed.path for packed in made))
    assert len(found) == 8
    for packed in made:
        layers, relative = found[str(packed.path)]
        assert layers == len(packed.manifest.quantization.tensors)
        assert relative < 1e-4, packed.path


def test_sizes_are_those_of_four_bits(tmp_path, merged):
    packed = pack(merged["llama"].path, tmp_path / "p", to="nf4", min_retention=0)
    spec, after = packed.manifest.quantization, read_tensors(packed.path)
    stored = [packed_from_entries(after, name) for name in spec.tensors]
    weights, size = sum(item.count for item in stored), sum(item.nbytes for item in stored)
    assert 4.1 < 8 * size / weights < 4.25
    config = json.loads((packed.path / "config.json").read_text())["quantization_config"]
    assert (config["bnb_4bit_quant_type"], config["load_in_4bit"]) == ("nf4", True)


def test_own_outputs_are_stored_for_a_tight_replay(tmp_path, merged):
    packed = pack(merged["llama"].path, tmp_path / "p", to="nf4", min_retention=0)
    probe = read_probe(packed.path)
    assert probe.own is not None
    assert not np.allclose(probe.own, probe.reference, atol=1e-3)
    assert np.array_equal(probe.reference, read_probe(merged["llama"].path).reference)
    assert isinstance(open_checkpoint(packed.path).manifest.quantization, QuantSpec)
