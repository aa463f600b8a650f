"""Hashes that are kept between commands: used only for a file that is what it was."""

import os
import shutil
import time

import numpy as np
import pytest

from qlx.checkpoint import fingerprint_directory, known, known_hashes, remember_hashes
from qlx.checkpoint.known import Stamp
from qlx.weights import read_header, write_arrays

HASHES = {"bias": "a" * 64, "weight": "b" * 64}


@pytest.fixture
def weights(tmp_path):
    """A model directory with two tensors, and its weight file."""
    path = tmp_path / "model" / "model.safetensors"
    path.parent.mkdir()
    write_arrays(path, {"weight": np.ones((3, 4), np.float32), "bias": np.zeros(3, np.float32)})
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own; files count as settled at once."""
    monkeypatch.setenv("QLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known, "SETTLED_SECONDS", -1.0)
    return tmp_path / "cache" / "hashes"


def look(path):
    return known_hashes(path, read_header(path).tensors)


def test_what_was_found_is_kept_and_used(weights, cache):
    first = fingerprint_directory(weights.parent)
    kept = look(weights)
    assert set(kept) == {"bias", "weight"}
    assert fingerprint_directory(weights.parent) == first
    remember_hashes(weights, Stamp.of(weights), {**kept, "bias": "a" * 64})
    assert fingerprint_directory(weights.parent) != first  # so it was the kept ones that were used


def test_a_changed_file_is_read_again_even_with_its_old_date(weights, cache):
    first = fingerprint_directory(weights.parent)
    before = weights.stat()
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_mtime_ns == before.st_mtime_ns
    assert not look(weights)
    assert fingerprint_directory(weights.parent) != first


def test_a_copy_is_another_file(weights, cache, tmp_path):
    first = fingerprint_directory(weights.parent)
    copied = shutil.copytree(weights.parent, tmp_path / "copy")
    assert not look(copied / weights.name)
    assert fingerprint_directory(copied) == first


def test_a_file_just_written_is_not_remembered(weights, cache, monkeypatch):
    monkeypatch.setattr(known, "SETTLED_SECONDS", 60.0)
    fingerprint_directory(weights.parent)
    assert not look(weights)
    os.utime(weights, (time.time() - 3600,) * 2)  # ctime is now, whatever the date says
    fingerprint_directory(weights.parent)
    assert not look(weights)


def test_a_file_that_changed_while_it_was_read_is_not_remembered(weights, cache):
    before = Stamp.of(weights)
    weights.write_bytes(weights.read_bytes())
    remember_hashes(weights, before, HASHES)
    assert not cache.exists()


@pytest.mark.parametrize(
    "entry",
    [
        b"",
        b"{",
        b"[]",
        b'{"bias": "aa"}\n',
        b'{"bias": 1, "weight": 2}\n',
        b'{"bias": "' + b"a" * 64 + b'"}\n',
    ],
)
def test_a_damaged_entry_is_as_none(weights, cache, entry):
    first = fingerprint_directory(weights.parent)
    (kept,) = cache.iterdir()
    kept.write_bytes(entry)
    assert not look(weights)
    assert fingerprint_directory(weights.parent) == first
    assert look(weights)


@pytest.mark.parametrize("value", ["off", "relative/path"])
def test_it_can_be_switched_off(weights, cache, monkeypatch, value):
    monkeypatch.setenv("QLX_CACHE", value)
    fingerprint_directory(weights.parent)
    assert not look(weights)
    assert not os.path.exists(value)


def test_a_directory_that_others_may_write_is_not_trusted(weights, cache):
    fingerprint_directory(weights.parent)
    assert look(weights)
    cache.chmod(0o777)
    assert not look(weights)


def test_a_place_that_cannot_be_written_costs_nothing(weights, cache, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLX_CACHE", str(tmp_path / "file"))
    assert fingerprint_directory(weights.parent)


def test_the_oldest_entries_go(weights, cache, monkeypatch, tmp_path):
    monkeypatch.setattr(known, "_ENTRIES", 3)
    for at in range(5):
        path = tmp_path / f"{at}.safetensors"
        shutil.copy(weights, path)
        remember_hashes(path, Stamp.of(path), HASHES)
        time.sleep(0.01)
    assert len(list(cache.iterdir())) == 3
    assert look(tmp_path / "4.safetensors") and not look(tmp_path / "0.safetensors")
