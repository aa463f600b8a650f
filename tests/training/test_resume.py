"""A training killed at any step, resumed, ends in the bytes of an unbroken one."""

import json
import os
import signal
import subprocess
import sys
import time

import bitsandbytes
import pytest
import torch
from transformers.optimization import Adafactor

from qlx.checkpoint import bytes_digest, open_checkpoint
from qlx.errors import CorruptCheckpoint, Mismatch, Unsupported, UsageError
from qlx.inputs import load_split, split_digest
from qlx.recipe import Recipe
from qlx.training import check, interrupted_at, train
from qlx.training.distributed import Process
from qlx.training.progress import read_metrics
from qlx.training.state import collect_state, load_optimizer, write_optimizer
from qlx.training.trainers import StrictTrainer, check_optimizer
from qlx.weights import read_tensors
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


def test_a_training_does_not_go_on_with_other_data(python_base, tmp_path):
    """Neither other examples to train on, nor others held out, nor another template."""
    path, template = tmp_path / "rows.jsonl", tmp_path / "chat.jinja"
    rows = [{"messages": [{"role": role, "content": f"{role} {at:02}"} for role in ("user", "assistant")]}
            for at in range(20)]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    data = {
        "source": "text",
        "path": str(path),
        "chat_template": str(template),
        "eval_fraction": 0.2,
    }
    training = {**SHORT, "batch_size": 4, "max_steps": 6, "completion_only": False}
    recipe = recipe_of(PYTHON_RUN, python_base, data=data, training=training)
    assert _run(recipe, tmp_path / "run", 5) == -signal.SIGKILL
    answers = [load_split(recipe.data, part).examples[0].messages[1] for part in ("train", "eval")]
    for file, word in (
        (path, answers[0]["content"]),
        (path, answers[1]["content"]),
        (template, ": "),
    ):
        whole = file.read_text()
        file.write_text(whole.replace(f"{word}", f"{word}!"))
        with pytest.raises(Mismatch, match="saved with another base, other data or"):
            train(recipe, tmp_path / "run", resume=True)
        file.write_text(whole)
    run = train(recipe, tmp_path / "run", resume=True)
    options = run.manifest.lineage[-1].options
    digests = [split_digest(load_split(recipe.data, part)) for part in ("train", "eval")]
    assert [options["data_digest"], options["held_out_digest"]] == digests


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
    assert not [name for name in checkpoint.manifest.files if is_pickle(digits_run / name)]


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.AdamW,
        lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
        torch.optim.Adagrad,
        lambda p, lr: Adafactor(p, lr, scale_parameter=False, relative_step=False),
        lambda p, lr: bitsandbytes.optim.AdamW8bit(p, lr, min_8bit_size=1),
    ],
    ids=["adamw", "momentum", "adagrad", "adafactor", "adamw_8bit"],
)
def test_optimizer_state_round_trip(make, tmp_path):

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

    first = fresh(torch.arange(512.0).reshape(2, 256))
    stepped(*first, 3)
    state = collect_state(torch.nn.Module(), first[1], first[2], Process())
    write_optimizer(tmp_path, state)
    second = fresh(first[0][0].detach())
    load_optimizer(tmp_path, second[1], second[2])
    forgetful = fresh(first[0][0].detach())
    for one in (first, second, forgetful):
        stepped(*one, 3)
    assert torch.equal(first[0][0], second[0][0])
    assert not torch.equal(first[0][0], forgetful[0][0])


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["adamw_8bit", "adafactor", "sgd"])
def test_every_optimizer_goes_on_without_pickle(name, digits_base, tmp_path, monkeypatch):
    data = {**DIGITS_RUN["data"], "train_limit": 96, "eval_limit": 16}
    adapter = {"rank": 64, "alpha": 64}  # 4096 weights and more, of which bitsandbytes keeps 8 bits
    training = {**SHORT, "optimizer": name, "max_steps": 6, "learning_rate": 1e-3}
    sections = {"data": data, "adapter": adapter, "training": training}
    recipe = recipe_of(DIGITS_RUN, digits_base, **sections)
    whole = train(recipe, tmp_path / "whole").path
    inner = StrictTrainer.training_step

    def failing(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return inner(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StrictTrainer, "training_step", failing)
        train(recipe, tmp_path / "run")
    for path in (tmp_path / "run.partial").rglob("*"):
        assert not path.is_file() or not is_pickle(path), path
    run = train(recipe, tmp_path / "run", resume=True).path
    assert _digests(run) == _digests(whole)
    assert not [path.name for path in run.iterdir() if is_pickle(path)]
    codes = {value.dtype for value in read_tensors(run / "optimizer.safetensors").values()}
    assert (torch.uint8 in codes) is (name == "adamw_8bit")


def is_pickle(path):
    """A pickle of any protocol that torch writes, bare or in a zip archive."""
    return path.read_bytes().startswith((b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK\x03\x04"))


def test_pickles_are_known(tmp_path):
    for number, old in enumerate((False, True)):
        path = tmp_path / str(number)
        torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=not old)
        assert is_pickle(path)


def test_pages_need_a_gpu(digits_base, tmp_path):
    training = {**SHORT, "optimizer": "paged_adamw_8bit"}
    recipe = recipe_of(DIGITS_RUN, digits_base, training=training)
    if torch.cuda.is_available():
        check(recipe)
        return
    for act in (check, lambda recipe: train(recipe, tmp_path / "run")):
        with pytest.raises(Unsupported, match="no GPU; choose adamw_8bit"):
            act(recipe)
    with pytest.raises(Unsupported, match="does not work on shards"):
        check_optimizer(recipe.training.model_copy(update={"optimizer": "adafactor"}), sharded=True)
