"""What a merge will take: memory by thread, threads under a limit, bytes moved, time.

Memory is counted as the system counts it, for the whole process: what it holds when the plan is
made (the interpreter, its libraries, the adapter) and what the work adds. That is a few blocks a
thread, the codes of one quantized tensor, and a whole tensor only where its rows depend on each
other; it does not grow with the model.
"""

import hashlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from qlx.adapters import LoraDelta, merged_weight
from qlx.errors import NoRoom
from qlx.merging.blocks import BLOCK, block_rows
from qlx.merging.change import Change
from qlx.merging.coded import CodedWeights
from qlx.merging.engine import CHUNK, GATHERED, cores
from qlx.merging.plan import MergePlan
from qlx.quant import dequantize_tensor, quantize_tensor, row_unit
from qlx.weights import DTYPE_BYTES

__all__ = ["Estimate", "estimate", "memory_available", "memory_held", "threads_within"]

_BLOCK_BYTES = 40  # of one value in a block: read, fp32 before and after, delta, stored, sums
_EXACT_BYTES = 40  # of one value whose code is moved: correction (float64, 32), place, weight, code
_CODEC_BYTES = 48  # of one value in a codec's temporaries
_SLACK = (
    20 * 2**20
)  # what the allocator keeps for a thread, blocks that wait to be written among it


@dataclass(frozen=True)
class Estimate:
    """A merge before it is made; bytes, and seconds of `threads` busy cores.

    `held` is the process's memory now, `working` what the work adds, `floor` the least that
    `--max-ram` can be. The time is that of the processor; a disk slower than it adds to it.
    """

    tensors: int
    touched: int
    read: int
    copied: int
    rewritten: int
    held: int
    working: int
    floor: int
    threads: int
    seconds: float


def memory_held() -> int:
    """Bytes of physical memory that this process holds; 0 where the system does not say."""
    return _from_proc(Path("/proc/self/status"), "VmRSS")


def memory_available() -> int:
    """Bytes that can be had without swapping; 0 where the system does not say."""
    return _from_proc(Path("/proc/meminfo"), "MemAvailable")


def _from_proc(path: Path, field: str) -> int:
    if not path.is_file():
        return 0
    lines = (line.split() for line in path.read_text().splitlines())
    return next((int(line[1]) * 1024 for line in lines if line and line[0] == f"{field}:"), 0)


def working_bytes(plan: MergePlan, threads: int) -> int:
    """What that many threads take at most: the most demanding tensors at once."""
    sizes = sorted((_needs(plan, change) for change in plan.changes.values()), reverse=True)
    blocks = sum(sizes[:threads]) if sizes else 0
    return blocks + threads * (CHUNK + 2 * GATHERED + _SLACK)


def _needs(plan: MergePlan, change: Change) -> int:
    """Bytes that merging one tensor takes: its codes, if it has any, all of it if they are moved, and one block."""
    unit, codes = 1, 0
    width = prod((change.shape or (1,))[1:])
    if change.as_trained and change.source in plan.spec.tensors:
        unit, codes = _codec_needs(plan, change)
    elif isinstance(plan.weights, CodedWeights) and change.source in plan.weights.coded:
        codes = prod(change.shape) * 8
    if change.exact is not None:
        codes += _EXACT_BYTES * prod(change.shape)
    return codes + _BLOCK_BYTES * width * block_rows(change, unit)


def _codec_needs(plan: MergePlan, change: Change) -> tuple[int, int]:
    """Rows that are decoded together, and the bytes of all codes and of quantizing them."""
    spec, shape, count = plan.spec, change.shape, prod(change.shape)
    bits = spec.weight_bits or 8
    kept = 2 * (count * bits // 8 + 4 * count // (spec.group_size or shape[-1]))  # as parts, joined
    unit = row_unit(shape, spec)
    together = count if unit is None else min(count, max(BLOCK, unit * prod(shape[1:])))
    return unit or 1, kept + _CODEC_BYTES * together


def threads_within(plan: MergePlan, max_ram: int | None) -> int:
    """How many threads may work: all cores, or as many as stay within `max_ram` bytes.

    Raises:
        NoRoom: not even one does; the message says what is needed.
    """
    if max_ram is None:
        return cores()
    held = memory_held()
    for threads in range(cores(), 0, -1):
        if held + working_bytes(plan, threads) <= max_ram:
            return threads
    working = working_bytes(plan, 1)
    raise NoRoom(
        f"--max-ram {max_ram} bytes is too little: this merge needs {held + working} ({held} for the "
        f"program and the adapter, {working} to work in)"
    )


def estimate(plan: MergePlan, max_ram: int | None = None) -> Estimate:
    """The figures of a plan, with rates that are measured here in a few milliseconds.

    Raises:
        NoRoom: `max_ram` is below the floor.
    """
    threads = threads_within(plan, max_ram)
    names = sorted({*plan.weights, *plan.changes})
    read = sum(info.nbytes for header in plan.weights.headers.values()
               for info in header.tensors.values())  # fmt: skip
    kept = [name for name in names if plan.in_place and name not in plan.changes]
    copied = sum(plan.weights[name].nbytes for name in kept)
    rewritten = sum(_stored_bytes(plan, name) for name in set(names) - set(kept))
    held = memory_held()
    return Estimate(
        tensors=len(names),
        touched=len(plan.changes),
        read=read,
        copied=copied,
        rewritten=rewritten,
        held=held,
        working=working_bytes(plan, threads),
        floor=held + working_bytes(plan, 1),
        threads=threads,
        seconds=_core_seconds(plan, read, copied, rewritten) / threads,
    )


def _stored_bytes(plan: MergePlan, name: str) -> int:
    shape = plan.changes[name].shape if name in plan.changes else plan.weights[name].shape
    return prod(shape) * DTYPE_BYTES[plan.dtype_of(name)]


def _core_seconds(plan: MergePlan, read: int, copied: int, rewritten: int) -> float:
    buffer = bytes(4 * 2**20)
    hashing = _seconds(lambda: hashlib.sha256(buffer).digest()) / len(buffer)
    copying = 2 * _seconds(lambda: bytearray(buffer)) / len(buffer)
    weight = torch.randn(BLOCK // 2048, 2048)
    delta = LoraDelta("x", torch.randn(16, 2048), torch.randn(len(weight), 16), 0.5)
    merging = 4 * _seconds(lambda: merged_weight(weight, delta)) / BLOCK
    total = read * hashing + copied * copying + rewritten * (hashing + copying)
    total += merging * _values(plan, plan.changes)
    coded = [n for n in plan.changes if n in plan.spec.tensors and plan.changes[n].as_trained]
    if coded:
        spec = plan.spec
        codec = _seconds(lambda: dequantize_tensor(quantize_tensor(weight, spec), torch.float32))
        total += codec / BLOCK * _values(plan, coded)
    return total


def _values(plan: MergePlan, names: Iterable[str]) -> int:
    return sum(prod(plan.changes[name].shape) for name in names)


def _seconds(work: Callable[[], object]) -> float:
    """The best of three, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return min(times)
    finally:
        torch.set_num_threads(before)
