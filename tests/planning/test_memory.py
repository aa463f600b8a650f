"""The memory model against published measurements, closed forms, and a published estimate."""

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from qlx.errors import UsageError
from qlx.planning import PUBLIC_SHAPES, Setup, Shape, WeightFormat, plan_size, weight_format
from qlx.planning.memory import activation_bytes, plan_shape
from qlx.planning.shapes import ATTENTION, MLP, shape_from_config

GIB = 2**30
DOCUMENT = Path(__file__).parents[2] / "docs" / "memory.md"
TOKENS = (256, 512, 1024, 2048, 4096, 8192)
# Q-LoRA on GPTQ-int4 bases, batch 1, one A100, in GB: the table in Qwen's README.
QWEN_MEASURED = {
    "Qwen/Qwen-1.8B": (5.8, 6.0, 6.6, 7.8, 10.2, 15.8),
    "Qwen/Qwen-7B": (11.5, 11.5, 12.3, 13.9, 16.9, 23.5),
    "Qwen/Qwen-14B": (18.7, 18.4, 18.9, 19.9, 23.0, 27.9),
    "Qwen/Qwen-72B": (61.4, 61.4, 62.9, 64.1, 68.0, 75.6),
}
QWEN_SETUP = Setup(
    weights=WeightFormat("int4-gptq", 4, 2.5 / 128),  # fp16 scale and 4-bit zero for 128 weights
    rank=64,
    roles=(*ATTENTION, *MLP),
    trained_bytes=6,  # bf16 adapters with an fp32 master copy
)


def _qwen_errors(**changes):
    setup = replace(QWEN_SETUP, **changes)
    return [
        plan_shape(PUBLIC_SHAPES[name], replace(setup, tokens=tokens)).total / 1e9 / measured - 1
        for name, row in QWEN_MEASURED.items()
        for tokens, measured in zip(TOKENS, row, strict=True)
    ]


def test_the_24_published_measurements_are_met():
    errors = [abs(error) for error in _qwen_errors()]
    assert len(errors) == 24
    assert sum(errors) / len(errors) <= 0.05
    assert max(errors) <= 0.12


@pytest.mark.parametrize("change", [{"checkpointing": False}, {"rank": 0}, {"compute_bytes": 4}])
def test_a_wrong_setup_misses_the_measurements(change):
    assert max(abs(error) for error in _qwen_errors(**change)) > 0.2


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (weight_format("nf4"), 0.5625),
        (weight_format("nf4", double_quant=True), 0.5159),
        (weight_format("fp4", group_size=128), 0.53125),
        (weight_format("int8", group_size=128), 1.0234),
        (weight_format("ternary"), 0.28125),
        (weight_format("bfloat16"), 2.0),
    ],
)
def test_bytes_per_weight_of_each_format(weights, expected):
    assert weights.code_bits / 8 + weights.constant_bytes == pytest.approx(expected, abs=1e-4)


def test_an_unknown_format_is_refused():
    with pytest.raises(UsageError, match="int3"):
        weight_format("int3")


@pytest.mark.parametrize("double_quant", [True, False])
def test_nf4_bytes_are_those_that_bitsandbytes_stores(double_quant):
    import torch
    from bitsandbytes.functional import quantize_4bit

    values = torch.randn(512, 1024)
    codes, state = quantize_4bit(
        values, blocksize=64, quant_type="nf4", compress_statistics=double_quant
    )
    stored = codes.nbytes + state.absmax.nbytes
    if double_quant:
        stored += state.state2.absmax.nbytes
    planned = weight_format("nf4", double_quant=double_quant)
    per_weight = planned.code_bits / 8 + planned.constant_bytes
    assert stored / values.numel() == pytest.approx(per_weight, rel=1e-3)


def test_adapter_parameters_are_what_peft_trains():
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from qlx.planning import shape_from_config

    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=128, vocab_size=200,
    )  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules="all-linear"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    plan = plan_shape(shape_from_config(config.to_dict()), Setup(rank=4, roles=(*ATTENTION, *MLP)))
    assert plan.trained_parameters == trained


def test_full_training_takes_sixteen_bytes_a_parameter():
    plan = plan_size(7 * 10**9, Setup(rank=0))
    parts = plan.parts
    assert parts.adapter == parts.constants == parts.dequantized_layer == 0
    state = parts.weights + parts.gradients + parts.optimizer
    assert state == 16 * plan.shape.parameters


def test_parts_add_up_and_json_says_the_same():
    plan = plan_size(10**9)
    assert plan.total == pytest.approx(sum(getattr(plan.parts, f.name) for f in fields(plan.parts)))
    json = plan.to_json()
    assert sum(json["parts"].values()) == pytest.approx(json["total"], abs=8)


def test_checkpointing_saves_and_more_tokens_cost():
    plan = plan_size(7 * 10**9, Setup(tokens=4096))
    assert plan.activations_without > 4 * plan.activations_with_checkpointing
    longer = plan_size(7 * 10**9, Setup(tokens=8192))
    assert longer.parts.activations > 1.5 * plan.parts.activations
    assert longer.parts.weights == plan.parts.weights


def test_stored_attention_scores_grow_with_the_square_of_the_length():
    shape = PUBLIC_SHAPES["meta-llama/Llama-2-7b"]

    def scores(tokens):
        fused = Setup(tokens=tokens, checkpointing=False)
        eager = replace(fused, attention_scores=True)
        return activation_bytes(shape, eager) - activation_bytes(shape, fused)

    assert scores(4096) == pytest.approx(4 * scores(2048))


# --- A published estimate for training on packed ternary bases (16 GB card), redone line by line.
# Sizes: hidden, layers, heads, key/value heads, MLP width; vocabulary 65536, head not tied.
ESTIMATE_SHAPES = {
    "1B": (2048, 16, 16, 16, 5632),
    "3B": (2560, 26, 20, 20, 6912),
    "7B": (4096, 32, 32, 8, 11008),
    "10B": (4096, 40, 32, 8, 14336),
    "13B": (5120, 40, 40, 8, 13824),
    "30B": (6656, 60, 52, 8, 17920),
    "33B": (6912, 60, 54, 6, 18432),
    "40B": (8192, 60, 64, 8, 21760),
    "65B": (8192, 80, 64, 8, 22016),
    "70B": (8192, 80, 64, 8, 28672),
}
ESTIMATE_FULL = {"1B": 12.2, "3B": 24.4, "7B": 60.8, "13B": 111.8, "40B": 397.8}
ESTIMATE_QLORA = {
    "1B": 1.86, "3B": 2.28, "7B": 3.70, "10B": 4.48, "13B": 5.10, "30B": 10.34, "33B": 10.74,
    "40B": 13.69, "65B": 17.17, "70B": 20.23,
}  # fmt: skip
ESTIMATE_FITS = {"40B": (8, 16, 32), "65B": (), "70B": ()}  # all of 8, 16, 32, 64 elsewhere


def estimate_shape(name):
    hidden, layers, heads, kv_heads, inner = ESTIMATE_SHAPES[name]
    return Shape(name, layers, hidden, inner, heads, kv_heads, hidden // heads, vocab=65536)


def estimate_gib(name, rank):
    """That estimate's own arithmetic, in GiB, from our shapes; rank 0 is full training."""
    shape = estimate_shape(name)
    parameters = shape.parameters + (2 * shape.layers + 1) * shape.hidden  # its norms have biases
    if rank:
        codes = parameters * (2 / 8 + 4 / 4096)  # embeddings and head packed as well
        adapter = shape.layers * 4 * rank * 2 * shape.hidden  # keys and values as wide as queries
        state = codes + adapter * (2 + 2 + 8)
        steps = (1.0, 1.5, 2.5)
    else:
        state = parameters * (2 + 8)  # bf16 weights and two fp32 moments; no gradients
        steps = (1.5, 2.5, 4.0)
    activations = steps[(shape.layers > 26) + (shape.layers > 40)]

    def total(tokens):
        cache = shape.layers * 2 * shape.kv_heads * shape.head_dim * tokens * 0.5
        return (state + cache) / GIB + activations + 0.5

    return total(2048) if total(2048) <= 15.5 else total(512)


def test_the_published_estimate_is_reproduced_to_its_last_digit():
    full = {name: round(estimate_gib(name, 0), 1) for name in ESTIMATE_FULL}
    qlora = {name: round(estimate_gib(name, 16), 2) for name in ESTIMATE_QLORA}
    fits = {n: tuple(r for r in (8, 16, 32, 64) if estimate_gib(n, r) <= 15.5) for n in qlora}
    assert full == ESTIMATE_FULL
    assert qlora == ESTIMATE_QLORA
    assert fits == {n: ESTIMATE_FITS.get(n, (8, 16, 32, 64)) for n in qlora}


def test_the_document_shows_these_measurements_beside_the_model():
    text = DOCUMENT.read_text()
    for name, row in QWEN_MEASURED.items():
        shape = PUBLIC_SHAPES[name]
        ours = [plan_shape(shape, replace(QWEN_SETUP, tokens=t)).total / 1e9 for t in TOKENS]
        cells = (f"{m} / {o:.1f}" for m, o in zip(row, ours, strict=True))
        assert f"| {name.removeprefix('Qwen/')} | {' | '.join(cells)} |" in text
    errors = [abs(error) for error in _qwen_errors()]
    stated = f"Mean error {sum(errors) / 24:.1%}, worst {max(errors):.1%}"
    assert stated.replace("%", " %") in text


def test_the_document_states_these_totals():
    """The line-by-line table of docs/memory.md against both models, so that it cannot go stale."""
    setup = Setup(weights=weight_format("ternary"), rank=16, tokens=2048)
    rows = re.findall(r"^\| (\d+B) \| ([\d.]+) \| ([\d.]+) \|", DOCUMENT.read_text(), re.MULTILINE)
    ours = {n: plan_shape(estimate_shape(n), setup).total / GIB for n in ESTIMATE_QLORA}
    assert all(ours[name] > estimate for name, estimate in ESTIMATE_QLORA.items())
    expected = [(n, f"{e:.2f}", f"{ours[n]:.1f}") for n, e in ESTIMATE_QLORA.items()]
    assert rows == expected


@pytest.mark.parametrize(("weights", "allocated"), [("bfloat16", 16.04e9), ("nf4", 14.60e9)])
def test_what_pytorch_allocated_on_an_h100(weights, allocated):
    """docs/gpu.md's trainings; the runtime is outside of what PyTorch counts."""
    shape = shape_from_config(
        {"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
         "num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 32000}
    )  # fmt: skip
    setup = Setup(
        weights=weight_format(weights, double_quant=True), rank=16, roles=(*ATTENTION, *MLP),
        tokens=1024, batch=8, checkpointing=False, joined=True, fused_loss=True,
    )  # fmt: skip
    parts = plan_shape(shape, setup).parts
    assert parts.total - parts.runtime == pytest.approx(allocated, rel=0.02)
    for other in (replace(setup, joined=False), replace(setup, fused_loss=False)):
        parts = plan_shape(shape, other).parts
        assert parts.total - parts.runtime > 1.08 * allocated
