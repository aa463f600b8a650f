"""A look into the bytes of `model.onnx` before onnxruntime sees them; needs no onnx package.

Only the protobuf wire format and the few field numbers of onnx.proto3 that matter are known here:
operators and their domains, local functions, and where tensors claim to lie outside the graph file.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from qlx.errors import CorruptCheckpoint, UnsafeInput

__all__ = ["ALLOWED_DOMAINS", "ExternalTensor", "GraphFacts", "check_graph", "read_graph"]

ALLOWED_DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})
"""Operator domains whose kernels ship inside onnxruntime; anything else would need foreign code."""

_ITEM_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}
_MAX_DEPTH = 16

# onnx.proto3 field numbers
_MODEL_GRAPH, _MODEL_OPSET, _MODEL_FUNCTION = 7, 8, 25
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_SPARSE = 1, 5, 15
_NODE_OPERATOR, _NODE_ATTRIBUTE, _NODE_DOMAIN = 4, 5, 7
_ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = (5, 10), (6, 11)
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_EXTERNAL, _TENSOR_LOCATION = 1, 2, 8, 13, 14
_ENTRY_KEY, _ENTRY_VALUE = 1, 2


@dataclass(frozen=True)
class ExternalTensor:
    """A tensor whose bytes lie in another file: its name, that file, and the bytes it claims there."""

    name: str
    location: str
    offset: int
    length: int


@dataclass
class GraphFacts:
    """What a graph file says about itself: opset imports, node domains and operators, external tensors."""

    opsets: dict[str, int] = field(default_factory=dict)
    domains: set[str] = field(default_factory=set)
    operators: set[str] = field(default_factory=set)
    external: list[ExternalTensor] = field(default_factory=list)
    functions: int = 0


def check_graph(data: bytes, where: str, files: Mapping[str, int]) -> GraphFacts:
    """Refuse a graph that names foreign operators or reaches outside its own data files.

    Args:
        data: the bytes of the graph file; `where` names it in errors.
        files: size in bytes of every file the manifest lists, by name.

    Raises:
        UnsafeInput: a foreign domain, a local function, or a data file the manifest does not list.
        CorruptCheckpoint: not a protobuf message, or a tensor that ends beyond its data file.
    """
    facts = read_graph(data, where)
    for domain in sorted((facts.domains | set(facts.opsets)) - ALLOWED_DOMAINS):
        raise UnsafeInput(
            f"{where}: uses operators of domain {domain!r}, which are not part of onnxruntime; refused"
        )
    if facts.functions:
        raise UnsafeInput(
            f"{where}: defines {facts.functions} local functions, which no qlx export does; refused"
        )
    for tensor in facts.external:
        size = files.get(tensor.location)
        if size is None:
            raise UnsafeInput(
                f"{where}: tensor {tensor.name!r} lies in {tensor.location!r}, "
                "which the manifest does not list"
            )
        if tensor.offset < 0 or tensor.length < 0 or tensor.offset + tensor.length > size:
            raise CorruptCheckpoint(
                f"{where}: tensor {tensor.name!r} ends beyond {tensor.location} ({size} bytes)"
            )
    return facts


def read_graph(data: bytes, where: str) -> GraphFacts:
    """The facts of a serialised ONNX model.

    Raises:
        CorruptCheckpoint: the bytes are not a protobuf message of that shape.
    """
    facts = GraphFacts()
    try:
        for number, value in _fields(memoryview(data)):
            if number == _MODEL_OPSET:
                entry = dict(_fields(_message(value)))
                facts.opsets[_text(entry.get(_OPSET_DOMAIN, b""))] = _integer(
                    entry.get(_OPSET_VERSION, 0)
                )
            elif number == _MODEL_GRAPH:
                _walk_graph(_message(value), facts, 0)
            elif number == _MODEL_FUNCTION:
                facts.functions += 1
    except (ValueError, IndexError) as error:
        raise CorruptCheckpoint(
            f"{where}: not a readable ONNX graph ({error}); restore or export it again"
        ) from error
    return facts


def _walk_graph(graph: memoryview, facts: GraphFacts, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError(f"graphs nested deeper than {_MAX_DEPTH}")
    for number, value in _fields(graph):
        if number == _GRAPH_NODE:
            _walk_node(_message(value), facts, depth)
        elif number == _GRAPH_INITIALIZER:
            _walk_tensor(_message(value), facts)
        elif number == _GRAPH_SPARSE:
            for inner, part in _fields(_message(value)):
                if inner in (1, 2):
                    _walk_tensor(_message(part), facts)


def _walk_node(node: memoryview, facts: GraphFacts, depth: int) -> None:
    domain = ""
    for number, value in _fields(node):
        if number == _NODE_DOMAIN:
            domain = _text(value)
        elif number == _NODE_OPERATOR:
            facts.operators.add(_text(value))
        elif number == _NODE_ATTRIBUTE:
            for inner, part in _fields(_message(value)):
                if inner in _ATTRIBUTE_TENSORS:
                    _walk_tensor(_message(part), facts)
                elif inner in _ATTRIBUTE_GRAPHS:
                    _walk_graph(_message(part), facts, depth + 1)
    facts.domains.add(domain)


def _walk_tensor(tensor: memoryview, facts: GraphFacts) -> None:
    name, entries, dims, kind, location = "", {}, [], 0, 0
    for number, value in _fields(tensor):
        if number == _TENSOR_EXTERNAL:
            entry = dict(_fields(_message(value)))
            entries[_text(entry.get(_ENTRY_KEY, b""))] = _text(entry.get(_ENTRY_VALUE, b""))
        elif number == _TENSOR_NAME:
            name = _text(value)
        elif number == _TENSOR_DIMS:
            dims += [value] if isinstance(value, int) else list(_packed(value))
        elif number == _TENSOR_TYPE:
            kind = _integer(value)
        elif number == _TENSOR_LOCATION:
            location = _integer(value)
    if not entries and not location:
        return
    if kind not in _ITEM_BYTES:
        raise ValueError(f"external tensor {name!r} has element type {kind}")
    length = math.prod(dims) * _ITEM_BYTES[kind]
    if int(entries.get("length", length)) != length:
        raise ValueError(
            f"tensor {name!r} claims {entries['length']} bytes, its shape needs {length}"
        )
    facts.external.append(
        ExternalTensor(name, entries.get("location", ""), int(entries.get("offset", 0)), length)
    )


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) pairs of a protobuf message: integers, or a view of the bytes."""
    position, end = 0, len(message)
    while position < end:
        tag, position = _varint(message, position)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire == 2:
            size, position = _varint(message, position)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {position}")
        if position + size > end:
            raise ValueError(f"field {number} runs past the end of its message")
        yield number, message[position : position + size]
        position += size


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value, shift = 0, 0
    while shift < 64:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError("an integer of more than 64 bits")


def _packed(values: memoryview) -> Iterator[int]:
    position = 0
    while position < len(values):
        value, position = _varint(values, position)
        yield value


def _message(value: int | memoryview | bytes) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message belongs")
    return memoryview(value)


def _integer(value: int | memoryview | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("a message where a number belongs")
    return value


def _text(value: int | memoryview | bytes) -> str:
    return bytes(_message(value)).decode("utf-8")
