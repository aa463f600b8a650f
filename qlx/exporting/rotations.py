"""A pass that halves the tables of a fused rotation.

Architectures repeat a token's angles before they take cosine and sine, because their own rotation multiplies whole
heads; the fused one reads the first half.
"""

import onnx_ir as ir

__all__ = ["halve_rotations"]


def halve_rotations(model: ir.Model) -> None:
    """Compute the half of a rotation's table that is used, instead of both.

    Requires: inferred shapes, as the tracer leaves them.
    Ensures: the same values; `drop_unused` has to follow. A Slice of anything else stays.
    """
    graph = model.graph
    for node in list(graph):
        if node.op_type != "Slice" or (found := _repeated_below(node)) is None:
            continue
        value, chain = found
        for step in reversed(chain):
            inputs = [value if each is step.inputs[0] else each for each in step.inputs]
            copied = ir.node(step.op_type, inputs, version=step.version)
            graph.insert_before(node, copied)
            value = copied.outputs[0]
        value.type, value.shape = node.outputs[0].type, node.outputs[0].shape
        value.name = f"{node.outputs[0].name}_half"
        ir.convenience.replace_all_uses_with(node.outputs[0], value)


def _repeated_below(node: ir.Node) -> tuple[ir.Value, list[ir.Node]] | None:
    """Of a Slice of the first half of `f(Concat(x, x))`: x, and the nodes of f, the last one first."""
    chain: list[ir.Node] = []
    value = node.inputs[0]
    while value is not None and (maker := value.producer()) is not None:
        if maker.op_type == "Concat":
            x = maker.inputs[0]
            alike = x is not None and list(maker.inputs) == [x, x]
            return (x, chain) if x is not None and alike and _is_first_half(node, maker) else None
        if not (maker.op_type in ("Cos", "Sin") or _scales(maker)):
            return None
        chain.append(maker)
        value = maker.inputs[0]
    return None


def _scales(node: ir.Node) -> bool:
    """Whether a node multiplies its first input by one constant number."""
    if node.op_type != "Mul" or node.inputs[1] is None:
        return False
    factor = ir.convenience.get_const_tensor(node.inputs[1])
    return factor is not None and factor.size == 1


def _is_first_half(cut: ir.Node, concat: ir.Node) -> bool:
    """Whether a Slice takes the first of a Concat's two inputs, on its last axis."""
    part = concat.inputs[0]
    if part is None or part.shape is None or not isinstance(part.shape[-1], int):
        return False
    last = len(part.shape) - 1
    tensors = [each and ir.convenience.get_const_tensor(each) for each in cut.inputs[1:]]
    given = [None if each is None else each.numpy().tolist() for each in tensors]
    wanted = [[[0], [part.shape[-1]], [axis], [1]] for axis in (last, -1)]
    return concat.attributes["axis"].as_int() in (last, -1) and given in wanted
