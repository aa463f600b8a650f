"""Writing a merge: every byte of the base is read once, hashed, and copied or replaced, on all cores.

Each tensor is one piece of work. Its bytes are hashed for the base's fingerprint; where they stay as
they are the kernel copies them in the same pass, otherwise the merged blocks are hashed and written
in their place. So the right base, the right codes and the digests of the new files are known when
the last byte is written, at the price of one pass; whoever calls checks them before the directory
appears. The hashes of files that have not changed since they were last read are known already
(`qlx.checkpoint.known`): of those only the tensors that change are read into memory.

Reads and writes go through file descriptors, not memory maps: a disk that fills up or a file that
shrinks is then an error instead of a signal.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from torch import Tensor

from qlx.checkpoint import (
    FileEntry,
    Stamp,
    canonical_json,
    fingerprint_line,
    fingerprint_of_lines,
    known_hashes,
    remember_hashes,
    tensors_digest,
)
from qlx.errors import CorruptCheckpoint, NoRoom
from qlx.merging.blocks import merged_blocks, tally_of
from qlx.merging.change import Change
from qlx.merging.coded import CodedWeights
from qlx.merging.plan import MergePlan
from qlx.merging.stream import bytes_of, copy_range, gathered, write_all_at, write_at
from qlx.merging.values import Rounding, codes_as_trained
from qlx.quant import PackedTensor, grid_entries, one_torch_thread, packed_line
from qlx.weights import INDEX_FILE, SINGLE_FILE, TensorInfo, lay_out, read_into

__all__ = ["CHUNK", "Written", "cores", "target_files", "write_merge"]

CHUNK = 2**20
"""Bytes that are hashed and copied at a time; they stay in the processor's cache in between."""

GATHERED = 2 * 2**20
"""Bytes of merged blocks that are written at a time: a file's writers wait for each other."""

_COPIED = 16 * 2**20  # at a time, where nothing is hashed: often enough to stop on an error

Span = tuple[int, int]


@dataclass(frozen=True)
class Written:
    """What a merge found out while it wrote.

    `fingerprint` is the base's, `codes` that of the tensors which went through training's codec
    (None where none did), `moved` that of what an exact adapter made of them and `grids` their scales, by
    the names of `grid_entries` (empty for other adapters), `files` the entries of the weight files for the manifest.
    """

    roundings: tuple[Rounding, ...]
    fingerprint: str
    codes: str | None
    moved: str | None
    grids: Mapping[str, Tensor]
    files: Mapping[str, FileEntry]


@dataclass(frozen=True)
class TargetFile:
    """A weight file to write: the bytes before its data, and the place of every tensor in it."""

    name: str
    header: bytes
    places: Mapping[str, TensorInfo]

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return max((info.end for info in self.places.values()), default=len(self.header))


def cores() -> int:
    """The processor cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def target_files(plan: MergePlan) -> list[TargetFile]:
    """The weight files of the merged model: cut as the base's, new tensors in the last one."""
    weights = plan.weights
    if plan.in_place:
        return [_same_layout(path, weights.headers[path].tensors) for path in weights.files]
    shapes = {
        name: (plan.dtype_of(name), _shape(plan, name))
        for name in sorted({*weights, *plan.changes})
    }
    last = weights.files[-1]
    files = []
    for path in weights.files:
        here = {n: entry for n, entry in shapes.items() if weights.places.get(n, last) == path}
        files.append(TargetFile(path.name, *lay_out(here, {"format": "pt"})))
    return files


def _same_layout(path: Path, tensors: Mapping[str, TensorInfo]) -> TargetFile:
    start = min((info.begin for info in tensors.values()), default=path.stat().st_size)
    with open(path, "rb") as file:
        return TargetFile(path.name, file.read(start), tensors)


def _shape(plan: MergePlan, name: str) -> tuple[int, ...]:
    change = plan.changes.get(name)
    return plan.weights[name].shape if change is None else change.shape


def write_merge(plan: MergePlan, directory: Path, *, workers: int | None = None) -> Written:
    """Write the merged weight files into `directory`, on `workers` threads (default: all cores).

    The bytes written do not depend on the number of threads.

    Raises:
        NoRoom: the disk has less free space than the files need.
        CorruptCheckpoint: a file of the base ended early, or changed while it was read.
    """
    files = target_files(plan)
    _require_space(directory, sum(file.size for file in files))
    with ExitStack() as stack:
        stack.enter_context(one_torch_thread())
        targets = [stack.enter_context(_Target(directory, file)) for file in files]
        base = {path: _BaseFile(path, h.tensors) for path, h in plan.weights.headers.items()}
        job = _Job(plan, targets, base)
        count = workers or cores()
        queue, pool = _Queue(job.items()), stack.enter_context(_pool(count, job))
        threads = [pool.submit(job.work, queue) for _ in range(count)]
        for thread in wait(threads, return_when=FIRST_EXCEPTION).done:
            thread.result()
        job.close()
    _write_index(plan, directory, files)
    return job.written()


@contextmanager
def _pool(count: int, job: "_Job") -> Iterator[ThreadPoolExecutor]:
    """Threads that stop at once on an error."""
    with ThreadPoolExecutor(count) as pool:
        try:
            yield pool
        except BaseException:
            job.stopped = True
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _require_space(directory: Path, size: int) -> None:
    found = os.statvfs(directory)
    free = found.f_bavail * found.f_frsize
    if free < size:
        raise NoRoom(
            f"{directory.parent}: the merged weights need {size} bytes, {free} are free; nothing was written"
        )


def _write_index(plan: MergePlan, directory: Path, files: list[TargetFile]) -> None:
    """The shard index: the base's own bytes where nothing moved, a new one otherwise."""
    old = plan.weights.directory / INDEX_FILE
    if plan.in_place and old.is_file():
        (directory / INDEX_FILE).write_bytes(old.read_bytes())
    elif [file.name for file in files] != [SINGLE_FILE]:
        place = {name: file.name for file in files for name in file.places}
        total = sum(info.nbytes for file in files for info in file.places.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))}
        (directory / INDEX_FILE).write_bytes(canonical_json(index))


class _Stopped(Exception):
    """Another thread failed; the work is given up."""


class _Target:
    """A file being written, its tensors in any order."""

    def __init__(self, directory: Path, file: TargetFile) -> None:
        self.file = file
        self.path = directory / file.name
        self.hashes: dict[str, str] = {}

    def __enter__(self) -> "_Target":
        self.descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.truncate(self.descriptor, self.file.size)
        write_at(self.descriptor, memoryview(self.file.header), 0)
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.descriptor)

    def entry(self) -> FileEntry:
        """What the manifest says of the file once all its tensors are written."""
        digest = tensors_digest(self.file.header, self.file.places, self.hashes)
        return FileEntry(size=self.file.size, sha256=digest, of="tensors")


class _BaseFile:
    """A weight file of the base: the hashes of its tensors, known from before or found on the way."""

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self.path = path
        self.stamp = Stamp.of(path)
        self.known = known_hashes(path, names)
        self.found: dict[str, str] = {}

    def close(self) -> None:
        """Keep what was found; what was known holds only of a file that stayed as it was."""
        if not self.known:
            remember_hashes(self.path, self.stamp, self.found)
        elif Stamp.of(self.path) != self.stamp:
            raise CorruptCheckpoint(f"{self.path}: changed while it was read; merge again")


def _pieces(span: Span, size: int) -> Iterator[Span]:
    """Offset and length of the pieces of a span, cut at multiples of `size`."""
    at, end = span
    while at < end:
        count = min(end, (at // size + 1) * size) - at
        yield at, count
        at += count


def _hash(
    source: int, span: Span, buffer: memoryview, each: Callable[[int, int], None], what: str
) -> str:
    """Hex SHA-256 of the bytes of a span; `each` gets offset and length of a piece just read."""
    sha256 = hashlib.sha256()
    for at, size in _pieces(span, CHUNK):
        read_into(source, buffer[:size], at, f"{what}: became shorter while it was read")
        sha256.update(buffer[:size])
        each(at, size)
    return sha256.hexdigest()


@dataclass(frozen=True)
class _Item:
    """One tensor: where the base has it (None: nowhere), and what is written where (None: nothing)."""

    name: str
    source: tuple[Path, TensorInfo] | None
    target: tuple[_Target, TensorInfo] | None
    change: Change | None

    @property
    def file(self) -> str:
        """The file that is written, or else the one that is read."""
        if self.target is not None:
            return self.target[0].file.name
        assert self.source is not None
        return self.source[0].name

    def size(self) -> int:
        """Bytes, of the larger side."""
        return max(side[1].nbytes for side in (self.source, self.target) if side is not None)


class _Queue:
    """What is left to do, handed out so that as few threads as possible write to one file.

    The kernel lets one thread at a time write to a file, so two of them in one would mostly wait. The
    largest tensors come first, so that no core is idle for long at the end.
    """

    def __init__(self, items: Iterable[_Item]) -> None:
        self._left: dict[str, list[_Item]] = {}
        for item in sorted(items, key=_Item.size):
            self._left.setdefault(item.file, []).append(item)
        self._busy = dict.fromkeys(self._left, 0)
        self._bytes = {file: sum(map(_Item.size, items)) for file, items in self._left.items()}
        self._lock = threading.Lock()

    def take(self, last: _Item | None) -> _Item | None:
        """The next item for the thread that has finished `last`; None when none is left."""
        with self._lock:
            if last is not None:
                self._busy[last.file] -= 1
            files = [file for file, items in self._left.items() if items]
            if not files:
                return None
            file = min(files, key=lambda file: (self._busy[file], -self._bytes[file]))
            item = self._left[file].pop()
            self._busy[file] += 1
            self._bytes[file] -= item.size()
            return item


@dataclass
class _Job:
    """The state that all threads share."""

    plan: MergePlan
    targets: list[_Target]
    base: Mapping[Path, _BaseFile]
    lines: dict[str, str] = field(default_factory=dict)
    codes: dict[str, str] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    grids: dict[str, Tensor] = field(default_factory=dict)
    roundings: dict[str, Rounding] = field(default_factory=dict)
    stopped: bool = False
    _local: threading.local = field(default_factory=threading.local)

    def items(self) -> Iterator[_Item]:
        """All tensors of the base and of the result."""
        rest = {
            name: (path, info)
            for path, header in self.plan.weights.headers.items()
            for name, info in header.tensors.items()
        }
        for target in self.targets:
            for info in sorted(target.file.places.values(), key=lambda info: info.begin):
                source = rest.pop(info.name, None)
                change = self._change(info, source)
                yield _Item(info.name, source, (target, info), change)
        for name, source in rest.items():
            yield _Item(name, source, None, None)

    def _change(self, info: TensorInfo, source: tuple[Path, TensorInfo] | None) -> Change | None:
        """What happens to a tensor; None if its bytes are copied."""
        found = self.plan.changes.get(info.name)
        same = source is not None and source[1].dtype == info.dtype and not self._coded(info.name)
        return found if found is not None or same else Change(info.name, info.dtype, info.shape)

    @cached_property
    def coded(self) -> frozenset[str]:
        """The tensors whose codes must be those of training."""
        plan = self.plan
        checked = plan.onto == "as-trained" and plan.spec.fingerprint is not None
        return frozenset(plan.spec.tensors if checked else ())

    def _coded(self, name: str) -> bool:
        weights = self.plan.weights
        return isinstance(weights, CodedWeights) and name in weights.coded

    def work(self, queue: _Queue) -> None:
        """One thread's share: items until none is left."""
        item = queue.take(None)
        while item is not None:
            self.run(item)
            item = queue.take(item)

    def run(self, item: _Item) -> None:
        """Hash the base's bytes and write the result's."""
        if item.source is not None:
            self._read(item, *item.source)
        if item.change is not None and item.target is not None:
            self._replace(item.change, *item.target)
        if item.name in self.coded - self.codes.keys():
            spec = self.plan.spec
            self._note_codes(item.name, codes_as_trained(self.plan.weights, spec, item.name))

    def _read(self, item: _Item, path: Path, info: TensorInfo) -> None:
        """Hash a tensor of the base, unless that is known, and copy it where it stays as it is."""
        copy = item.target if item.change is None else None
        span, base = (info.begin, info.end), self.base[path]
        with open(path, "rb", buffering=0) as file:

            def each(at: int, size: int) -> None:
                self._go_on()
                if copy is not None:
                    to = copy[1].begin + at - info.begin
                    copy_range(file.fileno(), copy[0].descriptor, at, to, size)

            found = base.known.get(item.name)
            if found is None:
                found = _hash(file.fileno(), span, self._buffer(), each, str(path))
            elif copy is not None:
                for at, size in _pieces(span, _COPIED):
                    each(at, size)
        base.found[item.name] = found
        self.lines[item.name] = fingerprint_line(info.name, info.dtype, info.shape, found)
        if copy is not None:
            copy[0].hashes[item.name] = found

    def _replace(self, change: Change, target: _Target, place: TensorInfo) -> None:
        tally, at, sha256 = tally_of(change), place.begin, hashlib.sha256()
        blocks = merged_blocks(self.plan, change, tally, self._note_codes, self._note_moved)
        for batch in gathered((bytes_of(block.contiguous()) for block in blocks), GATHERED):
            self._go_on()
            for data in batch:
                sha256.update(data)
            at += write_all_at(target.descriptor, batch, at)
        assert at == place.end, f"{change.name}: {at - place.begin} bytes for {place.nbytes}"
        target.hashes[change.name] = sha256.hexdigest()
        rounding = None if tally is None else tally.rounding()
        if rounding is not None:
            self.roundings[change.name] = rounding

    def _note_codes(self, name: str, packed: PackedTensor) -> None:
        self.codes[name] = packed_line(name, packed)
        change = self.plan.changes.get(name)
        if self.plan.moves_codes and (change is None or change.exact is None):
            self._note_moved(name, packed)

    def _note_moved(self, name: str, packed: PackedTensor) -> None:
        self.moved[name] = packed_line(name, packed)
        self.grids.update(grid_entries(packed, name))

    def _buffer(self) -> memoryview:
        if not hasattr(self._local, "buffer"):
            self._local.buffer = memoryview(bytearray(CHUNK))
        buffer: memoryview = self._local.buffer
        return buffer

    def _go_on(self) -> None:
        if self.stopped:
            raise _Stopped

    def close(self) -> None:
        """Settle what is known of the base's files, now that all are read.

        Raises:
            CorruptCheckpoint: a file changed meanwhile.
        """
        for file in self.base.values():
            file.close()

    def written(self) -> Written:
        """The result, in an order that does not depend on the threads."""
        return Written(
            roundings=tuple(self.roundings[name] for name in sorted(self.roundings)),
            fingerprint=fingerprint_of_lines(self.lines.values()),
            codes=fingerprint_of_lines(self.codes.values()) if self.codes else None,
            moved=fingerprint_of_lines(self.moved.values()) if self.moved else None,
            grids=self.grids,
            files={target.file.name: target.entry() for target in self.targets},
        )
