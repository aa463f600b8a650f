"""Plans of recipes: each section reaches the setup, and bases that cannot be known are refused."""

import json
from typing import get_args

import pytest

from qlx.errors import InputRefused
from qlx.planning import plan_recipe
from qlx.planning.memory import OPTIMIZER_BYTES
from qlx.recipe import load_recipe
from qlx.recipe.schema import Optimizer

RECIPE = """
name: plan-me
task: causal-lm
base: {path: BASE, dtype: bfloat16}
data: {source: python-docstrings, max_length: 512}
adapter: {rank: 8, target_modules: [q_proj, v_proj]}
quantization: {quant_type: nf4, double_quant: true, compute_dtype: bfloat16}
training: {batch_size: 4, gradient_checkpointing: true}
"""
CONFIG = {
    "model_type": "llama", "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 256, "vocab_size": 512,
}  # fmt: skip


@pytest.fixture
def recipe_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.replace("BASE", str(tmp_path)))
    return file


def test_every_section_reaches_the_plan(recipe_file):
    plan = plan_recipe(load_recipe(recipe_file))
    assert (plan.shape.hidden, plan.shape.vocab) == (128, 512)
    setup = plan.setup
    assert (setup.rank, setup.roles, setup.tokens, setup.batch) == (8, ("q", "v"), 512, 4)
    assert (setup.weights.name, setup.compute_bytes, setup.checkpointing) == ("nf4", 2, True)
    assert plan.trained_parameters == 2 * 8 * ((128 + 128) + (128 + 64))


@pytest.mark.parametrize(
    ("override", "part", "larger"),
    [
        ("quantization.compute_dtype=float32", "activations", True),
        ("training.gradient_checkpointing=false", "activations", True),
        ("quantization.double_quant=false", "constants", True),
        ("adapter.rank=32", "optimizer", True),
        ("data.max_length=128", "activations", False),
        ("base.offload=disk", "weights", False),
        ("base.offload=cpu", "weights", False),
    ],
)
def test_a_changed_field_changes_its_part(recipe_file, override, part, larger):
    before = getattr(plan_recipe(load_recipe(recipe_file)).parts, part)
    after = getattr(plan_recipe(load_recipe(recipe_file, [override])).parts, part)
    assert (after > before) == larger
    assert after != before


def test_every_kind_of_adapter_is_counted_as_it_is_trained(recipe_file):
    lora, pissa, vera = (
        plan_recipe(load_recipe(recipe_file, overrides))
        for overrides in (
            [],
            ["adapter.init_lora_weights=pissa_niter_4"],
            ["adapter.type=vera", "adapter.rank=64"],
        )
    )
    assert pissa.trained_parameters == lora.trained_parameters
    assert pissa.parts.adapter == 2 * lora.parts.adapter  # its frozen half
    assert pissa.parts.optimizer == lora.parts.optimizer
    assert vera.trained_parameters == 2 * ((64 + 128) + (64 + 64))
    assert vera.parts.adapter == 4 * (vera.trained_parameters + 64 * (128 + 128))


def _compressed(bits, group_size):
    weights = {"num_bits": bits, "group_size": group_size}
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": weights}},
    }


@pytest.mark.parametrize(
    ("section", "name", "bytes_a_weight"),
    [
        (
            {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
            },
            "nf4",
            0.5 + (1 + 4 / 256) / 64,
        ),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "int8", 1 + 3 / 4096),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, "int4", 0.5 + 2.5 / 64),
        (_compressed(4, 64), "int4", 0.5 + 2.5 / 64),
        (_compressed(8, None), "int8", 1 + 3 / 4096),
        (_compressed(2, 64), "ternary", 0.25 + 2 / 64),
        ({"quant_method": "bitnet"}, "ternary", 0.25 + 2 / 4096),
    ],
)
def test_a_base_in_codes_is_planned_as_it_is_stored(recipe_file, section, name, bytes_a_weight):
    config = recipe_file.with_name("config.json")
    config.write_text(json.dumps({**CONFIG, "quantization_config": section}))
    setup = plan_recipe(load_recipe(recipe_file, ["quantization=null"])).setup
    assert setup.weights.name == name
    stored = setup.weights.code_bits / 8 + setup.weights.constant_bytes
    assert stored == pytest.approx(bytes_a_weight)


def test_a_public_base_needs_no_files(recipe_file):
    plan = plan_recipe(load_recipe(recipe_file, ["base.path=Qwen/Qwen3-0.6B"]))
    assert plan.shape.name == "Qwen/Qwen3-0.6B"


def test_an_unknown_base_is_refused(recipe_file):
    with pytest.raises(InputRefused, match="nowhere/at-all"):
        plan_recipe(load_recipe(recipe_file, ["base.path=nowhere/at-all"]))


def test_every_optimizer_of_a_recipe_is_counted(recipe_file):
    """Of a low-rank adapter each keeps less than the one before it."""
    names = get_args(Optimizer)
    plans = [
        plan_recipe(load_recipe(recipe_file, [f"training.optimizer={name}"])) for name in names
    ]
    trained = plans[0].parts.gradients / 4
    sizes = [plan.parts.optimizer / trained for plan in plans]
    assert dict(zip(names, sizes, strict=True)) == OPTIMIZER_BYTES
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 8
