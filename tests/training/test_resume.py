"""A training killed at any step, resumed, ends in the bytes of an unbroken one."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from qlx.checkpoint import bytes_digest, open_checkpoint
from qlx.errors import CorruptCheckpoint, Mismatch, UsageError
from qlx.recipe import Recipe
from qlx.training import interrupted_at, train
from qlx.training.progress import read_metrics
from qlx.training.trainers import StrictTrainer
from tests.conftest import DIGITS_BASE, DIGITS_RUN, PYTHON_RUN, recipe_of

SHORT = {"batch_size": 16, "learning_rate": 4e-3, "save_every": 4, "log_every": 3, "seed": 3}
STEPS = 26

CHILD = """
import os, signal, sys
from pathlib import Path
import torch
from qlx.recipe import Recipe
from qlx.training import train
from qlx.training.trainers import StrictTrainer

torch.set_num_threads(1)
recipe, output = Recipe.model_validate_json(sys.argv[1]), Path(sys.argv[2])
kill_at, resume = int(sys.argv[3]), sys.argv[4]
step = StrictTrainer.training_step

def dying(self, *args, **kwargs):
    if self.state.global_step == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)

StrictTrainer.training_step = dying
train(recipe, output, resume=resume == "resume")
"""


def _run(recipe: Recipe, output, kill_at=-1, resume=False) -> int:
    arguments = [recipe.model_dump_json(), str(output), str(kill_at), "resume" if resume else "new"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], env=environment, capture_output=True, text=True
    )
    assert finished.returncode in (0, -signal.SIGKILL), finished.stderr
    return finished.returncode


def _digests(path, names=("adapter_model.safetensors", "adapter_config.json", "probe.safetensors")):
    return {name: bytes_digest((path / name).read_bytes()) for name in names}


@pytest.fixture(scope="module")
def digits_recipe(digits_base):
    """Three epochs of nine steps, with dropout, so that random numbers matter."""
    data = {**DIGITS_RUN["data"], "train_limit": 144, "eval_limit": 32}
    adapter = {"rank": 2, "alpha": 3, "dropout": 0.1}
    return recipe_of(
        DIGITS_RUN, digits_base, data=data, adapter=adapter, training={**SHORT, "max_steps": STEPS}
    )


@pytest.fixture(scope="module")
def unbroken(digits_recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("unbroken") / "run"
    assert _run(digits_recipe, output) == 0
    return output


def _steps(run):
    return [row["step"] for row in read_metrics(run / "metrics.jsonl")]


def test_killed_and_resumed_is_unbroken(digits_recipe, unbroken, tmp_path):
    """Killed within the first epoch; in between, a wrong recipe and a damaged state are refused."""
    output = tmp_path / "run"
    assert _run(digits_recipe, output, 7) == -signal.SIGKILL
    assert not output.exists()
    _check_refusals(digits_recipe, output)
    assert _run(digits_recipe, output, resume=True) == 0
    assert _digests(output) == _digests(unbroken)
    assert not output.with_name("run.partial").exists()
    assert _steps(output) == _steps(unbroken)


def _check_refusals(recipe, output):
    with pytest.raises(UsageError, match="--resume"):
        train(recipe, output)
    training = recipe.training.model_copy(update={"learning_rate": 1e-3})
    said: list[str] = []
    with pytest.raises(Mismatch, match="another recipe"):
        other = recipe.model_copy(update={"training": training})
        train(other, output, resume=True, report=said.append)
    assert not said  # before anything was loaded
    state = output.with_name("run.partial") / "state"
    assert not [
        name for name in os.listdir(state) if name.endswith((".pt", ".pth", ".bin", ".pkl"))
    ]
    whole = (state / "optimizer.safetensors").read_bytes()
    (state / "optimizer.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CorruptCheckpoint, match="optimizer"):
        train(recipe, output, resume=True)
    (state / "optimizer.safetensors").write_bytes(whole)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kill_at", [2, 9, 18, 25])
def test_killed_elsewhere(kill_at, digits_recipe, unbroken, tmp_path):
    """Before the first save, at the borders of both epochs, and at the last step."""
    output = tmp_path / "run"
    assert _run(digits_recipe, output, kill_at) == -signal.SIGKILL
    assert _run(digits_recipe, output, resume=True) == 0
    assert _digests(output) == _digests(unbroken)
    assert _steps(output)[-1] >= STEPS - 2


@pytest.mark.exhaustive
def test_killed_twice(digits_recipe, unbroken, tmp_path):
    output = tmp_path / "run"
    assert _run(digits_recipe, output, 9) == -signal.SIGKILL
    assert _run(digits_recipe, output, 21, resume=True) == -signal.SIGKILL
    assert _run(digits_recipe, output, resume=True) == 0
    assert _digests(output) == _digests(unbroken)


@pytest.mark.exhaustive
def test_another_seed_gives_other_bytes(digits_recipe, unbroken, tmp_path):
    """The comparison above can fail."""
    training = digits_recipe.training.model_copy(update={"seed": 4})
    assert _run(digits_recipe.model_copy(update={"training": training}), tmp_path / "run") == 0
    assert _digests(tmp_path / "run") != _digests(unbroken)


@pytest.mark.exhaustive
def test_language_model_with_accumulation(python_base, tmp_path):
    data = {**PYTHON_RUN["data"], "train_limit": 100, "eval_limit": 16, "max_length": 48}
    training = {**SHORT, "batch_size": 4, "gradient_accumulation": 3, "max_steps": 12}
    recipe = recipe_of(PYTHON_RUN, python_base, data=data, training=training)
    assert _run(recipe, tmp_path / "whole") == 0
    assert _run(recipe, tmp_path / "run", 9) == -signal.SIGKILL
    assert _run(recipe, tmp_path / "run", resume=True) == 0
    assert _digests(tmp_path / "run") == _digests(tmp_path / "whole")


@pytest.mark.exhaustive
def test_kill_from_outside_at_some_instant(digits_recipe, unbroken, tmp_path):
    """Not at a step's begin but whenever it hits, while states are being written."""
    recipe = digits_recipe.model_copy(
        update={"training": digits_recipe.training.model_copy(update={"save_every": 1})}
    )
    output = tmp_path / "run"
    arguments = [recipe.model_dump_json(), str(output), "-1", "new"]
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    state = output.with_name("run.partial") / "state" / "qlx.json"
    until = time.monotonic() + 120
    while not state.exists() and child.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    time.sleep(0.05)
    child.kill()
    child.wait()
    assert _run(recipe, output, resume=True) == 0
    assert _digests(output, ("adapter_model.safetensors",)) == _digests(
        unbroken, ("adapter_model.safetensors",)
    )


def test_nothing_to_resume(tmp_path):
    with pytest.raises(UsageError, match="no interrupted training"):
        train(recipe_of(DIGITS_BASE), tmp_path / "run", resume=True)


@pytest.mark.parametrize("error", [RuntimeError("a defect"), MemoryError(), KeyboardInterrupt()])
@pytest.mark.parametrize("step", [0, 5])
def test_what_a_training_that_ends_early_leaves(error, step, digits_base, tmp_path, monkeypatch):
    """Nothing before the first saved state; that state afterwards."""
    inner = StrictTrainer.training_step

    def failing(self, *args, **kwargs):
        if self.state.global_step == step:
            raise error
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(StrictTrainer, "training_step", failing)
    training = {**SHORT, "max_steps": 8}
    with pytest.raises(type(error)):
        train(recipe_of(DIGITS_RUN, digits_base, training=training), tmp_path / "run")
    work = tmp_path / "run.partial"
    assert work.exists() == (step == 5)
    assert interrupted_at(tmp_path / "run") == ((work, 4) if step else None)


def test_finished_run_holds_no_pickle(digits_run):
    checkpoint = open_checkpoint(digits_run)
    assert {
        "optimizer.safetensors",
        "optimizer.json",
        "trainer_state.json",
    } <= checkpoint.manifest.files.keys()
    for name in checkpoint.manifest.files:
        data = (digits_run / name).read_bytes()
        assert not data.startswith((b"\x80\x02", b"\x80\x04", b"PK\x03\x04")), name


@pytest.mark.parametrize(
    "make",
    [torch.optim.AdamW, lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9), torch.optim.Adagrad],
)
def test_optimizer_state_round_trip(make, tmp_path):
    from qlx.training.state import load_optimizer, save_optimizer

    def stepped(parameters, optimizer, scheduler, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            (parameters[0] ** 2).sum().backward()
            optimizer.step()
            scheduler.step()

    def fresh(values):
        parameters = [torch.nn.Parameter(values.clone())]
        optimizer = make(parameters, lr=0.1)
        return (
            parameters,
            optimizer,
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        )

    first = fresh(torch.arange(5.0))
    stepped(*first, 3)
    save_optimizer(tmp_path, first[1], first[2])
    second = fresh(first[0][0].detach())
    load_optimizer(tmp_path, second[1], second[2])
    stepped(*first, 3)
    stepped(*second, 3)
    assert torch.equal(first[0][0], second[0][0])
