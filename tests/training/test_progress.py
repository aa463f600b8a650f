"""Where the numbers of a training go besides `metrics.jsonl`."""

import subprocess
import sys

import pytest

from qlx.errors import MissingExtra
from qlx.recipe import TrainingSection
from qlx.training import check, train
from qlx.training.progress import memory, progress_callback, read_metrics, reporting_callbacks
from tests.conftest import DIGITS_RUN, recipe_of

FEW = {"max_steps": 4, "batch_size": 8, "log_every": 2, "eval_every": 2}


def reporting(base, *names):
    data = {**DIGITS_RUN["data"], "train_limit": 48, "eval_limit": 16}
    return recipe_of(DIGITS_RUN, base, data=data, training={**FEW, "report_to": names})


def test_tensorboard_gets_the_same_numbers(digits_base, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = train(reporting(digits_base, "tensorboard"), tmp_path / "run")
    (place,) = (tmp_path / "run-tensorboard").iterdir()
    found = events.EventAccumulator(str(place))
    found.Reload()
    rows = read_metrics(run.path / "metrics.jsonl")
    for tag, name in (("train/loss", "loss"), ("eval/loss", "eval_loss")):
        written = {event.step: event.value for event in found.Scalars(tag)}
        expected = {row["step"]: row[name] for row in rows if name in row and row["step"]}
        assert written == pytest.approx(expected, rel=1e-6)
    assert not [path for path in run.path.iterdir() if "tfevents" in path.name]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_what_is_not_installed_is_one_sentence(name, digits_base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    for act in (check, lambda recipe: train(recipe, tmp_path / "run")):
        with pytest.raises(MissingExtra, match=rf"{name} is not installed.*qlx\[{name}\]"):
            act(reporting(digits_base, name))
    assert not list(tmp_path.iterdir())


def test_nothing_is_sent_unless_asked_for(tmp_path):
    """In a process of its own, as the environment is read once."""
    pytest.importorskip("wandb")
    code = (
        "import os, sys; from pathlib import Path; from qlx.recipe import TrainingSection\n"
        "from qlx.training.progress import reporting_callbacks\n"
        "reporting_callbacks(TrainingSection(report_to=('wandb',)), Path(sys.argv[1]))\n"
        "print(os.environ['WANDB_MODE'], os.environ['WANDB_DIR'])"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "run")]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    assert said[-2:] == ["offline", str(tmp_path / "run-wandb")]


def test_nothing_is_reported_by_itself(tmp_path):
    assert reporting_callbacks(TrainingSection(), tmp_path / "run") == []
    assert not list(tmp_path.iterdir())


def test_lines_of_progress():
    """Loss, rate, time left and memory about twenty times; every look at the held-out examples."""
    from transformers import TrainerControl, TrainerState

    lines: list[str] = []
    callback = progress_callback(lines.append)
    state, control = TrainerState(max_steps=400), TrainerControl()
    callback.on_train_begin(None, state, control)
    for step in range(1, 401):
        state.global_step = step
        callback.on_log(None, state, control, {"loss": 1.0, "learning_rate": 0.1, "grad_norm": 2.0})
        if step % 100 == 0:
            callback.on_log(None, state, control, {"eval_loss": 0.5, "eval_accuracy": 0.25})
    trained = [line for line in lines if "steps/s" in line]
    assert len(trained) == 20
    assert all("loss 1.0000" in line and " left  " in line for line in trained)
    assert all(line.endswith(("GB resident", "GB reserved")) for line in trained)
    assert [line for line in lines if line not in trained] == [
        f"step {step}/400  held out: loss 0.5000, accuracy 0.2500" for step in (100, 200, 300, 400)
    ]


def test_memory_is_what_the_process_holds():
    import numpy as np

    before = sum(memory().values())
    block = np.ones(10**8, np.uint8)
    if "memory_resident" in memory():
        assert 0.9e8 < memory()["memory_resident"] - before < 1.2e8
    assert block[-1] == 1
