"""Held-out evaluation while a model trains: which weights are kept, when it ends, and that a kill changes nothing."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import qlx.training.run
from qlx.recipe import TrainingSection
from qlx.training import train
from qlx.training.distributed import Process
from qlx.training.evaluation import HeldOut, Measured, measure
from qlx.training.job import prepare
from qlx.training.progress import read_metrics
from qlx.training.trainers import StrictTrainer
from qlx.verification import evaluate
from tests.conftest import DIGITS_RUN, recipe_of
from tests.training.test_resume import _digests, _run

STOPPING = {
    "max_steps": 60,
    "batch_size": 16,
    "learning_rate": 5e-2,
    "schedule": "constant",
    "warmup_ratio": 0.0,  # so that a step is the same however many are to come
    "save_every": 4,
    "log_every": 3,
    "eval_every": 4,
    "early_stopping_patience": 3,
}


def stopping(base, **training):
    data = {**DIGITS_RUN["data"], "train_limit": 144, "eval_limit": 40}
    adapter = {"rank": 2, "alpha": 3, "dropout": 0.1}
    section = {**STOPPING, **training}
    return recipe_of(DIGITS_RUN, base, data=data, adapter=adapter, training=section)


@pytest.fixture(scope="module")
def stopped(digits_base, tmp_path_factory):
    """A run whose held-out loss got worse again: its path, and what it says of that."""
    run = train(stopping(digits_base), tmp_path_factory.mktemp("stopped") / "run")
    return run.path, run.manifest.lineage[-1].options


def interrupt(recipe, output, monkeypatch, step=None):
    """Train until `step`, or until all is trained and nothing written."""
    inner = StrictTrainer.training_step

    def dying(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return inner(self, *args, **kwargs)

    def not_written(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StrictTrainer, "training_step", dying)
        patch.setattr(qlx.training.run, "_write_run", not_written)
        train(recipe, output)
    assert not output.exists()


def test_the_best_weights_are_the_result(stopped, digits_base):
    path, options = stopped
    curve = {
        row["step"]: row["eval_loss"]
        for row in read_metrics(path / "metrics.jsonl")
        if "eval_loss" in row
    }
    found = options["held_out"]
    best = min(list(curve)[1:], key=curve.get)
    assert list(curve) == list(range(0, options["steps"] + 1, 4))
    assert found["kept_step"] == found["best_step"] == best == options["steps"] - 12
    assert 4 < best < options["steps"] < 60
    assert found["ended"] == "no lower held-out loss in 3 evaluations"
    assert options["after"]["loss"] == pytest.approx(curve[best], rel=1e-6)
    assert curve[0] == pytest.approx(options["before"]["loss"], rel=1e-6)
    data = stopping(digits_base).data
    metrics = evaluate(path, base=digits_base, data=data).metrics
    assert metrics["loss"] == pytest.approx(curve[best], rel=1e-6)
    assert abs(curve[options["steps"]] - curve[best]) > 1e-3  # the last weights were others
    page = (path / "report.html").read_text("utf-8")
    assert f"<code>{best}</code>" in page
    assert "no lower held-out loss in 3 evaluations" in page


@pytest.mark.parametrize(
    "where",
    [
        "after the best step",
        "at the end",
        pytest.param("before the best step", marks=pytest.mark.exhaustive),
        pytest.param("before an evaluation", marks=pytest.mark.exhaustive),
    ],
)
def test_an_interruption_changes_nothing(stopped, digits_base, tmp_path, monkeypatch, where):
    path, options = stopped
    best = options["held_out"]["best_step"]
    steps = {"after the best step": best + 6, "at the end": None, "before the best step": best - 2}
    recipe, output = stopping(digits_base), tmp_path / "run"
    interrupt(recipe, output, monkeypatch, steps.get(where, best - 1))
    run = train(recipe, output, resume=True)
    assert _digests(output) == _digests(path)
    assert run.manifest.lineage[-1].options == options
    steps = [row["step"] for row in read_metrics(output / "metrics.jsonl")]
    assert steps == [row["step"] for row in read_metrics(path / "metrics.jsonl")]


@pytest.mark.exhaustive
def test_a_kill_changes_nothing(stopped, digits_base, tmp_path):
    """By SIGKILL, in processes of their own."""
    recipe, output = stopping(digits_base), tmp_path / "run"
    assert _run(recipe, output, stopped[1]["held_out"]["best_step"] + 6) != 0
    assert _run(recipe, output, resume=True) == 0
    names = ("adapter_model.safetensors",)
    assert _run(recipe, tmp_path / "whole") == 0
    assert _digests(output, names) == _digests(tmp_path / "whole", names)


def test_the_last_weights_where_asked_for(stopped, digits_base, tmp_path):
    """The comparison of bytes above can fail; a longer training kept the same step before."""
    path, options = stopped
    section = {"keep_best": False, "early_stopping_patience": None, "max_steps": options["steps"]}
    run = train(stopping(digits_base, **section), tmp_path / "run")
    found = run.manifest.lineage[-1].options["held_out"]
    assert (found["kept_step"], found["best_step"]) == (
        options["steps"],
        options["held_out"]["best_step"],
    )
    assert found["ended"] == "all steps were taken"
    assert _digests(run.path) != _digests(path)


def test_looking_changes_no_step(digits_base, tmp_path):
    """Held-out evaluation takes no random numbers and moves no statistics."""
    off = {"eval_every": None, "early_stopping_patience": None}
    few = {"max_steps": 9, "save_every": 100}
    train(stopping(digits_base, **few, **off), tmp_path / "off")
    train(stopping(digits_base, **few, keep_best=False), tmp_path / "on")
    names = ("adapter_model.safetensors",)
    assert _digests(tmp_path / "on", names) == _digests(tmp_path / "off", names)


def test_patience_counts_evaluations_since_the_best():
    losses = iter([3.0, 2.0, 2.0, 2.5, float("nan"), 1.0])
    section = TrainingSection(eval_every=10, early_stopping_patience=3)
    held_out = HeldOut(lambda: Measured({}, next(losses)), section, Process())
    model = torch.nn.Linear(1, 1)
    seen = []
    for step in range(10, 60, 10):
        with torch.no_grad():
            model.weight.fill_(step)
        held_out.look(step, model)
        seen.append((held_out.best_step, held_out.enough))
    assert seen == [(10, False), (20, False), (20, False), (20, False), (20, True)]
    held_out.restore(model)
    assert model.weight.item() == 20
    assert [held_out.due(step, 25) for step in (10, 19, 25)] == [True, False, True]


@pytest.mark.parametrize("seen", [False, True])
def test_what_is_remembered_reads_back(tmp_path, seen):
    """Before and after the first evaluation."""
    section = TrainingSection(eval_every=10)
    first, second = (HeldOut(lambda: Measured({}, 0.5), section, Process()) for _ in "ab")
    if seen:
        first.look(10, torch.nn.Linear(3, 2))
    first.save(tmp_path)
    second.load(tmp_path)
    for name in ("best_step", "best_loss", "since"):
        assert getattr(second, name) == getattr(first, name)
    assert second.weights.keys() == first.weights.keys() == ({"weight", "bias"} if seen else set())
    assert all(torch.equal(second.weights[name], value) for name, value in first.weights.items())
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize(
    ("section", "match"),
    [
        ({"early_stopping_patience": 2}, "early_stopping_patience needs eval_every"),
        ({"keep_best": False}, "keep_best needs eval_every"),
    ],
)
def test_fields_that_need_evaluations(section, match):
    with pytest.raises(ValidationError, match=match):
        TrainingSection(**section)


@dataclasses.dataclass(frozen=True)
class _Half(Process):
    """One of two processes, after the other."""

    parts: list[Any] = dataclasses.field(default_factory=list)

    def gather(self, value):
        self.parts.append(json.loads(json.dumps(value)))
        return self.parts


def test_shares_add_up_to_the_whole(digits_base, tennis_base, tennis_clips, tmp_path):
    """Two processes that see half the batches each find what one finds; one half alone is something else."""
    clips = {"source": "tracknet", "path": str(tennis_clips / "bright"), "sigma": 1.5}
    heat = recipe_of(DIGITS_RUN, tennis_base, task="heatmap", data=clips, quantization=None)
    for recipe in (stopping(digits_base), heat):
        job = prepare(recipe, tmp_path, lambda line: None)
        whole = measure(job, Process())
        parts: list[Any] = []
        for rank in (0, 1):
            found = measure(job, _Half(rank, 2, parts))
            if rank == 0:
                assert found.loss != pytest.approx(whole.loss, rel=1e-6)
        assert found.loss == pytest.approx(whole.loss, rel=1e-6)
        assert found.metrics == pytest.approx(whole.metrics, rel=1e-6)
