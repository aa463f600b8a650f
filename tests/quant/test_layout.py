"""The stored layout: byte-equal to what bitsandbytes writes, and read back strictly."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from qlx.checkpoint import QuantSpec
from qlx.errors import CorruptCheckpoint, Unsupported
from qlx.quant import (
    dequantize_tensor,
    entry_names,
    is_packed_weight,
    packed_entries,
    packed_fingerprint,
    packed_from_entries,
    quantize_model,
    quantize_tensor,
)

bnb = pytest.importorskip("bitsandbytes")
STATE = "w.quant_state.bitsandbytes__nf4"


def packed(nested=True, scheme="nf4", dtype=torch.float32, block=64, shape=(48, 128)):
    spec = QuantSpec(scheme=scheme, group_size=block, double_quant=nested)
    generator = torch.Generator().manual_seed(11)
    return quantize_tensor((torch.randn(shape, generator=generator) * 0.03).to(dtype), spec)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
def test_entries_are_those_of_bitsandbytes(nested, scheme, dtype):
    weight = (torch.randn(48, 128, generator=torch.Generator().manual_seed(11)) * 0.03).to(dtype)
    layer = bnb.nn.Linear4bit(128, 48, False, dtype)
    layer.weight = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type=scheme, compress_statistics=nested
    )
    stock = layer.to("cpu").state_dict()
    ours = packed_entries(packed(nested, scheme, dtype), "weight")
    assert set(ours) == set(stock) == set(entry_names("weight", scheme, nested=nested))
    for name, tensor in ours.items():
        assert tensor.dtype == stock[name].dtype, name
        assert torch.equal(tensor.reshape(-1), stock[name].reshape(-1)), name
    assert ours["weight"].shape == stock["weight"].shape


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
def test_read_is_the_inverse_of_write(nested):
    for one in (
        packed(nested),
        packed(nested, "fp4", torch.bfloat16, 128),
        packed(nested, shape=(3, 50)),
    ):
        again = packed_from_entries(packed_entries(one, "w"), "w")
        first, second = packed_entries(one, "w"), packed_entries(again, "w")
        assert first.keys() == second.keys()
        assert all(torch.equal(first[k], second[k]) for k in first)
        assert torch.equal(dequantize_tensor(one), dequantize_tensor(again))


def test_bitsandbytes_reads_our_entries():
    one = packed()
    entries = packed_entries(one, "w")
    stats = {k.removeprefix("w."): v for k, v in entries.items() if k != "w"}
    weight = bnb.nn.Params4bit.from_prequantized(entries["w"], stats, device="cpu")
    values = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    assert torch.equal(values, dequantize_tensor(one))


def test_is_packed_weight():
    entries = packed_entries(packed(), "w")
    assert is_packed_weight(entries, "w")
    assert not is_packed_weight(entries, "w.absmax")
    assert not is_packed_weight(["v", "v.absmax"], "v")


def edit(entries, **changes):
    state = json.loads(bytes(entries[STATE].tolist()))
    state |= changes
    text = json.dumps({k: v for k, v in state.items() if v is not None}).encode()
    return entries | {STATE: torch.tensor(list(text), dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda e: {k: v for k, v in e.items() if k != "w.absmax"}, CorruptCheckpoint, "absmax"),
        (lambda e: {k: v for k, v in e.items() if k != "w"}, CorruptCheckpoint, "'w' is missing"),
        (lambda e: e | {"w.absmax": e["w.absmax"][:-1]}, CorruptCheckpoint, "scales"),
        (lambda e: e | {"w": e["w"][:-1]}, CorruptCheckpoint, "code bytes"),
        (lambda e: e | {"w.quant_map": -e["w.quant_map"]}, Unsupported, "level table"),
        (lambda e: edit(e, blocksize=48), Unsupported, "48"),
        (lambda e: edit(e, shape=[48, 129]), CorruptCheckpoint, "fit"),
        (lambda e: edit(e, shape=[48, True]), CorruptCheckpoint, "shape"),
        (lambda e: edit(e, dtype="float64"), Unsupported, "float64"),
        (lambda e: edit(e, nested_offset="0"), CorruptCheckpoint, "offset"),
        (lambda e: edit(e, nested_blocksize=128), Unsupported, "double quantization"),
        (lambda e: e | {STATE: e[STATE][:-1]}, CorruptCheckpoint, "JSON"),
        (
            lambda e: e | {"w.nested_absmax": e["w.nested_absmax"] * float("nan")},
            CorruptCheckpoint,
            "NaN",
        ),
    ],
)
def test_a_spoiled_layout_is_refused_by_name(spoil, error, words):
    with pytest.raises(error, match=words) as caught:
        packed_from_entries(spoil(packed_entries(packed(), "w")), "w")
    assert "'w" in str(caught.value)


def test_fingerprint_knows_every_part_and_not_order_or_base_dtype():
    one, two = packed(), packed(scheme="fp4")
    reference = packed_fingerprint([("a", one), ("b", two)])
    assert reference == packed_fingerprint([("b", two), ("a", one)])
    assert reference == packed_fingerprint([("a", replace(one, dtype=torch.bfloat16)), ("b", two)])
    assert reference.startswith("sha256:")
    codes = one.codes.clone()
    codes[7] ^= 16
    offset = replace(one.nested, offset=torch.nextafter(one.nested.offset, torch.tensor(9.0)))
    others = [
        [("a", one)],
        [("c", one), ("b", two)],
        [("a", replace(one, codes=codes)), ("b", two)],
        [("a", replace(one, nested=offset)), ("b", two)],
        [("a", replace(one, shape=(128, 48))), ("b", two)],
        [("a", replace(one, nested=None)), ("b", two)],
    ]
    assert len({packed_fingerprint(o) for o in others} | {reference}) == len(others) + 1


LOAD = """
import sys, torch
sys.modules["qlx"] = None  # this process cannot import qlx
import bitsandbytes as bnb, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map="cpu").eval()
layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
for layer in layers:
    layer.support_avx512bf16_for_cpu = False
with torch.no_grad():
    logits = model(input_ids=torch.arange(1, 9)[None]).logits
torch.save({"layers": len(layers), "logits": logits}, sys.argv[2])
"""


def test_a_directory_of_our_entries_loads_in_plain_transformers(tmp_path):
    """The process that loads it cannot import qlx."""
    transformers = pytest.importorskip("transformers")
    from qlx.quant import bnb_config, linear4bit_modules, packed_of_module
    from qlx.weights import write_tensors

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, vocab_size=32
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    spec = QuantSpec(method="post-training", scheme="nf4", group_size=64, double_quant=True)
    names = quantize_model(model, spec)
    for name, layer in linear4bit_modules(model):
        state.pop(f"{name}.weight")
        state |= packed_entries(packed_of_module(layer), f"{name}.weight")
    write_tensors(tmp_path / "model.safetensors", state, metadata={"format": "pt"})
    config.quantization_config = bnb_config(spec).to_dict()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    result = tmp_path / "result.pt"
    subprocess.run([sys.executable, "-c", LOAD, str(tmp_path), str(result)], check=True)
    found = torch.load(result, weights_only=True)
    assert found["layers"] == len(names) == 14
    with torch.no_grad():
        logits = model(input_ids=torch.arange(1, 9)[None]).logits
    assert ((found["logits"] - logits).norm() / logits.norm()).item() < 1e-5
    with torch.no_grad():
        other = model(input_ids=torch.arange(2, 10)[None]).logits
    assert ((found["logits"] - other).norm() / logits.norm()).item() > 1e-2  # negative control
