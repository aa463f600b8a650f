"""Two processes train as one with twice the batch does, whole or in shards; one of them speaks and writes."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch

from qlx.checkpoint import QuantSpec
from qlx.errors import CheckFailed, Unsupported, UsageError
from qlx.models import forward_logits, load_base
from qlx.recipe import load_recipe
from qlx.training import train
from qlx.training.distributed import Process, _check_gpus, _exit_code, join_processes
from qlx.training.heatmaps import share_statistics
from qlx.training.progress import read_metrics
from qlx.training.sharding import shard_model
from qlx.verification import verify
from qlx.weights import read_tensors
from tests.conftest import DIGITS_BASE, DIGITS_RUN, PYTHON_RUN, TENNIS_BASE, recipe_of
from tests.training.test_resume import _digests

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
    """Writes a recipe for a task with a training section of its own."""

    def write(task="digits", sections=None, **training):
        content = {"digits": DIGITS_RUN, "python": PYTHON_RUN, "classic": TENNIS_BASE}[task]
        section = {**content["training"], **STEPS, "batch_size": 8, **training}
        sections = {**(sections or {}), "training": section}
        if task == "classic":
            clips = request.getfixturevalue("tennis_clips") / "bright"
            sections["base"] = {"path": str(request.getfixturevalue("classic_base"))}
            sections["data"] = {**content["data"], "path": str(clips)}
            section["learning_rate"] = 3e-4  # all weights: faster, they would tell float sums apart
        base = None if task == "classic" else request.getfixturevalue(f"{task}_base")
        made = recipe_of({**content, **sections}, base)
        path = tmp_path / f"batch{section['batch_size']}.yaml"
        path.write_text(json.dumps(made.content()))
        return path

    return write


def losses(run, name="loss"):
    rows = read_metrics(Path(run) / "metrics.jsonl")
    return torch.tensor([row[name] for row in rows if name in row])


exhaustive = pytest.mark.exhaustive


@pytest.mark.parametrize(
    ("task", "flags"),
    [
        ("python", ()),
        ("digits", ("--shard",)),
        pytest.param("digits", (), marks=exhaustive),
        pytest.param("python", ("--shard",), marks=exhaustive),
        pytest.param("classic", (), marks=exhaustive),
        pytest.param("classic", ("--shard",), marks=exhaustive),
    ],
)
def test_two_processes_are_one_with_twice_the_batch(recipe, request, tmp_path, task, flags):
    """Of the heatmap model (all of it, batch normalisation included), of an image and a language model on NF4."""
    path = recipe(task, eval_every=5)
    code, out, err = qlx_train(path, tmp_path / "two", "--nproc", "2", *flags, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["kind"] == "run"  # one of the two speaks
    for size, name in ((16, "one"), (8, "half")):
        train(load_recipe(recipe(task, batch_size=size, eval_every=5)), tmp_path / name)
    two, one, half = (losses(tmp_path / name) for name in ("two", "one", "half"))
    assert len(two) == 5
    torch.testing.assert_close(two, one, rtol=1e-5, atol=0)
    assert (half - one).abs().max() > 1e-3
    two, one, half = (losses(tmp_path / name, "eval_loss") for name in ("two", "one", "half"))
    assert len(two) == 3
    torch.testing.assert_close(two, one, rtol=1e-5, atol=0)
    assert (half - one).abs().max() > 1e-3
    weights = "model.safetensors" if task == "classic" else "adapter_model.safetensors"
    two, one = (read_tensors(tmp_path / name / weights) for name in ("two", "one"))
    assert two.keys() == one.keys()
    for name, value in one.items():
        # The bias of keys has no gradient but noise: softmax does not see it.
        noise = 1e-5 if name.endswith("key.bias") else 0
        assert (two[name] - value).float().norm() <= 1e-3 * value.float().norm() + noise, name
    base = None if task == "classic" else request.getfixturevalue(f"{task}_base")
    assert verify(tmp_path / "two", base=base).passed


@exhaustive
@pytest.mark.parametrize("flags", [(), ("--shard",)], ids=["whole", "sharded"])
def test_a_training_of_two_that_was_interrupted_goes_on(recipe, tmp_path, flags):
    """To the same bytes, although each process drops out by random numbers of its own."""
    sections = {"adapter": {"rank": 4, "alpha": 6, "dropout": 0.2}}
    # The first state has best weights beside it: only the first process of a sharded training may hold them.
    evals = {"eval_every": 3, "early_stopping_patience": 30}
    path = recipe(sections=sections, max_steps=60, **evals)
    output, flags = tmp_path / "run", ("--nproc", "2", *flags)
    state = tmp_path / "run.partial" / "state"
    words = [str(word) for word in command(path, output, *flags)]
    with subprocess.Popen(words, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 240
        while not state.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.count("interrupted") == 1
    assert "--resume" in err
    assert "--nproc 2" in err
    assert ("--shard" in err) is ("--shard" in flags)
    assert not output.exists()
    first, second = json.loads((state / "random.json").read_text())
    assert first["torch"] != second["torch"]
    code, _, err = qlx_train(path, output, "--resume")
    assert (code, "number of processes" in err) == (3, True)
    assert qlx_train(path, output, "--resume", *flags)[0] == 0
    assert qlx_train(path, tmp_path / "whole", *flags)[0] == 0
    assert _digests(output) == _digests(tmp_path / "whole")


@exhaustive
def test_two_machines_meet(recipe, tmp_path):
    """Two calls of torchrun with one process each, as on two machines that share a directory."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    meeting = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    meeting += ["--rdzv-endpoint", place, "--rdzv-id", "qlx", "--local-addr", "127.0.0.1"]
    trained = command(recipe(), tmp_path / "two", "--json")[1:]
    words = [sys.executable, "-m", "torch.distributed.run", *meeting, *map(str, trained)]
    machines = [
        subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) for _ in "ab"
    ]
    said = [machine.communicate(timeout=240)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0]
    assert sum('"kind": "run"' in text for text in said) == 1
    train(load_recipe(recipe(batch_size=16)), tmp_path / "one")
    torch.testing.assert_close(
        losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5, atol=0
    )


def test_one_process_has_nothing_to_share(tmp_path):
    with pytest.raises(UsageError, match="--nproc 2"):
        train(recipe_of(DIGITS_BASE), tmp_path / "run", shard=True)


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


# --- What the processes do together, in two that are forked here


def _in_two(work):
    """`work(process)` in each of two processes; what they return."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def run(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        torch.set_num_threads(1)
        accelerate.PartialState._reset_state()  # that of the tests before
        process = join_processes()
        queue.put((rank, work(process)))
        process.wait()

    children = [context.Process(target=run, args=(rank,)) for rank in (0, 1)]
    for child in children:
        child.start()
    found = dict(queue.get(timeout=60) for _ in children)
    for child in children:
        child.join(timeout=60)
    return [found[0], found[1]]


def test_what_each_process_gives_reaches_all():
    values = [["a", 1.5, float("inf")], {"longer": list(range(1000))}]
    assert _in_two(lambda process: process.gather(values[process.rank])) == [values, values]
    assert Process().gather("alone") == ["alone"]


def test_random_numbers_of_two_processes_differ():
    def drawn(process):
        torch.manual_seed(3)
        process.draw_apart(3)
        return torch.rand(2).tolist()

    first, second = _in_two(drawn)
    assert first != second
    torch.manual_seed(3)
    assert first == torch.rand(2).tolist()  # those of a training in one process


@pytest.mark.parametrize("shared", [True, False])
def test_batch_normalisation_of_two_is_that_of_one(shared):
    """Outputs, gradients and running statistics; without sharing they differ."""
    generator = torch.Generator().manual_seed(0)
    inputs, weights = torch.randn(2, 6, 3, 4, 5, generator=generator).double()

    def run(rows, model):
        x = inputs[rows].clone().requires_grad_()
        y = model(x)
        (y * weights[rows]).sum().backward()
        trained = torch.stack([model.weight.grad, model.bias.grad])
        kept = torch.stack([model.running_mean, model.running_var])
        return [part.detach().numpy() for part in (y, x.grad, trained, kept)]

    def half(process):
        model = torch.nn.BatchNorm2d(3).double()
        if shared:
            share_statistics(model)
        return run(slice(0, 2) if process.first else slice(2, 6), model)

    first, second = _in_two(half)
    whole = run(slice(0, 6), torch.nn.BatchNorm2d(3).double())
    found = [np.concatenate(pair) for pair in zip(first[:2], second[:2], strict=True)]
    found += [first[2] + second[2], first[3]]
    same = [np.allclose(*pair) for pair in zip(found, whole, strict=True)]
    assert same == [shared] * 4
    assert np.array_equal(first[3], second[3]) is shared


def test_a_shard_is_half_of_every_weight(python_base):
    """Codes included, also after a pass; and the model says what the whole one says."""
    spec = QuantSpec(method="qlora", weight_bits=4, scheme="nf4", group_size=64)
    model = load_base(python_base, "causal-lm", quant=spec)
    inputs = {"input_ids": np.arange(40, dtype=np.int64).reshape(2, 20)}
    expected = forward_logits(model, "causal-lm", inputs)

    def held(process):
        shard_model(model, process.count)
        away = float(np.abs(forward_logits(model, "causal-lm", inputs) - expected).max())
        sizes = {
            name: (value.to_local().nbytes, value.nbytes)
            for name, value in model.named_parameters()
        }
        return sizes, away

    for sizes, away in _in_two(held):
        assert away < 1e-6
        assert any("q_proj" in name for name in sizes)
        assert all(2 * part == whole for part, whole in sizes.values())


def test_shards_of_several_dtypes_are_refused(adapted_in_two_dtypes):
    with pytest.raises(Unsupported, match=r"--shard: .*torch\.bfloat16 and torch\.float32"):
        shard_model(adapted_in_two_dtypes, 2)


@pytest.fixture
def adapted_in_two_dtypes():
    return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).bfloat16())


def test_more_processes_than_gpus_are_refused():
    """Two processes on one GPU would wait for each other, or end with an error of NCCL's."""
    _check_gpus(2, 0)
    _check_gpus(2, 2)
    with pytest.raises(UsageError, match=r"this machine has 1; give at most --nproc 1"):
        _check_gpus(2, 1)
