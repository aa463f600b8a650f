"""Reading and copying bytes of weight files."""

import errno
import os

import pytest
import torch

from qlx.errors import CorruptCheckpoint
from qlx.merging import stream
from qlx.merging.stream import bytes_of, copy_range, load_tensor
from qlx.weights import open_weights, read_rows, write_tensors


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {
        "a": torch.randn(5, 3),
        "b": torch.randn(4, 4).bfloat16(),
        "c": torch.arange(7, dtype=torch.uint8),
        "d": torch.randn(2, 2, 2).half(),
        "e": torch.tensor(3.5),
    }


@pytest.fixture
def single(tmp_path, tensors):
    directory = tmp_path / "single"
    directory.mkdir()
    write_tensors(directory / "model.safetensors", tensors)
    return directory


@pytest.fixture
def pair(tmp_path):
    """Descriptors of 3 MiB of noise and of an empty file."""
    (tmp_path / "source").write_bytes(os.urandom(3 * 2**20 + 17))
    with open(tmp_path / "source", "rb") as source, open(tmp_path / "target", "w+b") as target:
        yield source.fileno(), target.fileno()


@pytest.mark.parametrize("refusal", [None, errno.EXDEV, errno.ENOSYS])
def test_a_range_is_copied_with_and_without_the_kernel(pair, monkeypatch, refusal):
    calls = []
    real = stream._in_kernel

    def kernel(*args):
        calls.append(args)
        if refusal is not None:
            raise OSError(refusal, "not here")
        return real(*args)

    monkeypatch.setattr(stream, "_in_kernel", kernel)
    copy_range(*pair, 5, 100, 3 * 2**20)
    assert calls
    assert os.pread(pair[1], 3 * 2**20, 100) == os.pread(pair[0], 3 * 2**20, 5)
    assert os.fstat(pair[1]).st_size == 100 + 3 * 2**20


def test_other_errors_of_the_kernel_are_not_hidden(pair, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(stream, "_in_kernel", full)
    with pytest.raises(OSError, match="disk full"):
        copy_range(*pair, 0, 0, 10)


def test_a_source_that_shrank_is_found(pair):
    with pytest.raises(CorruptCheckpoint, match="became shorter"):
        copy_range(*pair, 3 * 2**20, 0, 18)


def test_load_gives_every_tensor_as_it_was(single, tensors):
    weights = open_weights(single)
    for name, tensor in tensors.items():
        assert torch.equal(load_tensor(weights, name), tensor)
        assert load_tensor(weights, name).dtype == tensor.dtype


def test_rows_are_those_of_the_tensor(single, tensors):
    weights = open_weights(single)
    for name in "abcd":
        assert torch.equal(read_rows(weights, name, slice(1, 2)), tensors[name][1:2])
    assert torch.equal(read_rows(weights, "e", slice(0, 1)), tensors["e"].reshape(1))


def test_load_names_a_file_that_shrank(single):
    weights = open_weights(single)
    path = single / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    for load in (load_tensor, lambda weights, name: read_rows(weights, name, slice(0, 7))):
        with pytest.raises(CorruptCheckpoint, match="ended inside tensor 'c'"):
            load(weights, "c")


def test_bytes_share_the_tensors_memory(tensors):
    view = bytes_of(tensors["c"])
    tensors["c"][0] = 99
    assert view[0] == 99


def test_gathered_blocks_are_written_whole_even_when_the_system_writes_less(tmp_path, monkeypatch):
    blocks = [bytes([at]) * (at % 7 * 1000 + 1) for at in range(50)]
    whole = b"".join(blocks)
    groups = list(stream.gathered(map(memoryview, blocks), 9000))
    assert [len(b"".join(group)) >= 9000 for group in groups[:-1]] == [True] * (len(groups) - 1)
    real = os.pwritev
    for most in (10**9, 2500, 1):
        monkeypatch.setattr(
            stream.os, "pwritev", lambda fd, parts, at, most=most: os.pwrite(fd, b"".join(parts)[:most], at)
        )  # fmt: skip
        with open(tmp_path / "out", "wb") as file:
            at = 5
            for group in groups:
                at += stream.write_all_at(file.fileno(), group, at)
        assert (tmp_path / "out").read_bytes() == bytes(5) + whole
    monkeypatch.setattr(stream.os, "pwritev", real)
    monkeypatch.setattr(stream, "_MOST", 3)
    assert {len(group) for group in stream.gathered(map(memoryview, blocks), 10**9)} == {3, 2}
