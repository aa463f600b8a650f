"""Scores of every kind on the data its recipe recorded, against those that training measured."""

import shutil

import pytest
import torch

from qlx.checkpoint import open_checkpoint, read_manifest, seal
from qlx.errors import CheckFailed, InputRefused, Mismatch
from qlx.merging import merge
from qlx.packing import pack
from qlx.recipe import DataSection
from qlx.verification import evaluate, recorded_data, verify
from qlx.weights import read_tensors, write_tensors

NAMES = {"digits": "accuracy", "python": "token_accuracy"}


@pytest.fixture(scope="module", params=NAMES)
def made(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    base, run = (request.getfixturevalue(f"{request.param}_{part}") for part in ("base", "run"))
    merged = merge(base, [run], root / "merged")
    packed = pack(merged.path, root / "packed", to="nf4", min_retention=0)
    return base, run, merged.path, packed.path


def training_step(path):
    return open_checkpoint(path).manifest.lineage[-1]


def test_a_run_scores_what_training_measured(made):
    base, run, _, _ = made
    options = training_step(run).options
    result = evaluate(run, base=base)
    assert result.metrics == pytest.approx(options["after"], rel=1e-6)
    assert result.count > 30
    assert result.source == recorded_data(open_checkpoint(run)).source


def test_a_base_scores_on_its_own_data(made):
    base, *_ = made
    assert evaluate(base).metrics == pytest.approx(training_step(base).options["after"], rel=1e-6)


def test_the_base_on_the_adapters_data_is_worse(made):
    base, run, _, _ = made
    data = recorded_data(open_checkpoint(run))
    before = evaluate(base, data=data).metrics
    assert before["loss"] > evaluate(run, base=base).metrics["loss"] * 1.05


def test_a_merge_scores_the_same_and_a_pack_about_the_same(made):
    base, run, merged, packed = made
    unmerged = evaluate(run, base=base)
    exact, lossy = evaluate(merged), evaluate(packed)
    assert exact.count == lossy.count == unmerged.count
    assert exact.metrics["loss"] == pytest.approx(unmerged.metrics["loss"], rel=1e-5)
    assert lossy.metrics["loss"] == pytest.approx(unmerged.metrics["loss"], rel=0.2)
    assert lossy.metrics["loss"] != pytest.approx(unmerged.metrics["loss"], rel=1e-6)


def test_the_batch_size_does_not_matter(made):
    _, _, merged, _ = made
    whole, parts = evaluate(merged), evaluate(merged, batch_size=7)
    assert parts.metrics == pytest.approx(whole.metrics, rel=1e-5)


def test_a_recipe_names_other_data(made):
    base, run, _, _ = made
    recipe = base / "recipe.yaml"
    assert evaluate(base, data=recipe).metrics == pytest.approx(evaluate(base).metrics)
    assert evaluate(base, data=run / "recipe.yaml").metrics["loss"] > evaluate(base).metrics["loss"]


def test_data_of_another_task_are_refused_as_such(made):
    """By `eval`, and by `verify --data`."""
    base, run, merged, _ = made
    source = (
        "python-docstrings" if recorded_data(open_checkpoint(run)).source == "digits" else "digits"
    )
    data = DataSection(source=source)
    said = r"a checkpoint for \S+, and the data \(" + source
    with pytest.raises(Mismatch, match=said):
        evaluate(run, base=base, data=data)
    with pytest.raises(Mismatch, match=said):
        verify(merged, against=run, base=base, data=data)


def test_without_recorded_data_some_must_be_named(made, tmp_path):
    path = shutil.copytree(made[2], tmp_path / "merged")
    seal(path, read_manifest(path)[0].model_copy(update={"lineage": ()}))
    with pytest.raises(InputRefused, match="--data"):
        evaluate(path)


def test_a_broken_model_has_no_score(made, tmp_path):
    path = shutil.copytree(made[2], tmp_path / "merged")
    tensors = read_tensors(path)
    name = next(name for name in tensors if name in ("classifier.weight", "lm_head.weight"))
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    write_tensors(path / "model.safetensors", tensors)
    seal(path, read_manifest(path)[0])
    with pytest.raises(CheckFailed, match="not finite"):
        evaluate(path)
