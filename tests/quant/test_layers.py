"""Which layers are quantized, and that a quantized model is the model with dequantized weights."""

import copy

import pytest
import torch
from torch import nn

from qlx.checkpoint import QuantSpec
from qlx.errors import Unsupported
from qlx.quant import (
    HEAD_NAMES,
    bnb_config,
    dequantize_tensor,
    eligible_modules,
    guard_bitsandbytes,
    linear4bit_modules,
    names_part,
    packed_fingerprint,
    packed_of_module,
    quantize_model,
    quantize_tensor,
    set_compute_dtype,
)

pytest.importorskip("bitsandbytes")
transformers = pytest.importorskip("transformers")
SPEC = QuantSpec(method="qlora", scheme="nf4", group_size=64, double_quant=True)


def llama(tie=False):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            vocab_size=64,
            tie_word_embeddings=tie,
        )
    ).eval()


def vit():
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            image_size=16,
            patch_size=8,
            num_labels=3,
        )
    ).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 9)[None]).logits


def test_heads_embeddings_and_skips_are_left_out():
    assert len(eligible_modules(vit())) == 12
    assert not any("classifier" in name for name in eligible_modules(vit()))
    names = eligible_modules(llama(), ("layers.1", "mlp.down_proj"))
    assert [n.removeprefix("model.layers.0.") for n in names] == [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
    ]


def test_parts_of_a_head_are_left_out():
    """As in RoBERTa, whose classifier has two layers."""
    head = nn.ModuleDict({"dense": nn.Linear(64, 64), "out_proj": nn.Linear(64, 2)})
    model = nn.ModuleDict({"dense": nn.Linear(64, 64), "classifier": head})
    assert eligible_modules(model) == ["dense"]


def test_skip_entries_are_whole_components():
    """`layers.1` does not also mean `layers.11`."""
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(64, 64) for _ in range(12))})
    names = eligible_modules(model, ("layers.1",))
    assert "layers.1" not in names
    assert {"layers.10", "layers.11"} < set(names)


def test_a_tied_output_is_left_out():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(32, 64)
            self.inner = nn.Linear(64, 64)
            self.out = nn.Linear(64, 32, bias=False)
            self.out.weight = self.embed.weight

    assert eligible_modules(Tied()) == ["inner"]
    assert not any("lm_head" in name for name in eligible_modules(llama(tie=True)))


def test_odd_widths_are_refused_by_name_unless_skipped():
    model = nn.ModuleDict({"a": nn.Linear(64, 96), "b": nn.Linear(96, 64)})
    with pytest.raises(Unsupported, match=r"b \(96\)"):
        eligible_modules(model)
    assert eligible_modules(model, ("b",)) == ["a"]
    assert eligible_modules(model, group_size=32) == ["a", "b"]
    with pytest.raises(Unsupported, match=r"a \(64\)"):
        eligible_modules(model, ("b",), group_size=128)


def test_a_skip_that_names_nothing_is_refused():
    with pytest.raises(Unsupported, match="'clasifier' names no part"):
        eligible_modules(vit(), ("clasifier",))


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_quantized_model_is_the_model_with_dequantized_weights(scheme):
    spec = SPEC.model_copy(update={"scheme": scheme})
    model = llama()
    reference = copy.deepcopy(model)
    original = logits(model)
    names = quantize_model(model, spec)
    assert names == eligible_modules(reference)
    for name in names:
        weight = reference.get_submodule(name).weight
        weight.data = dequantize_tensor(quantize_tensor(weight, spec))
    difference = (logits(model) - logits(reference)).norm() / original.norm()
    assert difference < 1e-6
    assert (logits(model) - original).norm() / original.norm() > 1e-2  # negative control


def test_codes_do_not_depend_on_the_dtype_a_bfloat16_base_is_loaded_in():
    half = llama().to(torch.bfloat16)
    full = copy.deepcopy(half).float()
    for model in (half, full):
        quantize_model(model, SPEC)
    prints = [
        packed_fingerprint((n, packed_of_module(m)) for n, m in linear4bit_modules(model))
        for model in (half, full)
    ]
    assert prints[0] == prints[1]


def test_mode_hf_and_mode_manual_give_the_same_model(tmp_path):
    """The loading of transformers, guarded, has our codes and our outputs bit for bit."""
    model = vit()
    model.save_pretrained(tmp_path)
    manual = copy.deepcopy(model)
    names = quantize_model(manual, SPEC)
    loaded = transformers.ViTForImageClassification.from_pretrained(
        tmp_path, quantization_config=bnb_config(SPEC), dtype=torch.float32, device_map="cpu"
    ).eval()
    assert guard_bitsandbytes(loaded) == len(names)
    assert [n for n, _ in linear4bit_modules(loaded)] == names
    assert packed_fingerprint((n, packed_of_module(m)) for n, m in linear4bit_modules(loaded)) == (
        packed_fingerprint((n, packed_of_module(m)) for n, m in linear4bit_modules(manual))
    )
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded(pixels).logits, manual(pixels).logits)


@pytest.mark.parametrize(
    "name",
    [
        "lm_head",
        "h.0.mlp.c_fc",
        "fc",
        "layers.1.mlp.up",
        "layers.11.mlp.up",
        "vit.subhead",
        "a.head.b",
    ],
)
def test_mode_hf_skips_what_mode_manual_skips(name):
    """Transformers takes a bare entry as the end of any name, so `fc` would also skip `c_fc`."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    spec = SPEC.model_copy(update={"skip_modules": ("layers.1",)})
    entries = bnb_config(spec).llm_int8_skip_modules
    skipped = any(names_part(name, entry) for entry in (*HEAD_NAMES, "layers.1"))
    assert should_convert_module(name, entries) is not skipped


def test_bnb_config_refuses_what_transformers_cannot_do():
    with pytest.raises(Unsupported, match="blocks of 64"):
        bnb_config(SPEC.model_copy(update={"group_size": 128}))


def test_compute_dtype_changes_the_product_only():
    model = llama()
    quantize_model(model, SPEC)
    exact, before = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    set_compute_dtype(model, torch.bfloat16)
    rough = logits(model)
    assert 1e-5 < (rough - exact).norm() / exact.norm() < 3e-2
    set_compute_dtype(model, torch.float32)
    assert torch.equal(logits(model), exact)
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_quantized_model_survives_copy_and_move():
    model = llama()
    quantize_model(model, SPEC)
    moved = copy.deepcopy(model).to("cpu", torch.float32)
    assert torch.equal(logits(moved), logits(model))


def test_autocast_does_not_change_the_compute_dtype():
    model = llama()
    quantize_model(model, SPEC)
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 64)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), layer(x.clone()))
        assert layer(x).dtype is torch.float32


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    """Without re-entrance a saved part may be looked at once only."""
    gradients = []
    for checkpointed in (False, True):
        model = llama().train()
        quantize_model(model, SPEC)
        model.requires_grad_(False)
        model.model.embed_tokens.weight.requires_grad_(True)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        ids = torch.arange(1, 9)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append(model.model.embed_tokens.weight.grad)
    assert torch.equal(*gradients)
    assert gradients[0].abs().sum() > 0


def test_nothing_to_quantize_is_an_error():
    with pytest.raises(Unsupported, match="no linear layer"):
        quantize_model(nn.Sequential(nn.Conv2d(3, 3, 1)), SPEC)
