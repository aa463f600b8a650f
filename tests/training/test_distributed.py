"""Two processes train as one with twice the batch does; one of them speaks and writes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from qlx.errors import CheckFailed
from qlx.recipe import load_recipe
from qlx.training import train
from qlx.training.distributed import _exit_code
from qlx.training.progress import read_metrics
from qlx.verification import verify
from qlx.weights import read_tensors
from tests.conftest import DIGITS_RUN, PYTHON_RUN, recipe_of

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
STEPS = {"max_steps": 10, "log_every": 2, "save_every": 4}


def command(path, output, *options):
    return [sys.executable, "-m", "qlx", "train", path, "-o", output, "--quiet", *options]


def qlx_train(path, output, *options):
    """Train in processes of their own; the exit code, standard output and standard error."""
    words = [str(word) for word in command(path, output, *options)]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def recipe(request, tmp_path):
    """Writes a QLoRA recipe for a task with a training section of its own."""

    def write(task="digits", **training):
        content = {"digits": DIGITS_RUN, "python": PYTHON_RUN}[task]
        section = {**content["training"], **STEPS, "batch_size": 8, **training}
        made = recipe_of(content, request.getfixturevalue(f"{task}_base"), training=section)
        path = tmp_path / f"batch{section['batch_size']}.yaml"
        path.write_text(json.dumps(made.content()))
        return path

    return write


def losses(run):
    return torch.tensor([row["loss"] for row in read_metrics(Path(run) / "metrics.jsonl")])


@pytest.mark.parametrize("task", ["python", pytest.param("digits", marks=pytest.mark.exhaustive)])
def test_two_processes_are_one_with_twice_the_batch(recipe, request, tmp_path, task):
    code, out, err = qlx_train(recipe(task), tmp_path / "two", "--nproc", "2", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["kind"] == "run"  # one of the two speaks
    for size, name in ((16, "one"), (8, "half")):
        train(load_recipe(recipe(task, batch_size=size)), tmp_path / name)
    assert len(losses(tmp_path / "two")) == 5
    torch.testing.assert_close(
        losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5, atol=0
    )
    assert (losses(tmp_path / "half") - losses(tmp_path / "one")).abs().max() > 1e-3
    two, one = (
        read_tensors(tmp_path / name / "adapter_model.safetensors") for name in ("two", "one")
    )
    assert two.keys() == one.keys()
    for name, value in one.items():
        assert (two[name] - value).norm() <= 1e-3 * value.norm(), name
    assert verify(tmp_path / "two", base=request.getfixturevalue(f"{task}_base")).passed


@pytest.mark.exhaustive
def test_a_training_of_two_that_was_interrupted_goes_on(recipe, tmp_path):
    path, output = recipe(max_steps=400, log_every=50), tmp_path / "run"
    words = [str(word) for word in command(path, output, "--nproc", "2")]
    with subprocess.Popen(words, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 240
        while not (tmp_path / "run.partial" / "state").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.count("interrupted") == 1
    assert "--resume --nproc 2" in err
    assert not output.exists()
    code, _, err = qlx_train(path, output, "--resume")
    assert (code, "number of processes" in err) == (3, True)
    assert qlx_train(path, output, "--resume", "--nproc", "2")[0] == 0
    assert read_metrics(output / "metrics.jsonl")[-1]["step"] == 400


def test_the_exit_code_of_a_failure_comes_through(recipe, tmp_path):
    code, _, err = qlx_train(recipe(learning_rate=1e30), tmp_path / "run", "--nproc", "2")
    assert code == 1
    assert err.count("the loss is") == 1
    assert not list(tmp_path.glob("run*"))


def test_another_process_is_quoted(tmp_path):
    log = tmp_path / "x" / "1" / "stderr.log"
    log.parent.mkdir(parents=True)
    log.write_text("noise\nqlx: not enough memory\n")
    with pytest.raises(CheckFailed, match=r"process 1 .*: not enough memory"):
        _exit_code({1: 5}, tmp_path)
    with pytest.raises(CheckFailed, match=r"process 1 .*ended with -9"):
        _exit_code({0: -15, 1: -9}, tmp_path / "none")
    assert _exit_code({0: 3, 1: -15}, tmp_path) == 3
