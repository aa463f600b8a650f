"""What a config.json says of a base that comes quantized, and what is refused of it."""

import pytest
import torch

from qlx.checkpoint import QuantSpec
from qlx.errors import Unsupported
from qlx.quant import bitnet_entries, packed_entries, quantize_tensor, stored_quantization


def of(**section):
    return stored_quantization({"quantization_config": section})


def compressed(**changes):
    """A section of compressed-tensors with fields changed, wherever they belong."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    group = {"weights": weights | {k: v for k, v in changes.items() if k in (*weights, "actorder")}}
    group |= {k: v for k, v in changes.items() if k == "input_activations"}
    section = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    section |= {"config_groups": {"group_0": group}}
    return section | {k: v for k, v in changes.items() if k in section}


def test_plain_bases_are_not_stored_codes():
    assert stored_quantization({}) is None


def test_blocks_of_bitsandbytes_are_read_from_the_files():
    stored = of(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4")
    spec = QuantSpec(scheme="nf4", group_size=128, double_quant=True)
    packed = quantize_tensor(torch.randn(8, 256), spec)
    entries = packed_entries(packed, "l.weight") | {"norm.weight": torch.ones(4)}
    names = stored.state_names(entries)
    assert stored.weight_names(entries) == ["l.weight"]
    assert names == ["l.weight.quant_state.bitsandbytes__nf4"]
    found = stored.as_states_say(entries, {name: entries[name] for name in names}).spec()
    assert (found.scheme, found.group_size, found.double_quant) == ("nf4", 128, True)
    assert torch.equal(stored.read(entries, "l.weight").values(), packed.values())
    other = quantize_tensor(torch.randn(8, 256), spec.model_copy(update={"group_size": 64}))
    with pytest.raises(Unsupported, match="of 2 kinds"):
        mixed = entries | packed_entries(other, "m.weight")
        stored.as_states_say(mixed, mixed)


def test_gptq_in_both_formats():
    first = of(quant_method="gptq", bits=4, group_size=128, sym=True, desc_act=True)
    second = of(quant_method="gptq", bits=8, group_size=-1, sym=False, checkpoint_format="gptq_v2")
    assert (first.scheme, first.group_size, first.symmetric) == ("int4", 128, True)
    assert first.zeros_less_one
    assert (second.scheme, second.group_size, second.symmetric) == ("int8", None, False)
    assert not second.zeros_less_one


def test_names_of_weights_and_of_their_parts():
    gptq = of(quant_method="gptq", bits=4)
    names = ["a.b.qweight", "a.b.qzeros", "a.b.scales", "a.b.g_idx", "a.norm.weight", "a.b.bias"]
    assert gptq.weight_names(names) == ["a.b.weight"]
    assert gptq.part_names("a.b.weight") == tuple(names[:4])
    bitnet = of(quant_method="bitnet", linear_class="autobitlinear")
    assert bitnet.weight_names(["x.weight", "x.weight_scale", "y.weight"]) == ["x.weight"]
    assert bitnet.part_names("x.weight") == ("x.weight", "x.weight_scale")


def test_the_spec_says_what_the_base_holds():
    spec = of(quant_method="awq", bits=4, group_size=64, version="gemm").spec(
        compute_dtype="bfloat16"
    )
    assert (spec.scheme, spec.weight_bits, spec.group_size) == ("int4", 4, 64)
    assert (spec.backend, spec.symmetric, spec.compute_dtype) == ("awq", False, "bfloat16")


def test_reading_goes_to_the_reader_of_the_layout():
    stored = of(quant_method="bitnet", linear_class="autobitlinear")
    packed = quantize_tensor(torch.randn(8, 16), stored.spec())
    assert torch.equal(
        stored.read(bitnet_entries(packed, "l.weight"), "l.weight").values(), packed.values()
    )


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"quant_method": "aqlm"}, "'aqlm' cannot be read"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "weights of 8 bits"),
        (
            {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "bnb_4bit_quant_storage": "bfloat16",
            },
            "stored as bfloat16",
        ),
        ({"quant_method": "gptq", "bits": 3}, "gptq with 3 bits"),
        (compressed(format="nvfp4-pack-quantized"), "'nvfp4-pack-quantized' with 1"),
        (compressed(config_groups={}), "with 0 config_groups"),
        (compressed(num_bits=3), "of 3 bits"),
        (compressed(type="float"), "with codes of floats"),
        (compressed(actorder="group"), "with reordered groups"),
        (compressed(input_activations={"num_bits": 8}), "with rounded inputs"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "format 'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:a": {"bits": 8}}}, "layer to layer"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv'"),
        ({"quant_method": "bitnet", "quantization_mode": "online"}, "online mode keeps plain"),
        ({"quant_method": "bitnet", "use_rms_norm": True}, "use_rms_norm"),
        ({"quant_method": "bitnet", "linear_class": "x"}, "class 'x'"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(section, says):
    with pytest.raises(Unsupported, match=says):
        of(**section)
