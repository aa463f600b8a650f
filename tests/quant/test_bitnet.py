"""BitNet checkpoints against transformers' own BitNet layers, run as they are on a tiny model."""

import json

import pytest
import torch
from torch import nn

from qlx.checkpoint import QuantSpec
from qlx.errors import CorruptCheckpoint, Unsupported
from qlx.quant import (
    SCALE_DTYPE,
    IntegerLinear,
    bitnet_entries,
    eligible_modules,
    packed_from_bitnet,
    quantize_model,
    quantize_tensor,
)
from qlx.weights import write_tensors

bitnet = pytest.importorskip("transformers.integrations.bitnet")
transformers = pytest.importorskip("transformers")
SPEC = QuantSpec(scheme="ternary", weight_bits=2, activation_bits=8)
OUT, IN = 32, 48


@pytest.fixture(autouse=True)
def _without_compiling():
    """Transformers decorates its BitNet functions with torch.compile, which takes a minute each."""
    with torch.compiler.set_stance("force_eager"):
        yield


def codes(seed=0, rows=OUT):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (rows, IN), generator=g)


def bit_linear(dtype=torch.float32):
    """Transformers' layer that divides by its scale, with weights packed by its own function."""
    torch.manual_seed(0)
    layer = bitnet.BitLinear(IN, OUT, bias=True, dtype=dtype)
    layer.weight = nn.Buffer(bitnet.pack_weights(codes().float()))
    layer.weight_scale = nn.Buffer(torch.tensor([37.3], dtype=dtype))
    layer.bias = nn.Buffer(torch.randn(OUT, dtype=dtype))
    return layer


def auto_bit_linear(dtype=torch.float32):
    """Transformers' layer that multiplies by its scale; on loading it unpacks its weights."""
    torch.manual_seed(0)
    layer = bitnet.AutoBitLinear(IN, OUT, bias=False, dtype=dtype)
    layer.weight.data = codes().to(dtype)
    layer.weight_scale = nn.Buffer(torch.tensor([0.0268], dtype=dtype))
    return layer


def entries_of(layer):
    weight = layer.weight.detach()
    if weight.dtype != torch.uint8:
        weight = bitnet.pack_weights(weight.clone())
    return {"l.weight": weight, "l.weight_scale": layer.weight_scale}


LAYERS = {"bitlinear": bit_linear, "autobitlinear": auto_bit_linear}


@pytest.mark.parametrize("linear_class", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reads_what_transformers_packs_and_computes_the_same(linear_class, dtype):
    layer = LAYERS[linear_class](dtype)
    packed = packed_from_bitnet(entries_of(layer), "l.weight", linear_class)
    assert torch.equal(packed.integers(), codes().float())
    ours = IntegerLinear(packed, layer.bias, compute_dtype=torch.float32, activation_bits=8)
    x = torch.randn(5, IN).to(dtype)
    reference = LAYERS[linear_class](torch.float32)
    reference.weight_scale.data = layer.weight_scale.float()
    if reference.bias is not None:
        reference.bias.data = layer.bias.float()
    theirs = reference(x.float())
    assert (ours(x.float()) - theirs).norm() / theirs.norm() < 1e-6
    plain = IntegerLinear(packed, layer.bias, compute_dtype=torch.float32)
    rounded = (plain(x.float()) - theirs).norm() / theirs.norm()
    assert 1e-4 < rounded < 3e-2  # what the rounding of the inputs is worth
    other = "autobitlinear" if linear_class == "bitlinear" else "bitlinear"
    wrong = packed_from_bitnet(entries_of(layer), "l.weight", other)
    assert (wrong.values() - packed.values()).norm() > packed.values().norm()  # negative control


def test_offline_weights_that_are_stored_unpacked():
    layer = auto_bit_linear()
    entries = {"l.weight": layer.weight.detach(), "l.weight_scale": layer.weight_scale}
    packed = packed_from_bitnet(entries, "l.weight", "autobitlinear")
    assert torch.equal(packed.integers(), codes().float())
    with pytest.raises(CorruptCheckpoint, match="not ternary"):
        packed_from_bitnet(entries | {"l.weight": torch.randn(OUT, IN)}, "l.weight", "bitlinear")


@pytest.mark.parametrize("linear_class", LAYERS)
@pytest.mark.parametrize("scale", ["float32", "bfloat16", "float16"])
def test_written_and_read_again_is_the_same(linear_class, scale):
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(3)) * 0.05
    packed = quantize_tensor(weight, SPEC.model_copy(update={"extras": {SCALE_DTYPE: scale}}))
    if linear_class == "bitlinear" and scale != "float32":
        packed_in_float = bitnet_entries(packed, "l.weight", linear_class, torch.float32)
        again = packed_from_bitnet(packed_in_float, "l.weight", linear_class)
        assert torch.equal(again.values(), packed.values())
        return
    entries = bitnet_entries(packed, "l.weight", linear_class)
    assert torch.equal(entries["l.weight"], bitnet.pack_weights(packed.integers()))
    again = packed_from_bitnet(entries, "l.weight", linear_class)
    assert torch.equal(again.codes, packed.codes)
    assert torch.equal(again.values(), packed.values())


def test_a_scale_that_the_layout_cannot_hold_is_refused():
    packed = quantize_tensor(torch.randn(OUT, IN), SPEC)
    with pytest.raises(Unsupported, match="train with that scale_dtype"):
        bitnet_entries(packed, "l.weight", dtype=torch.bfloat16)


def test_refusals():
    grouped = quantize_tensor(torch.randn(OUT, 64), SPEC.model_copy(update={"group_size": 32}))
    with pytest.raises(Unsupported, match="one scale"):
        bitnet_entries(grouped, "l.weight")
    with pytest.raises(Unsupported, match="30 rows"):
        bitnet_entries(quantize_tensor(torch.randn(30, IN), SPEC), "l.weight")
    entries = entries_of(bit_linear())
    with pytest.raises(CorruptCheckpoint, match=r"l\.weight_scale.*missing"):
        packed_from_bitnet({"l.weight": entries["l.weight"]}, "l.weight", "bitlinear")
    with pytest.raises(CorruptCheckpoint, match="outside -1…1"):
        packed_from_bitnet(entries | {"l.weight": entries["l.weight"] | 3}, "l.weight", "bitlinear")
    with pytest.raises(CorruptCheckpoint, match="zero"):
        packed_from_bitnet(
            entries | {"l.weight_scale": torch.zeros(1)}, "l.weight", "autobitlinear"
        )


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        vocab_size=64,
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("linear_class", LAYERS)
def test_a_directory_we_write_runs_in_plain_transformers(linear_class, tmp_path):
    """The model that trains here, packed in the BitNet layout, gives the same logits there."""
    model = llama()
    config, state = model.config, dict(model.state_dict())
    names = quantize_model(model, SPEC)
    for name in names:
        state |= bitnet_entries(model.get_submodule(name).packed, f"{name}.weight", linear_class)
    write_tensors(tmp_path / "model.safetensors", state, metadata={"format": "pt"})
    section = {
        "quant_method": "bitnet",
        "linear_class": linear_class,
        "quantization_mode": "offline",
        "modules_to_not_convert": ["lm_head"],
    }
    fields = json.loads(config.to_json_string()) | {
        "quantization_config": section,
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float32",
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    kind = {"bitlinear": bitnet.BitLinear, "autobitlinear": bitnet.AutoBitLinear}[linear_class]
    assert sum(isinstance(m, kind) for m in loaded.modules()) == len(names)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        ours, theirs = model(input_ids=ids).logits, loaded(input_ids=ids).logits
        assert (ours - theirs).norm() / theirs.norm() < 1e-5
        plain = llama()(input_ids=ids).logits
    assert (plain - theirs).norm() / theirs.norm() > 1e-2  # negative control


def test_an_online_base_is_a_plain_one_that_we_quantize_alike():
    """Transformers rounds weights and inputs at every forward pass; we round the weights once."""
    model, online = llama(), llama()
    for name in eligible_modules(online):
        linear = online.get_submodule(name)
        layer = bitnet.AutoBitLinear(
            linear.in_features, linear.out_features, bias=False, online_quant=True
        )
        layer.weight = linear.weight
        online.set_submodule(name, layer)
    quantize_model(model, SPEC)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        ours, theirs = model(input_ids=ids).logits, online(input_ids=ids).logits
        weights_only = llama()
        quantize_model(weights_only, SPEC.model_copy(update={"activation_bits": None}))
        without = weights_only(input_ids=ids).logits
    assert (ours - theirs).norm() / theirs.norm() < 1e-5
    assert (without - theirs).norm() / theirs.norm() > 1e-3  # negative control
