"""Bases that come as GPTQ, AWQ or BitNet codes: loaded, trained on, merged as training saw them."""

import json

import pytest
import torch

from qlx.adapters import delta_weight, read_adapter
from qlx.checkpoint import QuantSpec, open_checkpoint, resolve_source
from qlx.errors import CorruptCheckpoint, Mismatch, Unsupported
from qlx.merging import merge
from qlx.merging.coded import CodedWeights, open_base
from qlx.models import load_base, load_model, stored_codes
from qlx.quant import (
    IntegerLinear,
    bitnet_entries,
    eligible_modules,
    packed_modules,
    quantize_tensor,
)
from qlx.verification import verify
from qlx.weights import read_tensors, write_tensors
from tests.adapter_support import NF4, Case, make_adapter
from tests.coded_support import SECTIONS, coded_base

KINDS = tuple(SECTIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_coded_base_runs_with_the_values_its_codes_stand_for(kind, tmp_path):
    base, values = coded_base(tmp_path / "base", kind)
    model = load_base(base, "causal-lm")
    layers = dict(packed_modules(model))
    assert {f"{name}.weight" for name in layers} == set(values)
    for name, layer in layers.items():
        assert isinstance(layer, IntegerLinear)
        assert torch.equal(layer.dequantize(), values[f"{name}.weight"])
    plain = tmp_path / "plain"
    plain.mkdir()
    rest = {
        n: t for n, t in read_tensors(base).items() if n in model.state_dict() and n not in values
    }
    write_tensors(plain / "model.safetensors", rest | values, metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    del config["quantization_config"]
    (plain / "config.json").write_text(json.dumps(config))
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        ours = model(input_ids=ids).logits
        oracle = load_base(plain, "causal-lm")(input_ids=ids).logits
    assert torch.equal(ours, oracle)
    other = coded_base(tmp_path / "other", kind, seed=3)[0]
    with torch.no_grad():
        assert not torch.allclose(load_base(other, "causal-lm")(input_ids=ids).logits, oracle)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_on_a_coded_base_merges_as_it_was_trained(kind, tmp_path):
    base, values = coded_base(tmp_path / "base", kind)
    spec = stored_codes(base).spec()
    adapter = make_adapter(base, tmp_path / "adapter", Case(quant=spec))
    assert set(adapter.manifest.quantization.tensors) == set(values)
    merged = merge(str(base), [adapter.path], tmp_path / "merged", dtype="float32")
    result, weights = read_tensors(merged.path), read_adapter(adapter.path)
    assert not any("qweight" in name or "scale" in name for name in result)
    assert "quantization_config" not in json.loads((merged.path / "config.json").read_text())
    for module, tensor in adapter.manifest.adapter.tensors.items():
        oracle = values[tensor].double() + delta_weight(weights.deltas[module]).double()
        assert (result[tensor].double() - oracle).abs().max() <= 1e-6
        assert (result[tensor] - values[tensor]).abs().max() > 1e-3  # negative control
    assert verify(merged.path).passed


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
def test_a_bitnet_model_computes_here_what_it_does_in_transformers(linear_class, tmp_path):
    """With inputs rounded as there, its logits; without, another model by about that rounding."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BitNetConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    spec = QuantSpec(scheme="ternary", weight_bits=2, activation_bits=8)
    for name in eligible_modules(model):
        packed = quantize_tensor(state[f"{name}.weight"], spec)
        state |= bitnet_entries(packed, f"{name}.weight", linear_class)
    section = {
        "quant_method": "bitnet",
        "linear_class": linear_class,
        "quantization_mode": "offline",
    }
    config.quantization_config, config.architectures = section, ["BitNetForCausalLM"]
    config.save_pretrained(tmp_path)
    write_tensors(tmp_path / "model.safetensors", state, metadata={"format": "pt"})
    ids = torch.arange(1, 9)[None]
    stored = stored_codes(tmp_path)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        expected = theirs.eval()(input_ids=ids).logits
        same = load_base(tmp_path, "causal-lm", quant=stored.spec(activation_bits=8))
        found = same(input_ids=ids).logits
        plain = load_base(tmp_path, "causal-lm", quant=stored.spec())(input_ids=ids).logits
    assert (found - expected).norm() / expected.norm() < 1e-5
    assert (plain - expected).norm() / expected.norm() > 1e-3  # negative control


@pytest.mark.parametrize("kind", ["gptq", "awq", "bitnet"])
def test_a_plain_peft_directory_merges_onto_the_values_of_the_codes(kind, tmp_path):
    base, values = coded_base(tmp_path / "base", kind)
    adapter = make_adapter(base, tmp_path / "adapter", Case(quant=stored_codes(base).spec()))
    for name in ("qlx.json", "probe.safetensors"):
        (adapter.path / name).unlink()
    merged = merge(str(base), [adapter.path], tmp_path / "merged", dtype="float32")
    result, weights = read_tensors(merged.path), read_adapter(adapter.path)
    for module, tensor in adapter.manifest.adapter.tensors.items():
        oracle = values[tensor].double() + delta_weight(weights.deltas[module]).double()
        assert (result[tensor].double() - oracle).abs().max() <= 1e-6
    assert verify(merged.path).passed


def test_codes_that_changed_are_refused(tmp_path):
    base, _ = coded_base(tmp_path / "base", "gptq")
    adapter = make_adapter(base, tmp_path / "adapter", Case(quant=stored_codes(base).spec()))
    other, _ = coded_base(tmp_path / "other", "gptq", seed=4)
    with pytest.raises(Mismatch):
        merge(str(other), [adapter.path], tmp_path / "merged", dtype="float32")
    with pytest.raises(Mismatch):
        load_model(open_checkpoint(adapter.path), resolve_source(str(other)))


def test_a_coded_base_looks_like_plain_weights(tmp_path):
    base, values = coded_base(tmp_path / "base", "awq")
    weights = open_base(base)
    assert isinstance(weights, CodedWeights)
    assert len(weights) == len(list(weights))
    name = next(iter(values))
    assert weights[name].shape == tuple(values[name].shape)
    assert weights[name].dtype == "F16"
    assert name.replace("weight", "qweight") not in weights


def test_quantizing_codes_again_is_refused(tmp_path):
    base, _ = coded_base(tmp_path / "base", "awq")
    with pytest.raises(Unsupported, match="are awq codes already"):
        load_base(base, "causal-lm", quant=NF4)


def test_codes_of_another_shape_are_refused(tmp_path):
    base, _ = coded_base(tmp_path / "base", "bitnet")
    state = read_tensors(base)
    name = "model.layers.0.mlp.up_proj.weight"
    state[name] = state[name][:-1].contiguous()
    write_tensors(base / "model.safetensors", state, metadata={"format": "pt"})
    with pytest.raises(CorruptCheckpoint, match="up_proj"):
        load_base(base, "causal-lm")


def test_layers_that_round_their_inputs_are_not_merged(tmp_path):
    """Merged weights could not say so; the adapter runs separately, as it was trained."""
    base, _ = coded_base(tmp_path / "base", "bitnet")
    spec = stored_codes(base).spec(activation_bits=8)
    adapter = make_adapter(base, tmp_path / "adapter", Case(quant=spec))
    load_model(open_checkpoint(adapter.path), resolve_source(str(base)))
    with pytest.raises(Unsupported, match="round their inputs"):
        merge(str(base), [adapter.path], tmp_path / "merged", dtype="float32")
