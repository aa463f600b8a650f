"""The bitsandbytes layout of a 4-bit weight in a safetensors file, written and read strictly.

Beside the codes under the weight's own name lie `.absmax`, `.quant_map`, with double quantization
`.nested_absmax` and `.nested_quant_map`, and a JSON text as bytes with everything that is not a
tensor. A directory written from these entries loads in transformers with bitsandbytes alone.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlx.checkpoint import parse_json
from qlx.errors import CorruptCheckpoint, Unsupported
from qlx.quant.codec import PackedTensor
from qlx.quant.codec4bit import (
    BLOCK_SIZES,
    FOUR_BIT,
    NESTED_BLOCK,
    NestedScales,
    Packed4bit,
    Scheme,
    levels,
    torch_dtype_of,
    unnest_scales,
)

__all__ = [
    "StoredState",
    "entry_names",
    "is_packed_weight",
    "packed_entries",
    "packed_from_entries",
    "packed_weights",
    "stored_state",
]

_STATE = ".quant_state.bitsandbytes__"


@dataclass(frozen=True)
class StoredState:
    """What the state beside a 4-bit weight says of it; `nested` is double quantization."""

    scheme: Scheme
    block_size: int
    nested: bool
    shape: tuple[int, ...]
    dtype: torch.dtype


def entry_names(name: str, scheme: Scheme, *, nested: bool) -> tuple[str, ...]:
    """Names of all tensors that make up the packed weight `name`, itself first."""
    plain = (name, f"{name}.absmax", f"{name}.quant_map", f"{name}{_STATE}{scheme}")
    return (*plain, f"{name}.nested_absmax", f"{name}.nested_quant_map") if nested else plain


def is_packed_weight(names: Iterable[str], name: str) -> bool:
    """Whether `name` is a 4-bit weight among the tensor `names` of a checkpoint."""
    known = names if isinstance(names, Mapping | set | frozenset) else set(names)
    return any(f"{name}{_STATE}{scheme}" in known for scheme in FOUR_BIT)


def packed_weights(names: Iterable[str]) -> dict[str, str]:
    """The 4-bit weights among the tensor `names` of a checkpoint, each with its state's name."""
    return {name.partition(_STATE)[0]: name for name in sorted(names) if _STATE in name}


def stored_state(entries: Mapping[str, Tensor], name: str) -> StoredState:
    """What the state of the weight `name` says; `entries` need hold no more than that state.

    Raises:
        CorruptCheckpoint: there is not one state, or a field of it is not what it must be.
        Unsupported: a scheme, block size or dtype that qlx does not know.
    """
    scheme = _scheme(entries, name)
    state = _state(entries[f"{name}{_STATE}{scheme}"], name)
    if state.get("quant_type") != scheme or state.get("blocksize") not in BLOCK_SIZES:
        raise Unsupported(
            f"tensor {name!r}: quantization {state.get('quant_type')!r} with blocks of "
            f"{state.get('blocksize')!r} is not known"
        )
    return StoredState(
        scheme,
        state["blocksize"],
        "nested_offset" in state,
        _shape(state, name),
        _dtype(state, name),
    )


def packed_entries(packed: PackedTensor, name: str) -> dict[str, Tensor]:
    """The tensors to store for a packed weight, by name.

    Codes uint8 [bytes, 1]; absmax float32 [blocks], or uint8 [blocks] under double quantization;
    the state uint8 [JSON bytes]. `packed_from_entries` is the inverse.

    Raises:
        Unsupported: an integer scheme, which this layout has no place for.
    """
    if not isinstance(packed, Packed4bit):
        raise Unsupported(
            f"tensor {name!r}: the 4-bit layout of bitsandbytes holds no {packed.scheme}"
        )
    state: dict[str, Any] = {
        "quant_type": packed.scheme,
        "blocksize": packed.block_size,
        "dtype": str(packed.dtype).removeprefix("torch."),
        "shape": list(packed.shape),
    }
    entries = {
        name: packed.codes.view(-1, 1),
        f"{name}.absmax": packed.absmax,
        f"{name}.quant_map": levels(packed.scheme).clone(),
    }
    if packed.nested is not None:
        state |= {
            "nested_blocksize": NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": packed.nested.offset.item(),
        }
        entries[f"{name}.absmax"] = packed.nested.codes
        entries[f"{name}.nested_absmax"] = packed.nested.absmax
        entries[f"{name}.nested_quant_map"] = packed.nested.map.clone()
    text = json.dumps(state).encode("utf-8")
    entries[f"{name}{_STATE}{packed.scheme}"] = torch.tensor(list(text), dtype=torch.uint8)
    return entries


def packed_from_entries(entries: Mapping[str, Tensor], name: str) -> Packed4bit:
    """The packed weight `name` among the tensors of a file.

    Raises:
        CorruptCheckpoint: a part is missing, or sizes, dtypes or the level table do not agree.
        Unsupported: a scheme, block size or dtype that qlx does not know.
    """
    known = stored_state(entries, name)
    scheme = known.scheme
    state = _state(entries[f"{name}{_STATE}{scheme}"], name)
    if name not in entries:
        raise CorruptCheckpoint(f"tensor {name!r} is missing")
    if not torch.equal(_part(entries, f"{name}.quant_map", torch.float32), levels(scheme)):
        raise Unsupported(f"tensor {name!r}: its level table is not the {scheme} table")
    nested = _nested(entries, name, state)
    absmax = f"{name}.absmax"
    packed = Packed4bit(
        codes=entries[name].contiguous().view(torch.uint8).reshape(-1),
        absmax=_part(entries, absmax, torch.float32) if nested is None else unnest_scales(nested),
        nested=nested,
        shape=known.shape,
        dtype=known.dtype,
        scheme=scheme,
        block_size=known.block_size,
    )
    _check_sizes(packed, name)
    return packed


def _scheme(entries: Mapping[str, Tensor], name: str) -> Scheme:
    found = [scheme for scheme in FOUR_BIT if f"{name}{_STATE}{scheme}" in entries]
    if len(found) != 1:
        raise CorruptCheckpoint(f"tensor {name!r}: not one 4-bit weight with one quant_state")
    return found[0]


def _state(tensor: Tensor, name: str) -> dict[str, Any]:
    where = f"quant_state of tensor {name!r}"
    if tensor.dtype != torch.uint8:
        raise CorruptCheckpoint(f"{where}: dtype {tensor.dtype}, expected uint8")
    state = parse_json(bytes(tensor.reshape(-1).tolist()), where)
    if not isinstance(state, dict):
        raise CorruptCheckpoint(f"{where}: not a JSON object")
    return state


def _part(entries: Mapping[str, Tensor], key: str, dtype: torch.dtype) -> Tensor:
    if key not in entries:
        raise CorruptCheckpoint(f"tensor {key!r} is missing")
    if entries[key].dtype != dtype:
        raise CorruptCheckpoint(f"tensor {key!r}: dtype {entries[key].dtype}, expected {dtype}")
    return entries[key].reshape(-1)


def _shape(state: Mapping[str, Any], name: str) -> tuple[int, ...]:
    shape = state.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
        raise CorruptCheckpoint(f"tensor {name!r}: shape {shape!r} in its quant_state")
    return tuple(shape)


def _dtype(state: Mapping[str, Any], name: str) -> torch.dtype:
    try:
        return torch_dtype_of(str(state.get("dtype")))
    except Unsupported as error:
        raise Unsupported(f"tensor {name!r}: {error}") from error


def _nested(
    entries: Mapping[str, Tensor], name: str, state: Mapping[str, Any]
) -> NestedScales | None:
    if "nested_offset" not in state and f"{name}.nested_absmax" not in entries:
        return None
    if state.get("nested_blocksize") != NESTED_BLOCK or state.get("nested_dtype") != "float32":
        raise Unsupported(f"tensor {name!r}: double quantization other than float32 per 256 scales")
    offset = state.get("nested_offset")
    if not isinstance(offset, float | int):
        raise CorruptCheckpoint(f"tensor {name!r}: nested_offset {offset!r} is not a number")
    nested = NestedScales(
        codes=_part(entries, f"{name}.absmax", torch.uint8),
        absmax=_part(entries, f"{name}.nested_absmax", torch.float32),
        offset=torch.tensor(float(offset)),
        map=_part(entries, f"{name}.nested_quant_map", torch.float32),
    )
    groups = -(-nested.codes.numel() // NESTED_BLOCK)
    if nested.map.numel() != 256 or nested.absmax.numel() != groups:
        raise CorruptCheckpoint(f"tensor {name!r}: sizes of its double quantization do not agree")
    return nested


def _check_sizes(packed: Packed4bit, name: str) -> None:
    blocks = -(-packed.count // packed.block_size)
    if packed.codes.numel() != -(-packed.count // 2) or packed.absmax.numel() != blocks:
        raise CorruptCheckpoint(
            f"tensor {name!r}: {packed.codes.numel()} code bytes and {packed.absmax.numel()} "
            f"scales do not fit the shape {list(packed.shape)}"
        )
    if not bool(torch.isfinite(packed.absmax).all()):
        raise CorruptCheckpoint(f"tensor {name!r}: a scale is NaN or infinite")
