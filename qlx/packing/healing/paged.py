"""Tensors that lie in files, and leave memory when nobody works with them.

What healing holds of every layer (codes, what is learned of it, the states of its optimizer) grows with the
model, and only one layer is at work at a time. So it lies in files of a temporary directory that are mapped
into memory, shared, so that what is written to a tensor is in the file. `release` tells the kernel that
the pages are not needed for now (madvise(2), MADV_DONTNEED): they leave the process, and come back from
the file when they are touched again.
"""

import ctypes
import math
import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Pages", "Resting", "release", "tensors_of"]

_Packed = TypeVar("_Packed")


class Pages:
    """A folder of mapped tensors, each known by its name; `folder` is made when it is needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, Tensor] = {}

    def zeros(self, name: str, shape: Iterable[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor of zeros that can be written to; one of the same name and form is used again.

        Raises:
            OSError: no room on the disk.
        """
        shape = tuple(shape)
        known = self._known.get(name)
        if known is not None and known.shape == shape and known.dtype == dtype:
            return known.zero_()
        self._known[name] = made = self._mapped(name, shape, dtype)
        return made

    def kept(self, name: str) -> Tensor:
        """The tensor of that name."""
        return self._known[name]

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        """The same values in a file; a tensor of the same name and form is written over."""
        if tensor.numel() == 0:
            return tensor
        known = self._known.get(name)
        if known is None or known.shape != tensor.shape or known.dtype != tensor.dtype:
            known = self._known[name] = self._mapped(name, tuple(tensor.shape), tensor.dtype)
        known.copy_(tensor.detach())
        release([known])
        return known

    def keep_packed(self, name: str, packed: _Packed) -> _Packed:
        """A packed weight with all of its tensors in files."""
        if not is_dataclass(packed):
            raise TypeError(f"{type(packed).__name__} is no dataclass of tensors")
        kept: dict[str, Any] = {}
        for field in fields(packed):
            value = getattr(packed, field.name)
            if isinstance(value, Tensor):
                kept[field.name] = self.keep(f"{name}.{field.name}", value)
            elif is_dataclass(value):
                kept[field.name] = self.keep_packed(f"{name}.{field.name}", value)
        made: _Packed = replace(packed, **kept)  # type: ignore[type-var]
        return made

    def rest(self) -> None:
        """Let all of them leave memory."""
        release(self._known.values())

    def _mapped(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A new file of zeros with its room on the disk taken, so that writing to it cannot fail later."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file, size = self.folder / f"{name}.pages", math.prod(shape) * dtype.itemsize
        file.unlink(missing_ok=True)  # whoever has the former one mapped keeps it
        with open(file, "xb") as opened:
            os.posix_fallocate(opened.fileno(), 0, size)
        storage: Any = torch.UntypedStorage.from_file(str(file), shared=True, nbytes=size)
        strides = [math.prod(shape[at + 1 :]) for at in range(len(shape))]
        return torch.empty(0, dtype=dtype).set_(storage, 0, torch.Size(shape), strides)


class Resting(nn.Module):
    """A module that holds tensors of `Pages` besides its parameters."""

    def held(self) -> Iterator[Tensor]:
        """Those tensors."""
        raise NotImplementedError


def tensors_of(packed: object) -> Iterator[Tensor]:
    """All tensors of a dataclass, those of dataclasses in it too."""
    for field in fields(packed) if is_dataclass(packed) else ():
        value = getattr(packed, field.name)
        if isinstance(value, Tensor):
            yield value
        elif is_dataclass(value):
            yield from tensors_of(value)


def release(tensors: Iterable[Tensor]) -> None:
    """Send back the pages of those tensors that lie in files of `Pages`; their values stay.

    Only files that are mapped and shared: the pages of any other memory would be lost.
    """
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.filename is None:
            continue
        start = storage.data_ptr()
        if start % mmap.PAGESIZE == 0:
            _libc().madvise(
                ctypes.c_void_p(start), ctypes.c_size_t(storage.nbytes()), mmap.MADV_DONTNEED
            )


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
