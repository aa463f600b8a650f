"""Checkpoints written by every released format version still open, and still compute what they did."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from qlx.checkpoint import FORMAT_VERSION, open_checkpoint
from qlx.verification import verify
from qlx.weights import read_arrays, write_arrays

HERE = Path(__file__).parent
VERSIONS = sorted(HERE.glob("v*"))
CHECKPOINTS = [path for version in VERSIONS for path in sorted(version.iterdir())]


def test_there_is_one_of_every_kind_for_every_version() -> None:
    assert [path.name for path in VERSIONS] == [f"v{n}" for n in range(1, FORMAT_VERSION + 1)]
    for version in VERSIONS:
        kinds = {open_checkpoint(path).manifest.kind for path in version.iterdir()}
        assert kinds == {"run", "adapter", "merged", "packed", "onnx"}


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_it_opens_and_replays(path: Path) -> None:
    base = path.parent / "base" if path.name == "adapter" else None
    report = verify(path, base=base)
    assert report.passed, [check for check in report.checks if not check.passed]


def test_a_replay_here_can_fail(tmp_path: Path) -> None:
    from qlx.checkpoint import read_manifest, seal

    copy = tmp_path / "merged"
    shutil.copytree(VERSIONS[0] / "merged", copy)
    arrays = read_arrays(copy / "model.safetensors")
    name = next(name for name in sorted(arrays) if name.endswith("query.weight"))
    write_arrays(
        copy / "model.safetensors", {**arrays, name: -np.asarray(arrays[name])}, {"format": "pt"}
    )
    seal(copy, read_manifest(copy)[0])
    assert not verify(copy).passed
