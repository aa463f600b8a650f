"""The format's laws: round trips, byte identity, and every kind of tampering named."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from qlx.checkpoint import (
    AdapterSpec,
    BaseRef,
    FileEntry,
    Manifest,
    Probe,
    ProbeRecord,
    ProbeResult,
    QuantSpec,
    new_checkpoint,
    next_step,
    open_checkpoint,
    read_manifest,
    read_probe,
    seal,
    tensors_sha256,
    write_probe,
)
from qlx.checkpoint.manifest import parse_manifest
from qlx.errors import CorruptCheckpoint, InputRefused, UnsafeInput, Unsupported
from qlx.weights import read_header, write_arrays

MARK = "sha256:" + "ab" * 32


def manifest() -> Manifest:
    return Manifest(
        kind="adapter",
        task="causal-lm",
        tag="tiny_SFT_LoRa8_QLORA_w4",
        base=BaseRef(name="base", fingerprint=MARK),
        quantization=QuantSpec(
            method="qlora", scheme="nf4", group_size=64, weight_bits=4, modules=("a.q",)
        ),
        adapter=AdapterSpec(rank=8, alpha=16, tensors={"a.q": "a.query.weight"}),
        lineage=(next_step("train", parents=[MARK], seed=1, options={"x": 1}),),
        probe=ProbeRecord(reference="unmerged"),
    )


def probe() -> Probe:
    logits = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    ids = np.array([[1, 2, 3], [4, 5, 0]])
    return Probe(
        "causal-lm",
        {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64)},
        logits,
        base=logits * 2,
        labels=ids,
    )


def make(target: Path) -> Path:
    with new_checkpoint(target) as staging:
        write_probe(staging / "probe.safetensors", probe())
        (staging / "config.json").write_text('{"model_type": "llama"}')
        seal(staging, manifest())
    return target


def test_manifest_round_trip() -> None:
    sealed = manifest().with_result(
        ProbeResult(step="merge", against="reference", metrics={"relative": 1e-7}, passed=True)
    )
    again = parse_manifest(sealed.model_dump(mode="json"), "here")
    assert again == sealed
    assert again.to_bytes() == sealed.to_bytes()


def test_open_returns_what_was_sealed(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make(tmp_path / "a"))
    assert checkpoint.manifest.model_copy(update={"files": {}}) == manifest()
    assert set(checkpoint.manifest.files) == {"probe.safetensors", "config.json"}
    back, original = read_probe(checkpoint.path), probe()
    assert np.array_equal(back.reference, original.reference)
    assert back.base is not None and back.native is None and back.mask is not None
    assert back.mask.tolist() == [[True, True, True], [True, True, False]]


def test_same_content_gives_same_bytes_from_any_directory(tmp_path: Path) -> None:
    first, second = make(tmp_path / "a"), make(tmp_path / "elsewhere" / "b")
    names = sorted(os.listdir(first))
    assert names == sorted(os.listdir(second))
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    for name in ("config.json", "probe.safetensors", "qlx.json"):
        whole = (path / name).read_bytes()
        for position in range(0, len(whole), max(1, len(whole) // 60)):
            changed = bytearray(whole)
            changed[position] ^= 1 << (position % 8)
            (path / name).write_bytes(changed)
            with pytest.raises((CorruptCheckpoint, Unsupported), match=name):
                open_checkpoint(path)
        (path / name).write_bytes(whole)
    open_checkpoint(path)


def test_missing_added_and_renamed_files_are_named(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    (path / "extra.txt").write_text("x")
    with pytest.raises(CorruptCheckpoint, match=r"extra\.txt"):
        open_checkpoint(path)
    (path / "extra.txt").unlink()
    (path / "config.json").rename(path / "other.json")
    with pytest.raises(CorruptCheckpoint, match=r"config\.json.*missing"):
        open_checkpoint(path)


def test_links_and_directories_are_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    (path / "link").symlink_to("/etc/passwd")
    with pytest.raises(UnsafeInput, match="link"):
        open_checkpoint(path)
    (path / "link").unlink()
    (path / "sub").mkdir()
    with pytest.raises(UnsafeInput, match="sub"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["a b", ".hidden", "ü", "x" * 201])
def test_names_the_format_does_not_allow_cannot_be_sealed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(CorruptCheckpoint, match="file name"):
        seal(tmp_path, manifest())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"files": {"../x": {"size": 1, "sha256": "0" * 64}}}, "not allowed as a file name"),
        ({"kind": "other"}, "kind"),
        ({"surprise": 1}, "surprise"),
        ({"base": None}, "needs the fields adapter and base"),
        ({"base": {"name": "b", "fingerprint": "md5:0"}}, "fingerprint"),
        (
            {
                "probe": {
                    "reference": "r",
                    "results": [
                        {"step": "s", "against": "a", "metrics": {"x": "nan"}, "passed": True}
                    ],
                }
            },
            "metrics",
        ),
    ],
)
def test_fields_out_of_line_are_named(change: dict[str, object], says: str) -> None:
    with pytest.raises(CorruptCheckpoint, match=says):
        parse_manifest({**manifest().model_dump(mode="json"), **change}, "q")


def test_newer_versions_and_non_checkpoints_are_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    text = (path / "qlx.json").read_text()
    (path / "qlx.json").write_text(text.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(Unsupported, match="version 2 is newer"):
        read_manifest(path)
    with pytest.raises(InputRefused, match=r"no qlx\.json"):
        read_manifest(tmp_path)
    with pytest.raises(InputRefused, match="not a directory"):
        read_manifest(tmp_path / "nowhere")


def test_probe_of_uneven_length_is_refused(tmp_path: Path) -> None:
    bad = Probe(
        "causal-lm", {"input_ids": np.zeros((3, 2), np.int64)}, np.zeros((2, 2, 4), np.float32)
    )
    write_probe(tmp_path / "probe.safetensors", bad)
    with pytest.raises(CorruptCheckpoint, match="different lengths"):
        read_probe(tmp_path)


def test_an_edited_manifest_is_refused_even_where_it_stays_valid(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    text = (path / "qlx.json").read_text()
    for old, new in (("LoRa8", "LoRa9"), ('"rank": 8', '"rank":  8'), ("\n}\n", "\n}\n\n")):
        assert old in text
        (path / "qlx.json").write_text(text.replace(old, new))
        with pytest.raises(CorruptCheckpoint, match="not as it was written"):
            open_checkpoint(path)
    seal(path, read_manifest(make(tmp_path / "b"))[0])
    open_checkpoint(path)


@pytest.fixture
def weights(tmp_path):
    """A directory with one weight file, and its entry by tensors."""
    arrays = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(5, np.int8)}
    write_arrays(tmp_path / "model.safetensors", arrays, {"format": "pt"})
    path = tmp_path / "model.safetensors"
    return tmp_path, FileEntry(size=path.stat().st_size, sha256=tensors_sha256(path), of="tensors")


def test_a_digest_by_tensors_follows_its_definition(weights):
    path = weights[0] / "model.safetensors"
    header, data = read_header(path), path.read_bytes()
    parts = [hashlib.sha256(data[header.tensors[name].begin : header.tensors[name].end]).digest()
             for name in ("a", "b")]  # fmt: skip
    wanted = hashlib.sha256(b"".join([data[: header.data_start], *parts])).hexdigest()
    assert weights[1].sha256 == wanted != hashlib.sha256(data).hexdigest()


def test_every_byte_counts_in_a_digest_by_tensors(weights):
    directory, entry = weights
    seal(directory, manifest().model_copy(update={"probe": None}), {"model.safetensors": entry})
    assert open_checkpoint(directory).manifest.files["model.safetensors"] == entry
    path = directory / "model.safetensors"
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(CorruptCheckpoint):
            open_checkpoint(directory)
    path.write_bytes(data)
    assert open_checkpoint(directory)


def test_the_rule_is_not_written_down(weights):
    assert FileEntry(size=1, sha256="0" * 64).model_dump() == {"size": 1, "sha256": "0" * 64}
    assert weights[1].model_dump()["of"] == "tensors"


def test_what_an_adapter_rarely_has_is_written_only_where_it_says_something():
    rare = {"initialized": "pissa", "trained_rank": 4, "new_tokens": ["<a>"]}
    plain = AdapterSpec(rank=8).model_dump(mode="json")
    assert not rare.keys() & plain.keys()
    full = AdapterSpec.model_validate({**plain, **rare})
    assert full.model_dump(mode="json") == {**plain, **rare}
    assert AdapterSpec.model_validate(full.model_dump(mode="json")) == full
    with pytest.raises(ValueError, match="initialized"):
        AdapterSpec.model_validate({**plain, "initialized": "otherwise"})
