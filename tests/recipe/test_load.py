"""Recipes: strict YAML, typed fields, and errors that name file, line and field."""

import re
from pathlib import Path

import pytest

from qlx.errors import RecipeError, UsageError
from qlx.recipe import Recipe, load_recipe

TEXT = """\
name: digits-qlora
task: image-classification
base:
  path: runs/digits-base
data: {source: digits, variant: shifted}
adapter:
  rank: 8
  target_modules: [query, value]
quantization:
  quant_type: nf4
training:
  learning_rate: 2e-3
"""


def recipe_file(tmp_path: Path, text: str = TEXT) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


def test_a_good_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path))
    assert recipe.adapter is not None and recipe.quantization is not None
    assert recipe.adapter.target_modules == ("query", "value")
    assert recipe.training.learning_rate == 2e-3
    assert recipe.quantization.double_quant


def test_digest_ignores_comments_and_layout_but_not_content(tmp_path: Path) -> None:
    first = load_recipe(recipe_file(tmp_path)).digest
    assert (
        load_recipe(
            recipe_file(
                tmp_path,
                "# note\n"
                + TEXT.replace("  rank: 8", "    rank:   8").replace("  target", "    target"),
            )
        ).digest
        == first
    )
    assert load_recipe(recipe_file(tmp_path), ["adapter.rank=9"]).digest != first


def test_overrides_apply_and_are_named_in_errors(tmp_path: Path) -> None:
    recipe = load_recipe(
        recipe_file(tmp_path),
        ["training.max_steps=3", "adapter.target_modules=[a, b]", "probe.count=4"],
    )
    assert (recipe.training.max_steps, recipe.probe.count) == (3, 4)
    with pytest.raises(RecipeError, match=r"--set: adapter\.rank"):
        load_recipe(recipe_file(tmp_path), ["adapter.rank=none"])
    with pytest.raises(RecipeError, match=r"--set 'task\.x=1': 'task' is not"):
        load_recipe(recipe_file(tmp_path), ["task.x=1"])
    for text in ("rank", "=3", "adapter..rank=1"):
        with pytest.raises(UsageError, match=f"--set '{text}': write it as"):
            load_recipe(recipe_file(tmp_path), [text])


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("rank: 8", "rnak: 8", r"line 7: unknown field 'adapter.rnak'; did you mean 'rank'"),
        ("rank: 8", "rank: eight", r"line 7: adapter\.rank: .*integer.*'eight'"),
        ("rank: 8", "rank: 0", r"line 7: adapter\.rank: should be greater than 0"),
        ("nf4", "nf5", r"line 10: quantization\.quant_type: should be 'nf4', .* or 'ternary'"),
        (
            "[query, value]",
            "[query, 3]",
            r"line 8: adapter\.target_modules\.1: should be a valid string",
        ),
        (
            "[query, value]",
            "3",
            r"line 8: adapter\.target_modules: should be 'auto' or .*list of names",
        ),
        ("task: image-classification\n", "", "field 'task' is missing"),
        ("image-classification", "causal-lm", "does not fit task"),
        ("  path: runs/digits-base", "  revision: x", r"line 3: base: give exactly one of"),
        (
            "adapter:\n  rank: 8\n  target_modules: [query, value]\n",
            "",
            "needs? a|without an adapter",
        ),
        ("rank: 8", "rank: 8\n  rank: 9", "line 8: field 'rank' appears twice"),
        ("rank: 8", "rank: &a 8", "anchors and aliases"),
        ("rank: 8", "rank: !!python/name:os.system 8", "not allowed"),
        ("rank: 8", "? [1]\n  : 8", "plain text"),
        ("rank: 8", "rank: .inf", "adapter.rank"),
        ("data: {", "data: {{", "not YAML|plain text"),
        ("learning_rate: 2e-3", "learning_rate: -1", "greater than 0"),
        ("learning_rate: 2e-3", "seed: -1", "training.seed: should be greater than or equal to 0"),
        (
            "learning_rate: 2e-3",
            "seed: 4294967296",
            "training.seed: should be less than 4294967296",
        ),
        ("variant: shifted", "variant: shifted, seed: -1", "data.seed: should be greater"),
    ],
)
def test_errors_name_file_line_and_field(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert old in TEXT
    with pytest.raises(RecipeError, match=says) as error:
        load_recipe(recipe_file(tmp_path, TEXT.replace(old, new)))
    assert str(error.value).startswith(str(tmp_path / "r.yaml"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["dtype: bfloat16", "revision: main"])
def test_a_model_from_scratch_takes_no_dtype_or_revision(tmp_path: Path, field: str) -> None:
    scratch = f"from_scratch: {{model_type: vit}}\n  {field}"
    text = TEXT.replace(
        next(line.strip() for line in TEXT.splitlines() if "path:" in line), scratch
    )
    with pytest.raises(
        RecipeError, match=rf"base\.{field.split(':')[0]}: .*made in float32: leave it out"
    ):
        load_recipe(recipe_file(tmp_path, text))


def test_bombs_and_binaries_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    for data in (b"\xff\xfe", b"a" * (2**20 + 1), b"[" * 5000, b"- x", b""):
        path.write_bytes(data)
        with pytest.raises(RecipeError):
            load_recipe(path)
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("(layers)+.q_proj", "a repeated group"),
        (r"\\d+\\.\\w+\\.\\w+\\.\\w*q_proj", "more than 3 of"),
        ("q" * 301, "longer than 300"),
    ],
)
def test_a_pattern_that_no_reader_of_the_adapter_would_match_is_refused_before_training(
    tmp_path: Path, pattern: str, says: str
) -> None:
    path = recipe_file(tmp_path, TEXT.replace("rank: 8", f'rank_pattern: {{"{pattern}": 3}}'))
    with pytest.raises(RecipeError, match=rf"line 7: adapter\.rank_pattern.*{says}"):
        load_recipe(path)
    usual = TEXT.replace("rank: 8", r'rank_pattern: {"(model\\.)?layers\\.[01]\\.q_proj": 3}')
    assert load_recipe(recipe_file(tmp_path, usual)).adapter is not None


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_is_no_regular_expression_is_named(tmp_path: Path, field: str) -> None:
    path = recipe_file(tmp_path, TEXT.replace("rank: 8", f'{field}: {{"(": 3}}'))
    with pytest.raises(
        RecipeError, match=rf"line 7: adapter\.{field}.*'\('.*no regular expression"
    ):
        load_recipe(path)


LANGUAGE = TEXT.replace("image-classification", "causal-lm").replace(
    "{source: digits, variant: shifted}", "{source: python-docstrings}"
)
PLAIN = LANGUAGE.replace("quantization:\n  quant_type: nf4\n", "")


@pytest.mark.parametrize(
    ("text", "field", "message"),
    [
        (TEXT, "init_lora_weights: pisa", "should be 'default', 'gaussian', 'pissa' or 'loftq' or"),
        (
            TEXT,
            "init_lora_weights: false",
            "should be 'default', 'gaussian', 'pissa' or 'loftq' or",
        ),
        (TEXT, "init_lora_weights: pissa_niter_0", "should be 'default', 'gaussian', 'pissa' or"),
        (TEXT, "init_lora_weights: pissa, use_dora: true", "pissa does not work with use_dora"),
        (TEXT, "init_lora_weights: loftq, use_dora: true", "loftq does not work with use_dora"),
        (PLAIN, "init_lora_weights: loftq", "loftq makes up for what quantization takes"),
        (TEXT, "alpha: 8, type: vera", "does not apply to an adapter of type 'vera'"),
        (TEXT, "use_rslora: true, type: vera", "does not apply to an adapter of type 'vera'"),
        (
            TEXT,
            "init_lora_weights: pissa, type: vera",
            "does not apply to an adapter of type 'vera'",
        ),
        (TEXT, "rank_pattern: {a: 2}, type: vera", "does not apply to an adapter of type 'vera'"),
        (LANGUAGE, "new_tokens: [a], type: vera", "does not apply to an adapter of type 'vera'"),
        (TEXT, "d_initial: 0.2", "does not apply to an adapter of type 'lora'"),
        (TEXT, "projection_prng_key: 1", "does not apply to an adapter of type 'lora'"),
        (TEXT, "new_tokens: [a]", "are for language models, not for image-classification"),
        (LANGUAGE, "new_tokens: [a, b, a]", "names a token twice"),
    ],
)
def test_adapters_that_do_not_go_with_the_rest_name_file_line_and_field(
    text: str, field: str, message: str, tmp_path: Path
) -> None:
    name = field.partition(":")[0]
    written = "".join(f"  {part}\n" for part in re.split(r", (?=\w+:)", field))
    file = recipe_file(tmp_path, text.replace("  rank: 8\n", f"  rank: 8\n{written}"))
    with pytest.raises(RecipeError) as error:
        load_recipe(file)
    told = str(error.value)
    lines = file.read_text().splitlines()
    line = next(at for at, read in enumerate(lines, 1) if read.startswith(f"  {name}:"))
    assert told.startswith(f"{file}: line {line}: adapter.{name}: {message}"), told


@pytest.mark.parametrize(
    ("fields", "rank", "start", "iterations"),
    [
        ("init_lora_weights: true", 8, "default", None),
        ("init_lora_weights: gaussian", 8, "gaussian", None),
        ("init_lora_weights: pissa", 8, "pissa", None),
        ("init_lora_weights: pissa_niter_16", 8, "pissa", 16),
        ("init_lora_weights: loftq", 8, "loftq", None),
        ("init_lora_weights: pissa\n  use_rslora: true", 8, "pissa", None),
        ("type: vera\n  bias: lora_only\n  d_initial: 0.5", 8, "default", None),
    ],
)
def test_ways_to_begin_are_named_as_peft_names_them(
    fields: str, rank: int, start: str, iterations: int | None, tmp_path: Path
) -> None:
    text = TEXT.replace("  rank: 8\n", f"  rank: 8\n  {fields}\n")
    adapter = load_recipe(recipe_file(tmp_path, text)).adapter
    assert adapter is not None
    assert (adapter.rank, adapter.initialisation, adapter.svd_iterations) == (
        rank,
        start,
        iterations,
    )


def test_veras_rank_is_of_another_size_and_a_dumped_recipe_reads_the_same(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path, TEXT.replace("rank: 8", "type: vera")))
    assert recipe.adapter is not None and recipe.adapter.rank == 256
    again = Recipe.model_validate(recipe.content())
    assert again.digest == recipe.digest
