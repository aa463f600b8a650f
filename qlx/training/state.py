"""The state of an unfinished training as safetensors and JSON: weights, optimizer, schedule, random numbers.

Nothing here is pickled. A state is a sealed checkpoint directory that is exchanged as a whole, so a
kill at any instant leaves the old state or the new one, and a changed byte is found.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qlx.adapters import is_frozen_part
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
from qlx.training.distributed import Process
from qlx.weights import read_tensors, write_tensors

__all__ = [
    "OPTIMIZER_FILE",
    "OPTIMIZER_JSON",
    "TRAINER_STATE_FILE",
    "State",
    "collect_state",
    "load_optimizer",
    "load_random",
    "load_trained",
    "open_state",
    "put_trained",
    "require_recipe",
    "save_state",
    "trained_tensors",
    "write_optimizer",
]

TRAINER_STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer.safetensors"
OPTIMIZER_JSON = "optimizer.json"
_BELONGS_FILE = "belongs_to.json"
_TRAINED_FILE = "trained.safetensors"
_RANDOM_FILE = "random.json"


@dataclass(frozen=True)
class State:
    """What a training goes on from, collected from all its processes.

    Attributes:
        trained: what training changes, by name (`trained_tensors`).
        moments: tensors of the optimizer by `<index>.<key>`.
        optimizer: its groups and scalars and the schedule, as JSON values.
        randoms: the random number generators of each process, in their order.
    """

    trained: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    randoms: list[Any]


def collect_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, process: Process
) -> State:
    """The present state of a training; all its processes take part."""
    moments, content = _optimizer_content(optimizer, scheduler)
    return State(trained_tensors(model), moments, content, process.gather(_random_state()))


def save_state(
    directory: Path,
    state: State,
    *,
    trainer_state: Any,
    task: Task,
    belongs_to: str,
    beside: Callable[[Path], None] = lambda staging: None,
) -> None:
    """Replace the state in `directory` by `state`, durably and at once.

    `trainer_state` is a transformers `TrainerState`; `belongs_to` identifies recipe and base, and
    `open_state` refuses another; `beside` writes what else belongs to it.
    """
    with new_checkpoint(directory, force=True) as staging:
        write_tensors(staging / _TRAINED_FILE, state.trained)
        write_optimizer(staging, state)
        (staging / _RANDOM_FILE).write_bytes(canonical_json(state.randoms))
        trainer_state.save_to_json(str(staging / TRAINER_STATE_FILE))
        (staging / _BELONGS_FILE).write_bytes(canonical_json({"belongs_to": belongs_to}))
        beside(staging)
        seal(
            staging,
            Manifest(kind="run", task=task, tag=f"state-at-step-{trainer_state.global_step}"),
        )


def open_state(directory: Path, belongs_to: str) -> Path:
    """Check a saved state's digests and that it is of this training; returns its directory.

    Raises:
        CorruptCheckpoint: a file is not as it was written.
        Mismatch: it was saved by another recipe, for another base, from other data or by more or fewer processes.
    """
    state = open_checkpoint(directory)
    if load_json(state.path / _BELONGS_FILE) != {"belongs_to": belongs_to}:
        raise Mismatch(_other(directory, "base, other data or another number of processes"))
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
        f"{directory}: saved with another {what}; go on with the same (and the same --set), "
        "or start anew with --force instead of --resume"
    )


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes, by name: trainable parameters, and the statistics of batch normalisation.

    PiSSA's frozen half is among them: another machine would decompose the base a little otherwise.
    A parameter that is sharded over processes is put together, in which all of them take part.
    """
    return {name: _whole(value.detach()) for name, value in _changing(model)}


def _changing(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in model.named_parameters():
        if value.requires_grad or is_frozen_part(name):
            yield name, value
    for prefix, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            yield from module.named_buffers(prefix, recurse=False)


def _whole(value: Any) -> torch.Tensor:
    whole: torch.Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole


def _as_held(value: torch.Tensor, like: Any) -> torch.Tensor:
    """A whole tensor as a parameter like `like` holds it: this process's shard of it, or all."""
    if not hasattr(like, "full_tensor") or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor  # costs a second

    held: torch.Tensor = distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return held


def load_trained(directory: Path, model: nn.Module) -> None:
    """Put saved weights into what training changes.

    Raises:
        Mismatch: they are not the same parameters.
    """
    put_trained(read_tensors(directory / _TRAINED_FILE), model, str(directory))


def put_trained(saved: Mapping[str, torch.Tensor], model: nn.Module, origin: str) -> None:
    """Put tensors, as `trained_tensors` gives them, into a model; `origin` says where they are from.

    Raises:
        Mismatch: they are not the same parameters.
    """
    trained = dict(_changing(model))
    if saved.keys() != trained.keys():
        raise Mismatch(
            f"{origin}: parameter {min(saved.keys() ^ trained.keys())!r} is not in both state and model"
        )
    with torch.no_grad():
        for name, value in trained.items():
            value.copy_(_as_held(saved[name], value))


def write_optimizer(directory: Path, state: State) -> None:
    """Write `optimizer.safetensors` (moments) and `optimizer.json` (groups, scalars, schedule)."""
    write_tensors(directory / OPTIMIZER_FILE, state.moments)
    (directory / OPTIMIZER_JSON).write_bytes(canonical_json(state.optimizer))


def _optimizer_content(
    optimizer: torch.optim.Optimizer, scheduler: Any
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    state = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, values in state["state"].items():
        for key, value in _flat(values):
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = _whole(value)
            else:
                scalars[f"{index}.{key}"] = _plain(value, f"optimizer state {key!r}")
    return tensors, {
        "groups": _plain(state["param_groups"], "optimizer groups"),
        "scalars": scalars,
        "schedule": _plain(scheduler.state_dict(), "schedule"),
    }


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The entries of a parameter's state; bitsandbytes puts some of them into a mapping inside, and reads both."""
    for key, value in values.items():
        yield from _flat(value) if isinstance(value, Mapping) else [(key, value)]


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
    """Restore an optimizer and its schedule from `write_optimizer`'s files.

    Raises:
        CorruptCheckpoint: a name in the file is not `<index>.<key>`.
    """
    content = load_json(directory / OPTIMIZER_JSON)
    state: dict[int, dict[str, Any]] = {}
    values = {**read_tensors(directory / OPTIMIZER_FILE), **content["scalars"]}
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    for name, value in values.items():
        index, _, key = name.partition(".")
        if not index.isdigit() or not key or int(index) >= len(parameters):
            raise CorruptCheckpoint(
                f"{directory / OPTIMIZER_FILE}: {name!r} is not <index>.<key> of a parameter"
            )
        like = parameters[int(index)]
        held = _as_held(value, like) if isinstance(value, torch.Tensor) else value
        state.setdefault(int(index), {})[key] = held
    groups = [_with_tuples(group) for group in content["groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    scheduler.load_state_dict(content["schedule"])


def _with_tuples(group: dict[str, Any]) -> dict[str, Any]:
    """JSON has no tuples; Adam's betas are one."""
    return {key: tuple(value) if key == "betas" else value for key, value in group.items()}


def _random_state() -> dict[str, Any]:
    """The random number generators of Python, numpy, torch and every GPU, as JSON values."""
    _, words, gauss = random.getstate()
    name, key, *rest = np.random.get_state(legacy=True)
    return {
        "python": [list(words), gauss],
        "numpy": [name, np.asarray(key).tolist(), *rest],
        "torch": _hex(torch.random.get_rng_state()),
        "cuda": [_hex(torch.cuda.get_rng_state(at)) for at in range(torch.cuda.device_count())],
    }


def _hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def load_random(directory: Path, rank: int) -> None:
    """Restore the random number generators of this process, the one with `rank`."""
    saved = load_json(directory / _RANDOM_FILE)[rank]
    words, gauss = saved["python"]
    random.setstate((3, tuple(words), gauss))
    name, key, *rest = saved["numpy"]
    np.random.set_state((name, np.array(key, np.uint32), *rest))
    torch.random.set_rng_state(_bytes(saved["torch"]))
    for index, state in list(enumerate(saved["cuda"]))[: torch.cuda.device_count()]:
        torch.cuda.set_rng_state(_bytes(state), index)
