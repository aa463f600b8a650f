"""One mapping over one file or many shards."""

import json
from pathlib import Path

import pytest
import torch

from qlx.errors import CorruptCheckpoint, InputRefused
from qlx.weights import open_weights, read_tensors, write_tensors

TENSORS = {
    "a": torch.randn(3, 4),
    "b": torch.randn(5).bfloat16(),
    "c": torch.arange(4, dtype=torch.uint8),
}


def sharded(directory: Path, index: dict[str, str] | None = None) -> Path:
    directory.mkdir()
    write_tensors(directory / "m-1.safetensors", {"a": TENSORS["a"]})
    write_tensors(directory / "m-2.safetensors", {name: TENSORS[name] for name in "bc"})
    mapping = index or {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-2.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))
    return directory


def test_shards_read_as_one(tmp_path: Path) -> None:
    back = read_tensors(sharded(tmp_path / "s"))
    assert all(torch.equal(back[name], TENSORS[name]) for name in TENSORS)
    weights = open_weights(tmp_path / "s")
    assert list(weights) == ["a", "b", "c"]
    assert weights.path_of("c").name == "m-2.safetensors"
    assert b"".join(weights.chunks("c")) == bytes([0, 1, 2, 3])


@pytest.mark.parametrize(
    "index",
    [
        {"a": "m-1.safetensors", "b": "m-2.safetensors"},
        {"a": "m-2.safetensors", "b": "m-2.safetensors", "c": "m-1.safetensors"},
        {"a": "../m-1.safetensors"},
        {"a": "gone.safetensors"},
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, index: dict[str, str]) -> None:
    with pytest.raises(CorruptCheckpoint):
        open_weights(sharded(tmp_path / "s", index))


def test_pickled_weights_are_not_weights(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputRefused, match="safetensors only"):
        open_weights(tmp_path)


def test_a_missing_name_is_named(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match="'zz'"):
        read_tensors(sharded(tmp_path / "s"), ["a", "zz"])


def test_an_index_that_names_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    index = sharded(tmp_path / "s") / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "m-1.safetensors", "a": "m-2.safetensors"}}')
    with pytest.raises(CorruptCheckpoint, match="a name appears twice"):
        open_weights(tmp_path / "s")
