"""A pass that joins packed products of the same inputs.

Decoding a token reads each weight once, in products so small that waking a thread and rounding the inputs to
8 bits cost as much as reading. One product of all rows does both once. Only products of accuracy level 4 are
joined, whose purpose is speed; the others keep each weight of the checkpoint in tensors of its own.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qlx.verification.graph import joined_name

__all__ = ["join_same_inputs"]

_FAST = 4
_ALIKE = ("K", "bits", "block_size", "accuracy_level")


def join_same_inputs(model: ir.Model) -> None:
    """Replace products of packed integers that have the same inputs by one product and a Split.

    Requires: final names of initializers (`<parent>.<leaf>.weight_codes` and so on).
    Ensures: the same values, up to the last bits where onnxruntime would have put a bias into a separate
    product. The rows of the weights lie one after the other, in tensors named by
    `joined_name`: `self_attn.q_proj:64+k_proj:32+v_proj:32.weight_codes`.
    """
    groups: dict[tuple[object, ...], list[ir.Node]] = {}
    for node in model.graph:
        if _joinable(node):
            alike = tuple(node.attributes[name].as_int() for name in _ALIKE)
            kinds = tuple(value.dtype for value in node.inputs[1:] if value is not None)
            key = (id(node.inputs[0]), _named(node)[0], alike, kinds)
            groups.setdefault(key, []).append(node)
    for nodes in groups.values():
        if len(nodes) > 1:
            _join(model.graph, nodes)


def _joinable(node: ir.Node) -> bool:
    """A fast product, each of whose weight's parts is an initializer of its own."""
    if node.op_type != "MatMulNBits" or node.attributes["accuracy_level"].as_int() != _FAST:
        return False
    return all(
        part is not None and part.is_initializer() and len(part.uses()) == 1
        for part in node.inputs[1:]
    )


def _named(node: ir.Node) -> tuple[str, str]:
    """Parent and leaf of the name of a product's module."""
    assert node.inputs[1] is not None
    parent, _, leaf = (node.inputs[1].name or "").rpartition(".")[0].rpartition(".")
    return parent, leaf


def _join(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    first = nodes[0]
    rows = {_named(node)[1]: node.attributes["N"].as_int() for node in nodes}
    module = joined_name(_named(first)[0], rows)
    parts = [
        _joined_part(graph, module, [node.inputs[at] for node in nodes])
        for at in range(1, len(first.inputs))
    ]
    attributes: dict[str, Any] = {name: each.as_int() for name, each in first.attributes.items()}
    attributes["N"] = sum(rows.values())
    whole = ir.node(
        first.op_type, [first.inputs[0], *parts], attributes, domain=first.domain, version=1
    )
    whole.outputs[0].name = f"{first.outputs[0].name}_joined"
    sizes = _sizes(graph, list(rows.values()))
    split = ir.node("Split", [whole.outputs[0], sizes], {"axis": -1}, num_outputs=len(nodes))
    graph.insert_before(first, [whole, split])
    for node, value in zip(nodes, split.outputs, strict=True):
        old = node.outputs[0]
        value.name, value.shape, value.type = old.name, old.shape, old.type
        ir.convenience.replace_all_uses_with(old, value)
    graph.remove(nodes, safe=True)


def _joined_part(graph: ir.Graph, module: str, values: Sequence[ir.Value | None]) -> ir.Value:
    """One initializer in place of several, concatenated when it is written."""
    known = [value for value in values if value is not None]
    tensors = [value.const_value for value in known if value.const_value is not None]
    shapes = [tensor.shape.numpy() for tensor in tensors]
    shape = ir.Shape((sum(each[0] for each in shapes), *shapes[0][1:]))
    name = f"{module}.{(known[0].name or '').rpartition('.')[2]}"

    def evaluate() -> ir.Tensor:
        return ir.tensor(np.concatenate([tensor.numpy() for tensor in tensors]))

    lazy = ir.LazyTensor(evaluate, dtype=tensors[0].dtype, shape=shape, name=name)
    joined = ir.Value(name=name, shape=shape, type=known[0].type, const_value=lazy)
    for value in known:
        del graph.initializers[value.name or ""]
    graph.register_initializer(joined)
    return joined


def _sizes(graph: ir.Graph, rows: list[int]) -> ir.Value:
    """Sizes of a Split's parts, one initializer for all that have the same."""
    name = "_".join(["rows", *map(str, rows)])
    if name not in graph.initializers:
        tensor = ir.Tensor(np.array(rows, np.int64), name=name)
        kind = ir.TensorType(tensor.dtype)
        sizes = ir.Value(name=name, shape=tensor.shape, type=kind, const_value=tensor)
        graph.register_initializer(sizes)
    return graph.initializers[name]
