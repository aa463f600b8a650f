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
        ("base.dtype=float32", "activations", True),
        ("base.dtype=float32", "weights", True),
        ("quantization.compute_dtype=float32", "dequantized_layer", True),
        ("training.gradient_checkpointing=false", "activations", True),
        ("quantization.double_quant=false", "constants", True),
        ("adapter.rank=32", "optimizer", True),
        ("adapter.modules_to_save=[lm_head]", "adapter", True),
        ("adapter.new_tokens=[a, b]", "gradients", True),
        ("adapter.rank_pattern={q_proj: 32}", "optimizer", True),
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_return_the_dtype_of_the_base_whatever_they_compute_in(recipe_file, dtype):
    """What qlx's layers do, and what is planned: only the weight that is made is in `compute_dtype`."""
    import torch

    from qlx.checkpoint import QuantSpec
    from qlx.quant import quantize_model

    given, base = getattr(torch, dtype), f"base.dtype={dtype}"
    plans = {}
    for scheme in ("nf4", "int4"):
        for computed in ("float32", "bfloat16"):
            spec = QuantSpec(
                method="qlora", weight_bits=4, scheme=scheme, group_size=64, compute_dtype=computed
            )  # fmt: skip
            model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False, dtype=given))
            quantize_model(model, spec)
            assert model(torch.ones(1, 64, dtype=given)).dtype == given
            plans[computed] = plan_recipe(
                load_recipe(recipe_file, [base, f"quantization.compute_dtype={computed}"])
            ).parts
    wide, narrow = plans["float32"], plans["bfloat16"]
    assert wide.dequantized_layer == 2 * narrow.dequantized_layer == 4 * 128 * 256
    assert (wide.activations, wide.weights) == (narrow.activations, narrow.weights)


def test_products_are_joined_where_the_adapter_meets_its_own_dtype(recipe_file):
    """On a GPU a bfloat16 base is computed with autocast, a float16 one is not, and the adapter is float32."""
    joined = {
        dtype: plan_recipe(load_recipe(recipe_file, [f"base.dtype={dtype}"])).setup.joined
        for dtype in ("float32", "bfloat16", "float16")
    }
    assert joined == {"float32": True, "bfloat16": True, "float16": False}
    assert not plan_recipe(load_recipe(recipe_file, ["adapter.use_dora=true"])).setup.joined


@pytest.mark.parametrize(("dtype", "bytes_each"), [("float32", 16), ("bfloat16", 8)])
def test_all_weights_are_trained_in_the_dtype_of_the_base(recipe_file, dtype, bytes_each):
    """tests/planning/test_trained.py has what a training really keeps."""
    changes = [f"base.dtype={dtype}", "adapter=null", "quantization=null"]
    plan = plan_recipe(load_recipe(recipe_file, changes))
    state = plan.parts.weights + plan.parts.gradients + plan.parts.optimizer
    assert state == bytes_each * plan.shape.parameters


def test_a_heatmap_model_from_a_plain_vit_is_made_in_float32(recipe_file):
    path = "base.path=google/vit-base-patch16-224"
    changes = ["task=heatmap", "data={source: tracknet, path: none}", "adapter=null", path]
    plan = plan_recipe(load_recipe(recipe_file, [*changes, "quantization=null"]))
    assert plan.parts.weights == 4 * plan.shape.parameters


@pytest.mark.parametrize(
    ("fields", "bytes_a_group"),
    [
        ({"quant_type": "int4"}, 4),
        ({"quant_type": "int8", "group_size": 128}, 4),
        ({"quant_type": "int4", "symmetric": "false"}, 5),
        ({"quant_type": "int4", "scale_dtype": "float16"}, 2),
        ({"quant_type": "int2"}, 5),
        ({"quant_type": "ternary"}, 4),
    ],
)
def test_scales_and_zero_points_are_those_of_the_packed_layer(recipe_file, fields, bytes_a_group):
    import torch

    from qlx.quant import packed_modules, packed_of_module, quantize_model
    from qlx.training.job import quant_spec

    words = ", ".join(f"{name}: {value}" for name, value in fields.items())
    recipe = load_recipe(recipe_file, [f"quantization={{{words}}}"])
    model = torch.nn.Sequential(torch.nn.Linear(256, 8, bias=False))
    quantize_model(model, quant_spec(recipe.quantization, "float32"))
    ((_, layer),) = packed_modules(model)
    constants = sum(part.nbytes for part in packed_of_module(layer).parts[1:])
    assert constants == 2 * 8 * bytes_a_group
    assert plan_recipe(recipe).setup.weights.constant_bytes == bytes_a_group / 128


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


def _compressed(bits, group_size, **fields):
    weights = {"num_bits": bits, "group_size": group_size, **fields}
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
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "int8", 1 + 2 / 4096),
        ({"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False}, "int4", 0.5 + 3 / 64),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, "int4", 0.5 + 3 / 64),
        (_compressed(4, 64), "int4", 0.5 + 2 / 64),
        (_compressed(4, 64, symmetric=False), "int4", 0.5 + 3 / 64),
        (_compressed(8, None), "int8", 1 + 2 / 4096),
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
