"""Bytes of weight files: copied inside the kernel, read into tensors whole or by rows, written back.

Everything goes through file descriptors, not memory maps: a disk that fills up or a file that
shrinks is then an error instead of a signal.
"""

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from qlx.errors import CorruptCheckpoint
from qlx.merging.coded import CodedWeights
from qlx.weights import WeightSet, read_rows

__all__ = ["bytes_of", "copy_range", "gathered", "load_tensor", "write_all_at", "write_at"]

_NO_KERNEL_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
_CHUNK = 2**20
_MOST = 256  # blocks that one call may write; systems allow 1024


def copy_range(source: int, target: int, begin: int, to: int, size: int) -> None:
    """Copy bytes between two open files without their passing through this process, where possible.

    `begin` and `to` are the offsets in the source and in the target.

    Raises:
        CorruptCheckpoint: the source ends before that.
    """
    done = 0
    while done < size:
        count = size - done
        try:
            moved = _in_kernel(source, target, begin + done, to + done, count)
        except OSError as error:
            if error.errno not in _NO_KERNEL_COPY:
                raise
            moved = _by_hand(source, target, begin + done, to + done, count)
        if not moved:
            raise CorruptCheckpoint("a file of the base became shorter while it was copied")
        done += moved


def _in_kernel(source: int, target: int, begin: int, to: int, count: int) -> int:
    if hasattr(os, "copy_file_range"):
        return os.copy_file_range(source, target, count, begin, to)
    return _by_hand(source, target, begin, to, count)


def _by_hand(source: int, target: int, begin: int, to: int, count: int) -> int:
    return write_at(target, memoryview(os.pread(source, min(count, _CHUNK), begin)), to)


def write_at(target: int, data: memoryview, offset: int) -> int:
    """Write all of `data` at an offset of an open file; gives the number of bytes."""
    done = 0
    while done < len(data):
        done += os.pwrite(target, data[done:], offset + done)
    return done


def write_all_at(target: int, blocks: Sequence[memoryview], offset: int) -> int:
    """Write blocks one after another at an offset, in one call where possible; gives the bytes."""
    total = sum(len(block) for block in blocks)
    done = os.pwritev(target, blocks, offset)
    if done < total:
        write_at(target, memoryview(b"".join(blocks))[done:], offset + done)
    return total


def gathered(blocks: Iterable[memoryview], size: int) -> Iterator[list[memoryview]]:
    """Consecutive blocks in groups of at least `size` bytes or `_MOST` blocks, the last one perhaps smaller."""
    group: list[memoryview] = []
    for block in blocks:
        group.append(block)
        if len(group) == _MOST or sum(map(len, group)) >= size:
            yield group
            group = []
    if group:
        yield group


def load_tensor(weights: WeightSet, name: str) -> torch.Tensor:
    """Tensor `name` in its own dtype and shape, read straight into its final memory.

    A weight that the files hold as codes comes in float32, whatever dtype it is to be stored in.
    """
    if isinstance(weights, CodedWeights) and name in weights.coded:
        return weights.packed(name).values()
    shape = weights[name].shape
    return read_rows(weights, name, slice(0, shape[0] if shape else 1)).reshape(shape)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, sharing its memory."""
    flat: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)
