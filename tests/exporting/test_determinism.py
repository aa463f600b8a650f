"""The same checkpoint gives the same bytes, in another process, with another hash seed, in another place."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from qlx.exporting import export_onnx
base = sys.argv[3] if len(sys.argv) > 3 else None
print(export_onnx(sys.argv[1], sys.argv[2], base=base).digest)
"""


def exported_elsewhere(seed, *arguments):
    """Digest of an export made by a fresh process in its own working directory."""
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=arguments[1].parent,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    "task", ["image-classification", pytest.param("causal-lm", marks=pytest.mark.exhaustive)]
)
def test_another_process_writes_the_same_bytes(exported, merged, task, tmp_path):
    assert exported_elsewhere("1", merged[task].path, tmp_path / "out") == exported[task].digest


@pytest.mark.exhaustive
def test_an_unmerged_export_is_the_same_bytes_too(separate, adapters, bases, tmp_path):
    key = ("llama", "fp4")
    found = exported_elsewhere("2", adapters[key].path, tmp_path / "out", bases["llama"])
    assert found == separate[key].digest


def test_another_model_gives_other_bytes(exported, separate):
    files = [each.path / "model.onnx.data" for each in (*separate.values(), exported["causal-lm"])]
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.exists()]
    assert len(hashes) == 3
    assert len(set(hashes)) == 3


def test_nothing_of_the_place_or_the_tools_is_in_the_graph(exported):
    for each in exported.values():
        data = (each.path / "model.onnx").read_bytes()
        for trace in (str(ROOT), "site-packages", "torch", "/tmp", "transformers", ".py"):
            assert trace.encode() not in data, trace
