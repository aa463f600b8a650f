"""Lineage: which commands, with which versions, made a checkpoint out of what."""

import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import qlx
from qlx.checkpoint.manifest import Step

__all__ = ["next_step"]

_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors", "onnx", "onnxruntime")


def next_step(
    command: str,
    *,
    parents: Iterable[str],
    recipe_digest: str | None = None,
    seed: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Step:
    """A lineage step of this process: the command, what it read, and the versions that ran.

    `parents` are manifest digests of qlx checkpoints or fingerprints of plain directories.
    """
    return Step(
        command=command,
        versions=_versions(),
        parents=tuple(parents),
        recipe_digest=recipe_digest,
        seed=seed,
        options=dict(options or {}),
    )


def _versions() -> dict[str, str]:
    found = {"qlx": qlx.__version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
