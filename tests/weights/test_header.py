"""The strict header: what the reference reader lets through is refused here."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from qlx.errors import CorruptCheckpoint
from qlx.weights import read_arrays, read_header, write_arrays

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "U8", "shape": [3], "data_offsets": [8, 11]}


def write(path: Path, header: Any, data: bytes = b"\0" * 11) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_well_formed_file_is_read(tmp_path: Path) -> None:
    header = read_header(write(tmp_path / "x", {"b": B, "a": A, "__metadata__": {"k": "v"}}))
    assert list(header.tensors) == ["a", "b"]
    assert header.tensors["b"].nbytes == 3
    assert header.tensors["a"].count == 2
    assert header.metadata == {"k": "v"}


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b'{"a":' + json.dumps(A).encode() + b',"a":' + json.dumps(A).encode() + b"}", "twice"),
        ({"a": {**A, "shape": [3]}, "b": B}, "does not fill"),
        ({"a": {**A, "dtype": "F99"}, "b": B}, "unknown dtype"),
        ({"a": {**A, "shape": [-2]}, "b": B}, "bad shape"),
        ({"a": {**A, "shape": [True, 2]}, "b": B}, "bad shape"),
        ({"a": {**A, "extra": 1}, "b": B}, "exactly dtype"),
        ({"a": A, "b": {**B, "data_offsets": [7, 10]}}, "gap or overlaps"),
        ({"a": A}, "its tensors end"),
        ({"a": A, "b": B, "__metadata__": {"k": 1}}, "__metadata__"),
        ([1], "not an object"),
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[" + b"9" * 5000 + b"]", "not valid JSON"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, header: Any, says: str) -> None:
    with pytest.raises(CorruptCheckpoint, match=says):
        read_header(write(tmp_path / "x", header))


@pytest.mark.parametrize(
    "data", [b"", b"1234567", (2**62).to_bytes(8, "little"), (50).to_bytes(8, "little") + b"{}"]
)
def test_truncated_and_absurd_lengths_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(CorruptCheckpoint):
        read_header(tmp_path / "x")


def test_every_truncation_of_a_real_file_is_refused(tmp_path: Path) -> None:
    save_file({"a": np.arange(6, dtype=np.float32), "b": np.zeros(3, np.uint8)}, tmp_path / "x")
    whole = (tmp_path / "x").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "y").write_bytes(whole[:length])
        with pytest.raises(CorruptCheckpoint):
            read_header(tmp_path / "y")


dtypes = st.sampled_from(["float32", "float16", "uint8", "int64", "bool"])
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(dtypes, shapes), max_size=5))
def test_written_files_come_back_here_and_in_the_reference_reader(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    tensors.pop("__metadata__", None)
    arrays = {
        name: np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
        for name, (dtype, shape) in tensors.items()
    }
    path = tmp_path_factory.mktemp("w") / "x.safetensors"
    write_arrays(path, arrays, {"task": "t"})
    for back in (read_arrays(path), load_file(path)):
        assert set(back) == set(arrays)
        assert all(
            np.array_equal(back[name], arrays[name]) and back[name].dtype == arrays[name].dtype
            for name in arrays
        )


def test_two_writes_are_byte_identical_whatever_the_order(tmp_path: Path) -> None:
    a, b = np.arange(3, dtype=np.uint8), np.arange(4, dtype=np.float32)
    write_arrays(tmp_path / "1", {"a": a, "b": b}, {"x": "1", "y": "2"})
    write_arrays(tmp_path / "2", {"b": b, "a": a}, {"y": "2", "x": "1"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
