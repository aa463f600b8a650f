"""Bytes of weight files: copied inside the kernel, read into tensors whole or by rows, written back.

Everything goes through file descriptors, not memory maps: a disk that fills up or a file that
shrinks is then an error instead of a signal.
"""

import errno
import os
from typing import Any

import torch

from qlx.errors import CorruptCheckpoint
from qlx.merging.coded import CodedWeights
from qlx.weights import WeightSet, torch_dtype

__all__ = ["bytes_of", "copy_range", "load_rows", "load_tensor", "read_into", "write_at"]

_NO_KERNEL_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
_CHUNK = 2**20


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


def load_tensor(weights: WeightSet, name: str) -> torch.Tensor:
    """Tensor `name` in its own dtype and shape, read straight into its final memory.

    A weight that the files hold as codes comes in float32, whatever dtype it is to be stored in.
    """
    if isinstance(weights, CodedWeights) and name in weights.coded:
        return weights.packed(name).values()
    info = weights[name]
    tensor = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
    with open(weights.path_of(name), "rb", buffering=0) as file:
        what = f"{weights.path_of(name)}: ended inside tensor {name!r}"
        read_into(file.fileno(), bytes_of(tensor), info.begin, what)
    return tensor


def load_rows(weights: WeightSet, name: str, rows: slice) -> torch.Tensor:
    """Some rows (along the first axis; a scalar has one) of a tensor that the files hold as it is.

    Raises:
        CorruptCheckpoint: the file has become shorter.
    """
    info = weights[name]
    shape = info.shape or (1,)
    tensor = torch.empty((rows.stop - rows.start, *shape[1:]), dtype=torch_dtype(info.dtype))
    begin = info.begin + info.nbytes // max(1, shape[0]) * rows.start
    with open(weights.path_of(name), "rb", buffering=0) as file:
        read_into(
            file.fileno(),
            bytes_of(tensor),
            begin,
            f"{weights.path_of(name)}: ended inside tensor {name!r}",
        )
    return tensor


def read_into(descriptor: int, view: memoryview, begin: int, what: str) -> None:
    """Fill `view` with a file's bytes from offset `begin`; `what` is the message of the error.

    Raises:
        CorruptCheckpoint: the file ends before that.
    """
    done = 0
    while done < len(view):
        moved = os.preadv(descriptor, [view[done:]], begin + done)
        if not moved:
            raise CorruptCheckpoint(what)
        done += moved


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, sharing its memory."""
    flat: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)
