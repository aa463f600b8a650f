"""Recipes in other tools' names: each means what the same recipe in ours means."""

import pytest

from qlx.errors import RecipeError
from qlx.recipe import load_recipe

OURS = """\
name: digits-qlora
task: image-classification
base: {path: runs/digits-base}
data: {source: digits, variant: shifted}
adapter:
  rank: 8
  alpha: 24
  dropout: 0.05
  target_modules: [query, value]
  bias: none
quantization:
  quant_type: fp4
  double_quant: false
  compute_dtype: bfloat16
  skip_modules: [dense]
  mode: manual
"""

SECTIONS = """\
model_name: digits-qlora
task: image-classification
base: {path: runs/digits-base}
data: {source: digits, variant: shifted}
lora:
  enabled: true
  r: 8
  lora_alpha: 24
  lora_dropout: 0.05
  target_modules: [query, value]
  bias: none
quantization:
  enabled: true
  bnb_4bit_quant_type: fp4
  bnb_4bit_use_double_quant: false
  bnb_4bit_compute_dtype: bfloat16
  skip_modules: [dense]
  mode: manual
"""

FLAT = """\
name: python-qlora
task: causal-lm
base: {path: runs/python-base}
data: {source: python-docstrings}
qlora_r: 64
qlora_lora_alpha: 16
qlora_dropout: 0.05
"""

HEATMAP = """\
model_name: "vit_lora_heatmap"
base: {path: runs/tennis-base}
data: {source: tracknet, path: clips}
lora:
  enabled: true
  r: 16
  lora_alpha: 32
  lora_dropout: 0.05
  target_modules: ["query", "key", "value", "dense"]
quantization:
  enabled: true
  quant_type: "nf4"
  compute_dtype: "bfloat16"
  skip_modules: ["pooler.dense"]
  mode: "manual"
"""


@pytest.fixture
def read(tmp_path):
    """Load a recipe from its text."""

    def load(text, *overrides):
        (tmp_path / "recipe.yaml").write_text(text)
        return load_recipe(tmp_path / "recipe.yaml", overrides)

    return load


def test_sections_of_other_names_mean_the_same(read):
    assert read(SECTIONS) == read(OURS)
    assert read(SECTIONS).digest == read(OURS).digest


def test_a_recipe_of_ours_is_left_as_it_is(read):
    assert read(OURS).adapter.alpha == 24


@pytest.mark.parametrize("section", ["lora", "quantization"])
def test_a_section_switched_off_is_as_none(read, section):
    switched = SECTIONS.replace(f"{section}:\n  enabled: true", f"{section}:\n  enabled: false")
    if section == "lora":  # a quantized base needs an adapter
        switched = switched.replace(
            "quantization:\n  enabled: true", "quantization:\n  enabled: false"
        )
    recipe = read(switched)
    assert recipe.quantization is None
    assert (recipe.adapter is None) == (section == "lora")


def test_flat_settings_are_qlora_in_nf4(read):
    recipe = read(FLAT)
    assert (recipe.adapter.rank, recipe.adapter.alpha, recipe.adapter.dropout) == (64, 16, 0.05)
    found = recipe.quantization
    assert (found.quant_type, found.double_quant, found.compute_dtype) == ("nf4", True, "bfloat16")


def test_flat_settings_leave_a_quantization_of_its_own(read):
    assert read(FLAT + "quantization: {quant_type: fp4}\n").quantization.quant_type == "fp4"


def test_a_heatmap_model_by_its_name(read):
    recipe = read(HEATMAP)
    assert recipe.task == "heatmap"
    assert recipe.name == "vit_lora_heatmap"
    assert recipe.adapter.target_modules == ("query", "key", "value", "dense")
    assert recipe.quantization.skip_modules == ()  # the backbone of heatmap models has no pooler


def test_overrides_may_use_either_name(read):
    for override in ("lora.r=4", "adapter.rank=4", "adapter.r=4", "qlora_r=4"):
        assert read(SECTIONS, override).adapter.rank == 4
        assert read(OURS, override).adapter.rank == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SECTIONS.replace("  r: 8", "  r: 8\n  rank: 9"), r"line 7: 'adapter.r' .*'adapter.rank', .*8 sets too"),
        (SECTIONS + "adapter: {rank: 8}\n", r"line 5: 'lora' is another name of 'adapter'"),
        (OURS + "model_name: other\n", r"line 17: 'model_name' is another name of 'name'"),
        (SECTIONS.replace("enabled: true\n  r", "enabled: 1\n  r"), r"line 6: adapter.enabled: true or false"),
        (SECTIONS.replace("r: 8", "r: -8"), r"line 7: adapter.rank: .*greater than 0"),
        (SECTIONS.replace("lora_alpha", "lora_alfa"), r"line 8: unknown field 'adapter.lora_alfa'"),
        (FLAT.replace("qlora_r: 64", "qlora_r: many"), r"line 5: adapter.rank: .*integer"),
    ],
)  # fmt: skip
def test_errors_name_the_line_of_the_file(read, text, message):
    with pytest.raises(RecipeError, match=message):
        read(text)
