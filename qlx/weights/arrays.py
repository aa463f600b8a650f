"""Whole safetensors files as numpy arrays or torch tensors, and deterministic writing of both.

Bytes written depend only on names, dtypes, shapes, values and metadata: the header is canonical
JSON, and tensors lie with the widest dtypes first, then by name, so that each starts on a multiple
of its element size.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlx.errors import CorruptCheckpoint, Unsupported
from qlx.weights.header import DTYPE_BYTES, TensorInfo, read_header
from qlx.weights.shards import WeightSet, open_weights

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = [
    "lay_out",
    "read_arrays",
    "read_into",
    "read_rows",
    "read_tensor",
    "read_tensors",
    "torch_dtype",
    "torch_dtype_name",
    "write_arrays",
    "write_raw",
    "write_tensors",
]

_NUMPY = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "F16": "float16",
    "U32": "uint32", "I32": "int32", "F32": "float32", "U64": "uint64", "I64": "int64", "F64": "float64",
}  # fmt: skip
_TORCH = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "F16": "float16", "BF16": "bfloat16",
    "U32": "uint32", "I32": "int32", "F32": "float32", "U64": "uint64", "I64": "int64", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


def read_arrays(path: Path) -> "dict[str, np.ndarray[Any, Any]]":
    """Every tensor of one file as a numpy array of its own dtype (bfloat16 through `ml_dtypes`).

    Raises:
        CorruptCheckpoint: the header is wrong.
        Unsupported: a dtype numpy cannot hold.
    """
    import numpy as np

    arrays = {}
    data = Path(path).read_bytes()
    for name, info in read_header(path).tensors.items():
        flat = np.frombuffer(data, _numpy_dtype(path, info), count=info.count, offset=info.begin)
        arrays[name] = flat.reshape(info.shape).copy()
    return arrays


def _numpy_dtype(path: Path, info: TensorInfo) -> Any:
    if info.dtype == "BF16":
        import ml_dtypes

        return ml_dtypes.bfloat16
    if info.dtype not in _NUMPY:
        raise Unsupported(
            f"{path}: tensor {info.name!r} has dtype {info.dtype}, which numpy cannot hold"
        )
    return _NUMPY[info.dtype]


def torch_dtype(name: str) -> "torch.dtype":
    """The torch dtype of a safetensors dtype name, such as `BF16`."""
    import torch

    result = getattr(torch, _TORCH[name])
    assert isinstance(result, torch.dtype)
    return result


def torch_dtype_name(dtype: "torch.dtype") -> str:
    """The safetensors name of a torch dtype.

    Raises:
        Unsupported: the format has no such dtype.
    """
    short = str(dtype).removeprefix("torch.")
    for name, candidate in _TORCH.items():
        if candidate == short:
            return name
    raise Unsupported(f"safetensors cannot store {dtype}")


def read_tensor(weights: WeightSet, name: str) -> "torch.Tensor":
    """Tensor `name` of a weight set, in its own dtype, in memory of its own."""
    import torch

    info = weights[name]
    if info.count == 0:
        return torch.empty(info.shape, dtype=torch_dtype(info.dtype))
    flat = torch.frombuffer(bytearray(weights.read_bytes(name)), dtype=torch_dtype(info.dtype))
    return flat.reshape(info.shape)


def read_rows(
    weights: WeightSet, name: str, rows: slice, into: "torch.Tensor | None" = None
) -> "torch.Tensor":
    """Some rows (along the first axis; a scalar has one) of a tensor, in its own dtype.

    `into` is a uint8 tensor [n] that is used for their memory, n being large enough.

    Raises:
        CorruptCheckpoint: the file has become shorter.
    """
    import torch

    info, path = weights[name], weights.path_of(name)
    shape = info.shape or (1,)
    row = info.nbytes // max(1, shape[0])
    begin, size = info.begin + row * rows.start, row * (rows.stop - rows.start)
    memory = torch.empty(size, dtype=torch.uint8) if into is None else into[:size]
    flat: Any = memory.numpy()
    with open(path, "rb", buffering=0) as file:
        read_into(file.fileno(), memoryview(flat), begin, f"{path}: ended inside tensor {name!r}")
    return memory.view(torch_dtype(info.dtype)).reshape(rows.stop - rows.start, *shape[1:])


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


def read_tensors(path: Path, names: Iterable[str] | None = None) -> "dict[str, torch.Tensor]":
    """Tensors of a file or of a model directory (all, or those named), in order of name.

    Raises:
        CorruptCheckpoint: a named tensor is not there, or a header is wrong.
    """
    path = Path(path)
    if path.is_dir():
        weights = open_weights(path)
    else:
        header = read_header(path)
        weights = WeightSet(
            path.parent, (path,), {path: header}, dict.fromkeys(header.tensors, path)
        )
    wanted = sorted(weights if names is None else names)
    missing = [name for name in wanted if name not in weights]
    if missing:
        raise CorruptCheckpoint(f"{path}: tensor {missing[0]!r} is missing")
    return {name: read_tensor(weights, name) for name in wanted}


def write_arrays(
    path: Path,
    arrays: "Mapping[str, np.ndarray[Any, Any]]",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write numpy arrays (bfloat16 from `ml_dtypes` included) as one safetensors file."""
    import numpy as np

    names = {**{value: key for key, value in _NUMPY.items()}, "bfloat16": "BF16"}
    entries = {}
    for name, array in arrays.items():
        if array.dtype.name not in names:
            raise Unsupported(
                f"{path}: array {name!r} has dtype {array.dtype}, which safetensors cannot store"
            )
        contiguous = np.ascontiguousarray(array)
        entries[name] = (names[array.dtype.name], array.shape, _bytes_of_array(contiguous))
    write_raw(path, entries, metadata)


def _bytes_of_array(array: "np.ndarray[Any, Any]") -> Callable[[], Iterable[bytes]]:
    return lambda: [array.tobytes()]


def write_tensors(
    path: Path, tensors: "Mapping[str, torch.Tensor]", metadata: Mapping[str, str] | None = None
) -> None:
    """Write torch tensors as one safetensors file; `metadata` defaults to `{"format": "pt"}`."""
    entries = {
        name: (torch_dtype_name(tensor.dtype), tuple(tensor.shape), _bytes_of_tensor(tensor))
        for name, tensor in tensors.items()
    }
    write_raw(path, entries, {"format": "pt"} if metadata is None else metadata)


def _bytes_of_tensor(tensor: "torch.Tensor") -> Callable[[], Iterable[bytes]]:
    def pieces() -> Iterator[bytes]:
        import torch

        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        yield flat.numpy().tobytes()

    return pieces


def write_raw(
    path: Path,
    entries: Mapping[str, tuple[str, tuple[int, ...], Callable[[], Iterable[bytes]]]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors given as (dtype name, shape, function giving the bytes); one tensor in memory at a time.

    Raises:
        CorruptCheckpoint: a function gave more or fewer bytes than its shape and dtype say.
    """
    header, total = _layout(entries, metadata)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for name in _order(entries):
            dtype, shape, pieces = entries[name]
            written = sum(file.write(piece) for piece in pieces())
            if written != _nbytes(dtype, shape):
                raise CorruptCheckpoint(
                    f"{path}: tensor {name!r} gave {written} bytes, not {_nbytes(dtype, shape)}"
                )
        assert file.tell() == 8 + len(header) + total


def lay_out(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, TensorInfo]]:
    """How `write_raw` arranges tensors given as (dtype name, shape).

    Returns:
        The bytes before the data, and every tensor's place in the file.
    """
    header, _ = _layout({name: (*entry, None) for name, entry in tensors.items()}, metadata)
    position, places = 8 + len(header), {}
    for name in _order({name: (*entry, None) for name, entry in tensors.items()}):
        dtype, shape = tensors[name]
        end = position + _nbytes(dtype, shape)
        places[name] = TensorInfo(name, dtype, shape, position, end)
        position = end
    return len(header).to_bytes(8, "little") + header, places


def _order(entries: Mapping[str, tuple[str, tuple[int, ...], Any]]) -> list[str]:
    return sorted(entries, key=lambda name: (-DTYPE_BYTES[entries[name][0]], name))


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count * DTYPE_BYTES[dtype]


def _layout(
    entries: Mapping[str, tuple[str, tuple[int, ...], Any]], metadata: Mapping[str, str] | None
) -> tuple[bytes, int]:
    table: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name in _order(entries):
        dtype, shape, _ = entries[name]
        end = position + _nbytes(dtype, shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    return header + b" " * (-len(header) % 8), position
