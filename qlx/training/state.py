"""The state of an unfinished training as safetensors and JSON: weights, optimizer, schedule, random numbers.

Nothing here is pickled. A state is a sealed checkpoint directory that is exchanged as a whole, so a
kill at any instant leaves the old state or the new one, and a changed byte is found.
"""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qlx.checkpoint import (
    Manifest,
    Task,
    canonical_json,
    load_json,
    new_checkpoint,
    open_checkpoint,
    seal,
)
from qlx.errors import CorruptCheckpoint, Mismatch, Unsupported
from qlx.weights import read_tensors, write_tensors

__all__ = [
    "OPTIMIZER_FILE",
    "OPTIMIZER_JSON",
    "TRAINER_STATE_FILE",
    "load_optimizer",
    "load_random",
    "load_trained",
    "open_state",
    "require_recipe",
    "save_optimizer",
    "save_state",
]

TRAINER_STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
OPTIMIZER_JSON = "optimizer.json"
_BELONGS_FILE = "belongs_to.json"
_TRAINED_FILE = "trained.safetensors"
_RANDOM_FILE, _RANDOM_JSON = "random.safetensors", "random.json"


def save_state(
    directory: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    trainer_state: Any,
    task: Task,
    belongs_to: str,
) -> None:
    """Replace the state in `directory` by the present one, durably and at once.

    `trainer_state` is a transformers `TrainerState`; `belongs_to` identifies recipe and base, and
    `open_state` refuses another.
    """
    with new_checkpoint(directory, force=True) as staging:
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        write_tensors(staging / _TRAINED_FILE, trained)
        save_optimizer(staging, optimizer, scheduler)
        _save_random(staging)
        trainer_state.save_to_json(str(staging / TRAINER_STATE_FILE))
        (staging / _BELONGS_FILE).write_bytes(canonical_json({"belongs_to": belongs_to}))
        seal(
            staging,
            Manifest(kind="run", task=task, tag=f"state-at-step-{trainer_state.global_step}"),
        )


def open_state(directory: Path, belongs_to: str) -> Path:
    """Check a saved state's digests and that it is of this training; returns its directory.

    Raises:
        CorruptCheckpoint: a file is not as it was written.
        Mismatch: it was saved by another recipe, for another base or by more or fewer processes.
    """
    state = open_checkpoint(directory)
    if load_json(state.path / _BELONGS_FILE) != {"belongs_to": belongs_to}:
        raise Mismatch(_other(directory, "base or number of processes"))
    return state.path


def require_recipe(directory: Path, digest: str) -> None:
    """Check that a saved state was made by the recipe with `digest`, before anything is loaded.

    Raises:
        Mismatch: it was made by another one.
    """
    saved = load_json(directory / _BELONGS_FILE)
    if not isinstance(saved, dict) or str(saved.get("belongs_to")).split(" ")[0] != digest:
        raise Mismatch(_other(directory, "recipe"))


def _other(directory: Path, what: str) -> str:
    return (
        f"{directory}: saved with another {what}; go on with that one (and the same --set), "
        "or start anew with --force instead of --resume"
    )


def load_trained(directory: Path, model: nn.Module) -> None:
    """Put the saved weights into the model's trainable parameters.

    Raises:
        Mismatch: they are not the same parameters.
    """
    saved = read_tensors(directory / _TRAINED_FILE)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if saved.keys() != trained.keys():
        raise Mismatch(
            f"{directory}: parameter {min(saved.keys() ^ trained.keys())!r} is not in both state and model"
        )
    with torch.no_grad():
        for name, value in trained.items():
            value.copy_(saved[name])


def save_optimizer(directory: Path, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Write `optimizer.safetensors` (moments) and `optimizer.json` (groups, scalars, schedule)."""
    state = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                scalars[f"{index}.{key}"] = _plain(value, f"optimizer state {key!r}")
    write_tensors(directory / OPTIMIZER_FILE, tensors)
    content = {
        "groups": _plain(state["param_groups"], "optimizer groups"),
        "scalars": scalars,
        "schedule": _plain(scheduler.state_dict(), "schedule"),
    }
    (directory / OPTIMIZER_JSON).write_bytes(canonical_json(content))


def _plain(value: Any, what: str) -> Any:
    """The value as JSON holds it; tensors of one element become numbers.

    Raises:
        Unsupported: it holds something else.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{what}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, what) for item in value]
    raise Unsupported(
        f"{what} holds a {type(value).__name__}, which cannot be saved; choose another optimizer"
    )


def load_optimizer(directory: Path, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Restore an optimizer and its schedule from `save_optimizer`'s files.

    Raises:
        CorruptCheckpoint: a name in the file is not `<index>.<key>`.
    """
    content = load_json(directory / OPTIMIZER_JSON)
    state: dict[int, dict[str, Any]] = {}
    values = {**read_tensors(directory / OPTIMIZER_FILE), **content["scalars"]}
    for name, value in values.items():
        index, _, key = name.partition(".")
        if not index.isdigit() or not key:
            raise CorruptCheckpoint(f"{directory / OPTIMIZER_FILE}: {name!r} is not <index>.<key>")
        state.setdefault(int(index), {})[key] = value
    groups = [_with_tuples(group) for group in content["groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    scheduler.load_state_dict(content["schedule"])


def _with_tuples(group: dict[str, Any]) -> dict[str, Any]:
    """JSON has no tuples; Adam's betas are one."""
    return {key: tuple(value) if key == "betas" else value for key, value in group.items()}


def _save_random(directory: Path) -> None:
    _, words, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=True)
    tensors = {
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(legacy[1]).astype(np.int64)),
        "torch": torch.random.get_rng_state(),
    }
    for index in range(torch.cuda.device_count()):
        tensors[f"cuda.{index}"] = torch.cuda.get_rng_state(index)
    write_tensors(directory / _RANDOM_FILE, tensors)
    numbers = {"python_gauss": gauss, "numpy": [legacy[0], *legacy[2:]]}
    (directory / _RANDOM_JSON).write_bytes(canonical_json(_plain(numbers, "random state")))


def load_random(directory: Path) -> None:
    """Restore the random number generators of Python, numpy, torch and every GPU."""
    tensors = read_tensors(directory / _RANDOM_FILE)
    numbers = load_json(directory / _RANDOM_JSON)
    random.setstate((3, tuple(tensors["python"].tolist()), numbers["python_gauss"]))
    name, *rest = numbers["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), *rest))
    torch.random.set_rng_state(tensors["torch"])
    for index in range(torch.cuda.device_count()):
        if f"cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)
