"""The dry run: what it finds without weights, and that it says what it could not look at."""

from pathlib import Path

import pytest

from qlx.errors import InputRefused, Mismatch, Unsupported
from qlx.planning import plan_recipe
from qlx.recipe import load_recipe
from qlx.training import check, parameter_table, train
from tests.conftest import DIGITS_BASE, DIGITS_RUN, PYTHON_BASE, PYTHON_RUN, recipe_of

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_ours(path, digits_base, python_base, tennis_base, tennis_clips):
    built_in = {
        "runs/digits-base": digits_base,
        "runs/python-base": python_base,
        "runs/tennis-base": tennis_base,
    }
    drawn = [f"data.path={tennis_clips / 'dim'}", "data.frames=1"] if "tennis" in path.stem else []
    recipe = load_recipe(path, drawn)
    name = recipe.base.path
    if name in built_in:
        recipe = load_recipe(path, [*drawn, f"base.path={built_in[name]}"])
    found = check(recipe)
    assert plan_recipe(recipe).total > 0  # which `train --dry-run` prints beside it
    assert found.train_examples > found.eval_examples > 0
    if name is None or name in built_in:
        assert found.base_found
        assert not found.unchecked
        assert bool(found.adapted) == (recipe.adapter is not None)
    else:
        assert not found.base_found
        assert "not found locally" in found.unchecked[0]
        assert found.trained_parameters is None


def test_counts_are_those_of_training(digits_run, digits_base):
    from qlx.checkpoint import open_checkpoint

    manifest = open_checkpoint(digits_run).manifest
    found = check(recipe_of(DIGITS_RUN, digits_base))
    assert sorted(found.quantized) == sorted(manifest.quantization.modules)
    assert set(found.adapted) == set(manifest.adapter.tensors)
    assert found.trained_parameters == manifest.adapter.trained_parameters
    assert found.total_parameters == manifest.adapter.total_parameters
    assert found.tag == manifest.tag


@pytest.mark.parametrize(("limits", "counts"), [((50, 7), (50, 7)), ((10**6, None), None)])
def test_limits_count(limits, counts, python_base):
    data = {**PYTHON_RUN["data"], "train_limit": limits[0], "eval_limit": limits[1]}
    found = check(recipe_of(PYTHON_RUN, python_base, data=data))
    if counts is None:
        whole = {"source": PYTHON_RUN["data"]["source"], "max_length": 64}
        free = check(recipe_of(PYTHON_RUN, python_base, data=whole))
        counts = free.train_examples, free.eval_examples
        assert 50 < counts[0] < 10**6
    assert (found.train_examples, found.eval_examples) == counts


def test_model_built_from_nothing():
    from qlx.models import Labels, build_config, build_model

    recipe = recipe_of(DIGITS_BASE)
    config = build_config(recipe.base.from_scratch, labels=Labels(tuple("0123456789")))
    table = parameter_table(build_model("image-classification", config, seed=0))
    assert check(recipe).trained_parameters == table.trained == table.total


@pytest.mark.parametrize(
    ("sections", "match"),
    [
        ({"adapter": {"target_modules": ["q_porj"]}}, "q_porj"),
        ({"adapter": {"modules_to_save": ["classifer"]}}, "classifer"),
        ({"adapter": {"rank_pattern": {"nothing": 2}}}, "nothing"),
        ({"quantization": {"skip_modules": ["layer.99"]}}, "layer.99"),
    ],
)
def test_names_that_match_nothing_are_told(sections, match, digits_base):
    with pytest.raises(Unsupported, match=match):
        check(recipe_of(DIGITS_RUN, digits_base, **sections))


def test_texts_longer_than_the_context_are_told(python_base, tmp_path):
    data = {**PYTHON_RUN["data"], "max_length": 129}
    long = recipe_of(PYTHON_RUN, python_base, data=data)
    for attempt in (check, lambda recipe: train(recipe, tmp_path / "run")):
        with pytest.raises(
            Mismatch, match=r"max_length is 129\), and .*config\.json is 128: lower"
        ):
            attempt(long)
    packed = recipe_of(PYTHON_RUN, python_base, data=data, training={"packing": True})
    check(packed)  # a row of several texts may be longer
    path = tmp_path / "long.csv"
    path.write_text("text\n" + "\n".join("word " * 400 for _ in range(4)))
    text = {"source": "text", "path": str(path), "max_length": 129}
    with pytest.raises(Mismatch, match="texts may have 129 tokens"):
        train(
            recipe_of(PYTHON_RUN, python_base, data=text, training={"packing": True}),
            tmp_path / "run",
        )
    start = {"from_scratch": {**PYTHON_BASE["base"]["from_scratch"], "max_length": 60}}
    with pytest.raises(Mismatch, match=r"\), and base\.from_scratch\.max_length is 60"):
        check(recipe_of({**PYTHON_BASE, "base": start}))


def test_a_rank_above_every_targets_is_told(digits_base):
    with pytest.raises(Unsupported, match=r"adapter\.rank: 65 .*\(64\)"):
        check(recipe_of(DIGITS_RUN, digits_base, adapter={"rank": 65}))
    assert check(recipe_of(DIGITS_RUN, digits_base, adapter={"rank": 64})).adapted
    vera = {"rank": 128, "type": "vera"}
    assert check(recipe_of(DIGITS_RUN, digits_base, adapter=vera)).adapted


def test_missing_data_and_bases_are_told(digits_base, python_base, tmp_path):
    text = {"source": "text", "path": str(tmp_path / "none.jsonl")}
    with pytest.raises(InputRefused, match=r"none\.jsonl"):
        check(recipe_of(PYTHON_RUN, python_base, data=text))
    with pytest.raises(InputRefused, match="no such directory"):
        check(recipe_of(DIGITS_RUN, tmp_path / "nowhere"))
    with pytest.raises(Unsupported, match="llama"):
        check(recipe_of(DIGITS_RUN, python_base))


def test_a_hub_model_in_the_cache_is_used(digits_base, tmp_path, monkeypatch):
    import shutil

    import huggingface_hub.constants
    import huggingface_hub.file_download

    cache = tmp_path / "hub"
    snapshot = cache / "models--someone--vit" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(digits_base / name, snapshot / name)
    (cache / "models--someone--vit" / "refs").mkdir()
    (cache / "models--someone--vit" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.file_download, "HF_HUB_CACHE", str(cache), raising=False)
    recipe = recipe_of(DIGITS_RUN)
    found = check(
        recipe.model_copy(update={"base": recipe.base.model_copy(update={"path": "someone/vit"})})
    )
    assert found.base_found
    assert found.adapted
