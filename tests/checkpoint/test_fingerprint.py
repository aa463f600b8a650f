"""fingerprint: blind to sharding, file names and order; sensitive to every bit, name, shape and dtype."""

import json
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlx.checkpoint import fingerprint, fingerprint_directory
from qlx.weights import write_tensors

TENSORS = {
    "a": torch.randn(4, 6),
    "b": torch.randn(8).half(),
    "c": torch.arange(8, dtype=torch.int64),
}


def single(
    directory: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> str:
    directory.mkdir()
    write_tensors(directory / "model.safetensors", tensors, metadata)
    return fingerprint_directory(directory)


def test_sharding_and_metadata_do_not_matter(tmp_path: Path) -> None:
    whole = single(tmp_path / "whole", TENSORS)
    parts = tmp_path / "parts"
    parts.mkdir()
    for name, tensor in TENSORS.items():
        write_tensors(parts / f"{name}.safetensors", {name: tensor})
    index = {"weight_map": {name: f"{name}.safetensors" for name in TENSORS}}
    (parts / "model.safetensors.index.json").write_text(json.dumps(index))
    assert fingerprint_directory(parts) == whole
    assert single(tmp_path / "meta", TENSORS, {"other": "x"}) == whole


def test_name_shape_and_dtype_matter(tmp_path: Path) -> None:
    whole = single(tmp_path / "whole", TENSORS)
    changes = {
        "renamed": {**{k: v for k, v in TENSORS.items() if k != "a"}, "z": TENSORS["a"]},
        "reshaped": {**TENSORS, "a": TENSORS["a"].reshape(6, 4)},
        "reread": {**TENSORS, "b": TENSORS["b"].view(torch.bfloat16)},
        "swapped": {**TENSORS, "c": TENSORS["c"].flip(0)},
        "fewer": {k: v for k, v in TENSORS.items() if k != "c"},
    }
    assert (
        len({whole, *(single(tmp_path / name, tensors) for name, tensors in changes.items())})
        == len(changes) + 1
    )


@settings(max_examples=60, deadline=None)
@given(data=st.binary(min_size=1, max_size=64), bit=st.integers(0, 511), cut=st.integers(0, 64))
def test_any_bit_matters_and_pieces_do_not(data: bytes, bit: int, cut: int) -> None:
    def of(*pieces: bytes) -> str:
        return fingerprint([("t", "U8", (len(data),), pieces)])

    assert of(data) == of(data[:cut], data[cut:])
    changed = bytearray(data)
    changed[bit // 8 % len(data)] ^= 1 << bit % 8
    assert of(bytes(changed)) != of(data)
