"""Bytes of a merge: copy whole shards in the kernel, then write the changed tensors over the copy.

Where a tensor keeps dtype and shape its offsets do not move, so a merge costs little more than
`cp`. Where they do move (another dtype, a new head), the file is written anew, tensor by tensor.
Reads and writes go through file descriptors, not memory maps: a disk that fills up or a file that
shrinks is then an error instead of a signal.
"""

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from qlx.checkpoint import canonical_json
from qlx.errors import CorruptCheckpoint
from qlx.merging.coded import CodedWeights
from qlx.weights import (
    INDEX_FILE,
    SINGLE_FILE,
    TensorInfo,
    WeightSet,
    read_header,
    torch_dtype,
    write_raw,
)

__all__ = [
    "TensorWriter",
    "bytes_of",
    "copy_file",
    "load_rows",
    "load_tensor",
    "overwrite",
    "pieces",
    "read_into",
    "write_shards",
]

TensorWriter = Callable[[], Iterable[bytes]]
_NO_KERNEL_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)
_CHUNK = 8 * 2**20


def copy_file(source: Path, target: Path) -> int:
    """Copy a file without its bytes passing through this process, where the system can.

    Returns:
        The number of bytes copied.

    Raises:
        CorruptCheckpoint: the source shrank while it was copied.
    """
    with open(source, "rb") as reader, open(target, "wb") as writer:
        size = os.fstat(reader.fileno()).st_size
        method = _in_kernel
        done = 0
        while done < size:
            try:
                moved = method(reader.fileno(), writer.fileno(), done, min(size - done, 2**30))
            except OSError as error:
                if method is not _in_kernel or error.errno not in _NO_KERNEL_COPY:
                    raise
                method = _by_hand
                continue
            if not moved:
                raise CorruptCheckpoint(f"{source}: became shorter while it was copied")
            done += moved
    return size


def _in_kernel(source: int, target: int, offset: int, count: int) -> int:
    if hasattr(os, "copy_file_range"):
        return os.copy_file_range(source, target, count, offset, offset)
    return _by_hand(source, target, offset, count)


def _by_hand(source: int, target: int, offset: int, count: int) -> int:
    piece = os.pread(source, min(count, _CHUNK), offset)
    return _write_at(target, memoryview(piece), offset)


def _write_at(target: int, data: memoryview, offset: int) -> int:
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


def overwrite(path: Path, tensors: Iterable[tuple[TensorInfo, torch.Tensor]]) -> None:
    """Write tensors over their places in an existing file; all other bytes stay as they are.

    Raises:
        CorruptCheckpoint: a tensor does not have the size of its place.
    """
    descriptor = os.open(path, os.O_WRONLY)
    try:
        for info, tensor in tensors:
            data = bytes_of(tensor.contiguous())
            if len(data) != info.nbytes:
                raise CorruptCheckpoint(
                    f"{path}: {info.name!r} needs {info.nbytes} bytes, got {len(data)}"
                )
            _write_at(descriptor, data, info.begin)
    finally:
        os.close(descriptor)


def write_shards(
    directory: Path,
    weights: WeightSet,
    entries: Mapping[str, tuple[str, tuple[int, ...], TensorWriter]],
) -> None:
    """Write tensors anew as `directory`'s weight files, cut like `weights`; new names join the last file.

    `entries` gives each tensor's dtype name, shape and a function for its bytes; one tensor is in
    memory at a time.
    """
    last = weights.files[-1]
    place = {name: weights.places.get(name, last).name for name in entries}
    for path in weights.files:
        chosen = {name: entry for name, entry in entries.items() if place[name] == path.name}
        write_raw(directory / path.name, chosen, {"format": "pt"})
    if [path.name for path in weights.files] != [SINGLE_FILE]:
        total = sum(_size(directory / path.name) for path in weights.files)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(place.items()))}
        (directory / INDEX_FILE).write_bytes(canonical_json(index))


def _size(path: Path) -> int:
    return sum(info.nbytes for info in read_header(path).tensors.values())


def pieces(make: Callable[[], torch.Tensor]) -> TensorWriter:
    """A writer that computes its tensor when its turn comes and forgets it afterwards."""

    def write() -> Iterator[bytes]:
        yield bytes_of(make().contiguous())  # type: ignore[misc]  # a memoryview is bytes to a file

    return write
