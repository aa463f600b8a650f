"""The writing of a merge: what moves, what is hashed, what happens when something goes wrong."""

import json
import os
import shutil
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qlx.checkpoint import (
    fingerprint_directory,
    known,
    known_hashes,
    resolve_source,
    tensors_digest,
    tensors_sha256,
)
from qlx.checkpoint.digest import _hashes
from qlx.errors import CorruptCheckpoint, NoRoom
from qlx.merging import engine, merged_value, plan_of, stream, write_merge
from qlx.weights import TensorInfo, open_weights, read_header, read_tensors, write_tensors
from tests.adapter_support import NF4, Case, make_adapter, make_base


def shard(directory):
    """Cut the one weight file of a model into three, names in turn."""
    tensors = read_tensors(directory / "model.safetensors")
    place = {name: f"part-{at % 3}.safetensors" for at, name in enumerate(sorted(tensors))}
    for file in sorted(set(place.values())):
        write_tensors(directory / file, {n: tensors[n] for n in tensors if place[n] == file})
    (directory / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": place}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A bf16 base as one file and the same in shards, and an adapter trained on it in NF4."""
    root = tmp_path_factory.mktemp("bases")
    single = make_base(root / "single", "llama", torch.bfloat16)
    sharded = shard(shutil.copytree(single, root / "sharded"))
    return single, sharded, make_adapter(single, root / "adapter", Case(quant=NF4))


def planned(base, adapter, dtype=None):
    return plan_of(adapter, resolve_source(str(base)), None, dtype, True)


@pytest.fixture(params=["single", "sharded"])
def base(request, bases):
    return bases[0] if request.param == "single" else bases[1]


def test_only_the_changed_tensors_move_and_all_digests_are_right(tmp_path, bases, base):
    plan = planned(base, bases[2])
    written = write_merge(plan, tmp_path)
    assert written.fingerprint == fingerprint_directory(base)
    assert written.codes == plan.spec.fingerprint
    before, after = open_weights(base), open_weights(tmp_path)
    assert [path.name for path in after.files] == [path.name for path in before.files]
    changed = {n for n in before if before.read_bytes(n) != after.read_bytes(n)}
    assert changed == set(plan.changes)
    assert [rounding.name for rounding in written.roundings] == sorted(changed)
    for path in after.files:
        entry = written.files[path.name]
        assert (entry.size, entry.of) == (path.stat().st_size, "tensors")
        assert entry.sha256 == tensors_sha256(path)
        assert read_header(path) == read_header(base / path.name)
    indexes = [d / "model.safetensors.index.json" for d in (base, tmp_path)]
    assert len({path.read_bytes() for path in indexes if path.exists()}) <= 1


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_the_bytes_do_not_depend_on_threads_or_blocks(tmp_path, bases, base, monkeypatch, dtype):
    plan = planned(base, bases[2], dtype)
    results = []
    for workers, chunk in ((1, 2**20), (2, 4096), (5, 100)):
        monkeypatch.setattr(engine, "CHUNK", chunk)
        target = tmp_path / str(workers)
        target.mkdir()
        write_merge(plan, target, workers=workers)
        results.append({path.name: path.read_bytes() for path in target.iterdir()})
    assert results[0] == results[1] == results[2]


def test_a_tensor_by_blocks_is_the_tensor_at_once(tmp_path, bases, monkeypatch):
    plan = planned(bases[0], bases[2], "float32")
    for name, change in plan.changes.items():
        whole, once = merged_value(plan, change)
        with monkeypatch.context() as patch:
            patch.setattr("qlx.merging.blocks.BLOCK", 640)
            blocks, apart = merged_value(plan, change)
        close = torch.allclose(whole, blocks, rtol=1e-6, atol=1e-7)  # BLAS sums by shape
        assert close, name
        assert apart.changed == once.changed
        assert apart.energy == pytest.approx(once.energy, rel=1e-5)
        assert apart.kept == pytest.approx(once.kept, rel=1e-5)


def test_another_dtype_is_written_anew_with_the_same_values(tmp_path, bases, base):
    plan = planned(base, bases[2], "float32")
    written = write_merge(plan, tmp_path)
    before, after = read_tensors(base), read_tensors(tmp_path)
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    untouched = before.keys() - plan.changes.keys()
    assert untouched
    assert all(torch.equal(after[name], before[name].float()) for name in untouched)
    for path in open_weights(tmp_path).files:
        assert written.files[path.name].sha256 == tensors_sha256(path)


def test_untouched_bytes_are_copied_by_the_kernel(tmp_path, bases, monkeypatch):
    copied = []
    real = stream._in_kernel

    def kernel(source, target, begin, to, count):
        copied.append(moved := real(source, target, begin, to, count))
        return moved

    monkeypatch.setattr(stream, "_in_kernel", kernel)
    plan = planned(bases[0], bases[2])
    write_merge(plan, tmp_path)
    untouched = sum(info.nbytes for name, info in plan.weights.items() if name not in plan.changes)
    assert sum(copied) == untouched > 0


def test_a_base_that_shrinks_meanwhile_stops_the_merge(tmp_path, bases):
    base = shutil.copytree(bases[0], tmp_path / "base")
    plan = planned(base, bases[2])
    file = base / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    (tmp_path / "target").mkdir()
    with pytest.raises(CorruptCheckpoint, match=r"became shorter|ended inside"):
        write_merge(plan, tmp_path / "target")


def test_a_defect_in_one_tensor_ends_all_threads(tmp_path, bases, monkeypatch):
    plan = planned(bases[1], bases[2])
    victim = sorted(plan.changes)[-1]
    real = engine.merged_blocks

    def broken(plan, change, *others):
        if change.name == victim:
            raise RuntimeError("broken")
        return real(plan, change, *others)

    monkeypatch.setattr(engine, "merged_blocks", broken)
    with pytest.raises(RuntimeError, match="broken"):
        write_merge(plan, tmp_path, workers=2)


def test_a_full_disk_is_found_before_a_byte_is_written(tmp_path, bases, monkeypatch):
    real = os.statvfs

    class Full:
        f_bavail, f_frsize = 3, 4096

    monkeypatch.setattr(os, "statvfs", lambda path: Full())
    with pytest.raises(NoRoom, match="12288 are free"):
        write_merge(planned(bases[0], bases[2]), tmp_path)
    monkeypatch.setattr(os, "statvfs", real)
    assert list(tmp_path.iterdir()) == []


def test_other_codes_and_another_base_have_other_fingerprints(tmp_path, bases):
    plan = planned(bases[0], bases[2])
    spec = plan.spec.model_copy(update={"scheme": "fp4"})
    (tmp_path / "fp4").mkdir()
    assert write_merge(replace(plan, spec=spec), tmp_path / "fp4").codes != plan.spec.fingerprint
    other = make_base(tmp_path / "other", "llama", torch.bfloat16, seed=9)
    (tmp_path / "moved").mkdir()
    moved = replace(plan, weights=open_weights(other))
    assert write_merge(moved, tmp_path / "moved").fingerprint != fingerprint_directory(bases[0])


def remembered(base, tmp_path, monkeypatch):
    """A cache in which the hashes of the base's files are kept."""
    monkeypatch.setenv("QLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known, "SETTLED_SECONDS", -1.0)
    fingerprint_directory(base)


def test_a_known_base_is_not_hashed_again_and_gives_the_same(tmp_path, bases, base, monkeypatch):
    plan = planned(base, bases[2])
    (tmp_path / "first").mkdir()
    first = write_merge(plan, tmp_path / "first")
    remembered(base, tmp_path, monkeypatch)
    monkeypatch.setattr(engine, "_hash", None)
    (tmp_path / "second").mkdir()
    second = write_merge(plan, tmp_path / "second")
    assert second == first
    for path in (tmp_path / "first").iterdir():
        assert (tmp_path / "second" / path.name).read_bytes() == path.read_bytes()


def test_a_merge_remembers_what_it_read(tmp_path, bases, base, monkeypatch):
    monkeypatch.setenv("QLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known, "SETTLED_SECONDS", -1.0)
    (tmp_path / "merged").mkdir()
    write_merge(planned(base, bases[2]), tmp_path / "merged")
    for path, header in open_weights(base).headers.items():
        hashes = known_hashes(path, header.tensors)
        assert tensors_digest(b"", header.tensors, hashes) == tensors_digest(
            b"", header.tensors, _hashes(dict.fromkeys(header.tensors.values(), path))
        )


def test_a_known_base_that_changes_meanwhile_is_noticed(tmp_path, bases, monkeypatch):
    base = shutil.copytree(bases[0], tmp_path / "base")
    remembered(base, tmp_path, monkeypatch)
    plan, write = planned(base, bases[2]), engine.copy_range

    def touched(*arguments):
        os.utime(base / "model.safetensors")
        return write(*arguments)

    monkeypatch.setattr(engine, "copy_range", touched)
    (tmp_path / "merged").mkdir()
    with pytest.raises(CorruptCheckpoint, match="changed while it was read"):
        write_merge(plan, tmp_path / "merged")


def test_an_error_in_one_thread_stops_the_others(tmp_path, bases, monkeypatch):
    """The first thread is busy with the rest of the work when the second one fails."""
    plan = planned(bases[1], bases[2])
    begun, done, failed = threading.Barrier(2), [], threading.Event()
    real = engine._Job.run

    def run(self, item):
        if not failed.is_set():
            begun.wait(10)
            if threading.current_thread().name.endswith("_1"):
                failed.set()
                raise RuntimeError("broken")
            failed.wait(10)
        time.sleep(0.05)
        real(self, item)
        done.append(item.name)

    monkeypatch.setattr(engine._Job, "run", run)
    with pytest.raises(RuntimeError, match="broken"):
        write_merge(plan, tmp_path, workers=2)
    assert len(done) < 5 < len(plan.weights)


def item(name, file, size):
    """A tensor of one file of a base."""
    info = TensorInfo(name, "U8", (size,), 0, size)
    return engine._Item(name, (Path(file), info), None, None)


def test_threads_take_tensors_of_different_files():
    large = [item(f"large {size}", "large", 100 + size) for size in range(3)]
    small = [item(f"small {size}", "small", 1 + size) for size in range(2)]
    queue = engine._Queue([*large, *small])
    first, second = queue.take(None), queue.take(None)
    assert (first.name, second.name) == ("large 2", "small 1")  # the largest of each
    assert queue.take(first).name == "large 1"  # of the file that nobody writes to
    assert queue.take(second).name == "small 0"
    assert queue.take(None).name == "large 0"  # no file is free: it goes on all the same
    assert queue.take(None) is None


@pytest.fixture(scope="module")
def plain(bases, tmp_path_factory):
    """An adapter on the base as it is, whose changed tensors are read by rows."""
    return make_adapter(bases[0], tmp_path_factory.mktemp("plain") / "adapter", Case())


def test_one_bit_of_a_changed_tensor_is_another_base(tmp_path, bases, plain):
    base = shutil.copytree(bases[0], tmp_path / "base")
    plan = planned(base, plain)
    last = plan.weights[sorted(plan.changes)[-1]]
    with open(base / "model.safetensors", "r+b") as file:
        file.seek(last.end - 1)
        byte = file.read(1)[0]
        file.seek(last.end - 1)
        file.write(bytes([byte ^ 1]))
    (tmp_path / "merged").mkdir()
    found = write_merge(plan, tmp_path / "merged").fingerprint
    assert found != fingerprint_directory(bases[0])
    assert found == fingerprint_directory(base)


def test_a_merge_onto_another_file_system_has_the_same_bytes(tmp_path, bases, plain):
    plan = planned(bases[1], plain)
    write_merge(plan, tmp_path)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        if os.stat(memory).st_dev == os.stat(tmp_path).st_dev:
            pytest.skip("/dev/shm is no file system of its own")
        write_merge(plan, Path(memory))
        for path in tmp_path.iterdir():
            assert (Path(memory) / path.name).read_bytes() == path.read_bytes()
