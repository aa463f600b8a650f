"""Recipes that train on ternary, int4 and int8 bases, and on bases that come as codes, to the end."""

import json
import shutil

import pytest

from qlx.checkpoint import open_checkpoint
from qlx.errors import RecipeError, Unsupported
from qlx.merging import merge
from qlx.recipe import load_recipe
from qlx.training import check, train
from qlx.verification import verify
from tests.coded_support import encode
from tests.conftest import DIGITS_RUN, PYTHON_RUN, recipe_of

SECTIONS = {
    "ternary": {"quant_type": "ternary", "group_size": 64},
    "int4": {"quant_type": "int4", "group_size": 32, "symmetric": False},
    "int8": {"quant_type": "int8"},
}
SHORT = {"max_steps": 12, "batch_size": 16, "learning_rate": 5e-3}


def losses(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


@pytest.mark.parametrize("name", SECTIONS)
def test_a_recipe_trains_on_an_integer_base_and_the_merge_is_exact(name, digits_base, tmp_path):
    recipe = recipe_of(
        DIGITS_RUN, digits_base, quantization=SECTIONS[name], training={**SHORT, "log_every": 1}
    )
    run = train(recipe, tmp_path / "run")
    spec = run.manifest.quantization
    assert (spec.scheme, spec.backend) == (name, "qlx")
    assert len(spec.tensors) == 12
    assert f"w{spec.weight_bits}-{name}" in run.manifest.tag
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    merged = merge(str(digits_base), [run.path], tmp_path / "merged", dtype="float32")
    assert merged.manifest.lineage[-1].options["exact"]
    assert verify(merged.path).passed
    assert verify(run.path, base=str(digits_base)).passed


@pytest.mark.parametrize(
    "kind", ["gptq", pytest.param("awq", marks=pytest.mark.exhaustive), "bitnet"]
)
def test_a_recipe_trains_on_codes_as_they_are(kind, python_base, tmp_path):
    base = tmp_path / "coded"
    shutil.copytree(python_base, base, ignore=shutil.ignore_patterns("qlx.json"))
    encode(base, kind)
    recipe = recipe_of(PYTHON_RUN, base, quantization=None, training=SHORT)
    assert len(check(recipe).quantized) == 14
    run = train(recipe, tmp_path / "run")
    assert run.manifest.quantization.backend == kind
    assert len(run.manifest.quantization.tensors) == 14
    merged = merge(str(base), [run.path], tmp_path / "merged", dtype="float32")
    assert verify(open_checkpoint(merged.path).path).passed
    with pytest.raises(Unsupported, match="stay as they are; leave out"):
        train(recipe_of(PYTHON_RUN, base, training=SHORT), tmp_path / "again")
    with pytest.raises(Unsupported, match="stay as they are; leave out"):
        check(recipe_of(PYTHON_RUN, base, training=SHORT))


TEXT = """\
name: t
task: image-classification
base: {path: base}
data: {source: digits}
adapter: {rank: 4}
quantization:
  quant_type: TYPE
"""


@pytest.mark.parametrize(
    ("kind", "line", "says"),
    [
        ("int8", "block_size: 128", "block_size does not apply to quant_type 'int8'"),
        ("int4", "double_quant: true", "double_quant does not apply to quant_type 'int4'"),
        ("ternary", "mode: hf", "mode does not apply to quant_type 'ternary'"),
        ("ternary", "symmetric: false", "symmetric does not apply to quant_type 'ternary'"),
        ("int8", "activation_bits: 8", "activation_bits does not apply to quant_type 'int8'"),
        ("nf4", "group_size: 64", "group_size does not apply to quant_type 'nf4'"),
        ("fp4", "scale_dtype: float16", "scale_dtype does not apply to quant_type 'fp4'"),
        ("int4", "group_size: 0", r"group_size"),
    ],
)
def test_fields_that_do_not_fit_the_type_are_refused(kind, line, says, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(TEXT.replace("TYPE", kind))
    load_recipe(path)
    with pytest.raises(RecipeError, match=says):
        load_recipe(path, [f"quantization.{line.replace(': ', '=')}"])


@pytest.mark.parametrize(
    ("kind", "lines", "shares"),
    [
        ("nf4", "", 64),
        ("int8", "", None),
        ("ternary", "", 128),
        ("int4", "  group_size: 32\n", 32),
        ("ternary", "  group_size: whole\n  activation_bits: 8\n", None),
    ],
)
def test_values_that_share_a_scale(kind, lines, shares, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(TEXT.replace("TYPE", kind) + lines)
    section = load_recipe(path).quantization
    assert section.values_per_scale == shares
    assert section.double_quant is (kind == "nf4")
    content = load_recipe(path).content()
    assert type(load_recipe(path)).model_validate(content).content() == content
