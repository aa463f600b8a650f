"""Copying, reading and overwriting bytes: nothing outside the named tensors moves."""

import errno
import os

import pytest
import torch

from qlx.errors import CorruptCheckpoint
from qlx.merging import stream
from qlx.merging.stream import bytes_of, copy_file, load_tensor, overwrite, pieces, write_shards
from qlx.weights import open_weights, read_tensors, torch_dtype_name, write_tensors


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {
        "a": torch.randn(5, 3),
        "b": torch.randn(4, 4).bfloat16(),
        "c": torch.arange(7, dtype=torch.uint8),
        "d": torch.randn(2, 2, 2).half(),
    }


@pytest.fixture
def single(tmp_path, tensors):
    directory = tmp_path / "single"
    directory.mkdir()
    write_tensors(directory / "model.safetensors", tensors)
    return directory


def test_copy_is_the_same_bytes_with_and_without_the_kernel(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.write_bytes(os.urandom(3 * 2**20 + 17))
    assert copy_file(source, tmp_path / "kernel") == source.stat().st_size
    calls = []

    def refuse(*args):
        calls.append(args)
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(stream, "_in_kernel", refuse)
    copy_file(source, tmp_path / "by_hand")
    assert len(calls) == 1
    assert source.read_bytes() == (tmp_path / "kernel").read_bytes()
    assert source.read_bytes() == (tmp_path / "by_hand").read_bytes()


def test_other_errors_of_the_kernel_are_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "source").write_bytes(b"1234")

    def full(*args):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(stream, "_in_kernel", full)
    with pytest.raises(OSError, match="disk full"):
        copy_file(tmp_path / "source", tmp_path / "target")


def test_an_empty_file_is_copied(tmp_path):
    (tmp_path / "source").touch()
    assert copy_file(tmp_path / "source", tmp_path / "target") == 0
    assert (tmp_path / "target").read_bytes() == b""


def test_load_gives_every_tensor_as_it_was(single, tensors):
    weights = open_weights(single)
    for name, tensor in tensors.items():
        assert torch.equal(load_tensor(weights, name), tensor)
        assert load_tensor(weights, name).dtype == tensor.dtype


def test_load_names_a_file_that_shrank(single):
    weights = open_weights(single)
    path = single / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CorruptCheckpoint, match="ended inside"):
        for name in weights:
            load_tensor(weights, name)


def test_overwrite_changes_one_tensor_and_no_other_byte(single, tensors):
    weights = open_weights(single)
    path = single / "model.safetensors"
    before = path.read_bytes()
    overwrite(path, [(weights["b"], -tensors["b"])])
    after, info = path.read_bytes(), weights["b"]
    assert after[: info.begin] == before[: info.begin]
    assert after[info.end :] == before[info.end :]
    assert torch.equal(read_tensors(path)["b"], -tensors["b"])


def test_overwrite_refuses_another_size(single, tensors):
    weights = open_weights(single)
    with pytest.raises(CorruptCheckpoint, match="'b' needs 32 bytes, got 64"):
        overwrite(single / "model.safetensors", [(weights["b"], tensors["b"].float())])


def test_bytes_share_the_tensors_memory(tensors):
    view = bytes_of(tensors["c"])
    tensors["c"][0] = 99
    assert view[0] == 99


@pytest.mark.parametrize("sharded", [False, True])
def test_shards_are_written_anew_with_new_tensors_in_the_last(tmp_path, tensors, sharded):
    source = tmp_path / "source"
    source.mkdir()
    if sharded:
        write_tensors(source / "one.safetensors", {name: tensors[name] for name in "ab"})
        write_tensors(source / "two.safetensors", {name: tensors[name] for name in "cd"})
        index = {"weight_map": {"a": "one", "b": "one", "c": "two", "d": "two"}}
        index["weight_map"] = {k: f"{v}.safetensors" for k, v in index["weight_map"].items()}
        (source / "model.safetensors.index.json").write_text(__import__("json").dumps(index))
    else:
        write_tensors(source / "model.safetensors", tensors)
    wanted = {**tensors, "a": tensors["a"].half(), "new": torch.ones(3)}
    entries = {
        name: (torch_dtype_name(value.dtype), tuple(value.shape), pieces(lambda value=value: value))
        for name, value in wanted.items()
    }
    target = tmp_path / "target"
    target.mkdir()
    write_shards(target, open_weights(source), entries)
    result = read_tensors(target)
    assert {name: value.dtype for name, value in result.items()} == {
        name: value.dtype for name, value in wanted.items()
    }
    assert all(torch.equal(result[name], value) for name, value in wanted.items())
    assert len(open_weights(target).files) == (2 if sharded else 1)
