"""Passes over an ONNX graph, one function each; every docstring says what it requires and ensures.

Together they turn a raw trace into a graph whose bytes depend on the model alone, with every weight a
named initializer (no duplicate weights folded into one, none renamed by constant folding), so that a
checkpoint's tensors can be found, compared and replaced in it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qlx.errors import Unsupported
from qlx.exporting.quiet import quiet
from qlx.runtime import ADAPTER_PARTS

__all__ = [
    "CONTRIB_DOMAIN",
    "declare_adapters",
    "drop_reshapes",
    "drop_unused",
    "fuse_residual_norms",
    "import_contrib_operators",
    "name_interface",
    "optimise",
    "rename_initializers",
    "sort_initializers",
    "store_as_float16",
    "strip_metadata",
    "transpose_weights",
]

CONTRIB_DOMAIN = "com.microsoft"
TRANSPOSED = ".T"
_HALF_BYTES = 4096


def optimise(model: ir.Model) -> None:
    """Fold constants and remove what is unused.

    Requires: a raw trace, whose initializers are exactly the module's parameters and buffers.
    Ensures: each of them that is still used keeps its name and its values. (While the optimiser runs
    they are also graph inputs, which it must leave alone: an input could be overridden.)
    """
    from onnxscript import optimizer

    graph = model.graph
    weights = list(graph.initializers.values())
    graph.inputs.extend(weights)
    with quiet():
        optimizer.optimize_ir(model, should_fold=_foldable)
    del graph.inputs[len(graph.inputs) - len(weights) :]
    for weight in weights:
        if not weight.uses() and weight.name in graph.initializers:
            del graph.initializers[weight.name]


def _foldable(node: ir.Node) -> bool | None:
    """Leave Resize alone: folding it runs onnx's reference implementation for minutes."""
    return False if node.op_type == "Resize" else None


def rename_initializers(model: ir.Model, names: Mapping[str, str]) -> None:
    """Rename initializers by a map of old to new name.

    Ensures: names stay unique; entries for initializers that are not there are ignored.
    """
    graph = model.graph
    for old, new in names.items():
        value = graph.initializers.pop(old, None)
        if value is not None:
            value.name = new
            graph.register_initializer(value)


def transpose_weights(model: ir.Model) -> None:
    """Replace `MatMul(x, Transpose(W))` by a MatMul with the stored transpose.

    Requires: weights are initializers of two axes.
    Ensures: W [out, in], if a MatMul was its only use, becomes an initializer `W.T` [in, out], whatever its
    size (constant folding would do it only up to a limit); its bytes are produced when written.
    """
    graph = model.graph
    for node in list(graph):
        weight = node.inputs[0] if node.inputs else None
        if node.op_type != "Transpose" or weight is None or weight.name not in graph.initializers:
            continue
        if list(node.attributes["perm"].as_ints()) != [1, 0] or len(weight.uses()) != 1:
            continue
        new = ir.Value(
            name=f"{weight.name}{TRANSPOSED}",
            shape=ir.Shape(reversed(list(weight.shape or []))),
            type=weight.type,
            const_value=_transposed(weight),
        )
        graph.register_initializer(new)
        ir.convenience.replace_all_uses_with(node.outputs[0], new)
        graph.remove(node, safe=True)
        del graph.initializers[weight.name]


def _transposed(weight: ir.Value) -> ir.LazyTensor:
    tensor = weight.const_value
    assert tensor is not None

    def evaluate() -> ir.Tensor:
        return ir.tensor(np.ascontiguousarray(tensor.numpy().T))

    return ir.LazyTensor(
        evaluate,
        dtype=tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()[::-1]),
        name=f"{weight.name}{TRANSPOSED}",
    )


def store_as_float16(model: ir.Model) -> None:
    """Store large float32 initializers as float16, each followed by a Cast back to float32.

    Requires: nothing outside the float16 range (the replay of the probe would show it).
    Ensures: half the bytes on disk; arithmetic, inputs and outputs stay float32. Small tensors (norms,
    biases, constants, the scales of packed weights) stay as they are.
    """
    graph = model.graph
    scales = {
        value.name
        for node in graph
        if node.domain == CONTRIB_DOMAIN
        for value in node.inputs
        if value is not None
    }
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if (
            tensor is None
            or tensor.dtype != ir.DataType.FLOAT
            or tensor.nbytes < _HALF_BYTES
            or name in scales
        ):
            continue
        cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, name=f"{name}.to_float32")
        wide = cast.outputs[0]
        wide.name, wide.shape, wide.type = f"{name}.float32", value.shape, value.type
        ir.convenience.replace_all_uses_with(value, wide)
        cast.replace_input_with(0, value)
        graph.insert_before(graph[0], cast)
        value.const_value = _halved(tensor, name)
        value.type = ir.TensorType(ir.DataType.FLOAT16)


def _halved(tensor: Any, name: str) -> ir.LazyTensor:
    def evaluate() -> ir.Tensor:
        return ir.tensor(tensor.numpy().astype(np.float16))

    return ir.LazyTensor(evaluate, dtype=ir.DataType.FLOAT16, shape=tensor.shape, name=name)


def drop_reshapes(model: ir.Model) -> None:
    """Remove reshapes that undo each other.

    Requires: inferred shapes, as the tracer leaves them.
    Ensures: a chain of reshapes is one, from where it began; one that gives back the shape it began with is none.
    """
    graph = model.graph
    for node in list(graph):
        if node.op_type != "Reshape":
            continue
        begin = node.inputs[0]
        while begin is not None and (maker := begin.producer()) is not None:
            if maker.op_type != "Reshape":
                break
            begin = maker.inputs[0]
        if begin is None:
            continue
        if _same_shape(begin, node.outputs[0]):
            ir.convenience.replace_all_uses_with(node.outputs[0], begin)
        else:
            node.replace_input_with(0, begin)
    for node in reversed(list(graph)):
        outputs = node.outputs
        if node.op_type == "Reshape" and not any(
            each.uses() or each.is_graph_output() for each in outputs
        ):
            graph.remove(node, safe=True)


def drop_unused(model: ir.Model) -> None:
    """Remove what no output depends on, which onnxruntime would compute at every run.

    Ensures: inputs and outputs stay; other initializers and nodes are there because an output needs them.
    """
    RemoveUnusedNodesPass()(model)


def _same_shape(one: ir.Value, other: ir.Value) -> bool:
    return one.shape is not None and one.shape == other.shape


def fuse_residual_norms(model: ir.Model) -> None:
    """Replace `RMSNormalization(a + b)` by `SkipSimplifiedLayerNormalization(a, b)`, which gives the sum too.

    Requires: inferred shapes. Ensures: the same values; a and b have one shape of three axes.
    """
    graph = model.graph
    for node in list(graph):
        maker = node.inputs[0].producer() if node.op_type == "RMSNormalization" else None
        if maker is None or maker.op_type != "Add" or not _both_whole(maker):
            continue
        epsilon = node.attributes["epsilon"].as_float()
        fused = ir.node(
            "SkipSimplifiedLayerNormalization",
            [*maker.inputs, node.inputs[1]],
            {"epsilon": epsilon},
            domain=CONTRIB_DOMAIN,
            num_outputs=4,
            version=1,
        )
        normed, _, _, total = fused.outputs
        graph.insert_before(node, fused)
        for old, new in ((node.outputs[0], normed), (maker.outputs[0], total)):
            new.name, new.shape, new.type = old.name, old.shape, old.type
            ir.convenience.replace_all_uses_with(old, new)
        graph.remove([node, maker], safe=True)
    graph.sort()


def _both_whole(addition: ir.Node) -> bool:
    first, second = addition.inputs
    return (
        first is not None
        and second is not None
        and _same_shape(first, second)
        and len(first.shape or ()) == 3
    )


def name_interface(model: ir.Model) -> None:
    """Give inputs, outputs and free axes their documented names.

    Requires: the interface of a traced classifier, or of a causal LM with one key and one value per layer.
    Ensures: `past_key_values.N.key|value` in, `present.N.key|value` out (what onnxruntime-genai expects too),
    axes called batch, sequence, past and total.
    """
    graph = model.graph
    for value in graph.inputs:
        layer = _layer_of(value.name)
        if layer is not None:
            value.name = f"past_key_values.{layer}"
            _free_axes(value, {0: "batch", 2: "past"})
        elif value.name == "pixel_values":
            _free_axes(value, {0: "batch"})
        else:
            _free_axes(
                value, {0: "batch", 1: "total" if value.name == "attention_mask" else "sequence"}
            )
    for value in graph.outputs:
        layer = _layer_of(value.name)
        if layer is not None:
            value.name = f"present.{layer}"
            _free_axes(value, {0: "batch", 2: "total"})
        else:
            _free_axes(
                value,
                {0: "batch"}
                if value.shape is not None and len(value.shape) in (2, 4)  # classes, heatmaps
                else {0: "batch", 1: "sequence"},
            )


def _layer_of(name: str | None) -> str | None:
    """`3.key` for `input.past_key_values.layers.3.keys`, None for names without a layer."""
    import re

    match = re.fullmatch(
        r"(?:input|output)\.past_key_values\.layers\.(\d+)\.(key|value)s", name or ""
    )
    return f"{match[1]}.{match[2]}" if match else None


def _free_axes(value: ir.Value, names: Mapping[int, str]) -> None:
    dims = list(value.shape or [])
    value.shape = ir.Shape([names.get(axis, dim) for axis, dim in enumerate(dims)])


def declare_adapters(model: ir.Model) -> None:
    """Make the parameters of adapters graph inputs with defaults that change nothing.

    Requires: each of them is a right operand: A and B of one MatMul, scale and bias of one Mul or Add.
    Ensures: inputs `<module>.lora_A` [rows, in, rank], `.lora_B` [rows, rank, out], `.lora_scale` and
    `.lora_bias` [rows, 1, out], each module with rows and a rank of its own (with a common name
    onnxruntime would reuse buffers between layers of different ranks), whose defaults have rank 0 or
    are zero. `strip_metadata` has to follow: the shapes of what is computed from them are free now.

    Raises:
        Unsupported: the tracer made something else of an adapter's product.
    """
    graph = model.graph
    for name in sorted(graph.initializers):
        if not name.endswith(ADAPTER_PARTS):
            continue
        value = graph.initializers[name]
        _require_right_operand(value)
        module, _, part = name.rpartition(".")
        rows, rank = f"{module}.rows", f"{module}.rank"
        sizes = list(value.const_value.shape.numpy()) if value.const_value is not None else []
        shapes: dict[str, tuple[list[Any], list[int]]] = {
            "lora_A": ([rows, sizes[0], rank], [1, sizes[0], 0]),
            "lora_B": ([rows, rank, sizes[-1]], [1, 0, sizes[-1]]),
        }
        shape, default = shapes.get(part, ([rows, 1, sizes[-1]], [1, 1, sizes[-1]]))
        value.shape = ir.Shape(shape)
        value.const_value = ir.Tensor(np.zeros(default, np.float32), name=name)
        graph.inputs.append(value)


def _require_right_operand(value: ir.Value) -> None:
    wanted = ("MatMul",) if (value.name or "").endswith(ADAPTER_PARTS[:2]) else ("Add", "Mul")
    uses = [(node.op_type, place) for node, place in value.uses()]
    if len(uses) != 1 or uses[0][0] not in wanted or uses[0][1] != 1:
        raise Unsupported(
            f"{value.name}: the traced graph uses it as {uses}, so that it cannot be swapped; merge the adapter"
        )


def strip_metadata(model: ir.Model) -> None:
    """Remove everything that names a path, a source line, a tool's version or an internal shape.

    Ensures: no metadata, no documentation strings, no inferred shapes of intermediate values (their
    symbols are the tracer's own), a fixed producer.
    """
    model.producer_name, model.producer_version = "qlx", None
    model.doc_string = model.domain = None
    model.model_version = None
    graph = model.graph
    graph.name, graph.doc_string = "model", None
    interface = {id(value) for value in (*graph.inputs, *graph.outputs)}
    for holder in (model, graph, *graph.inputs, *graph.initializers.values()):
        holder.metadata_props.clear()
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if id(value) not in interface:
                value.shape = value.type = None


def sort_initializers(model: ir.Model) -> None:
    """Put initializers in the order of their names, which fixes the layout of the data file too."""
    graph = model.graph
    values = sorted(graph.initializers.values(), key=lambda value: value.name or "")
    graph.initializers.clear()
    for value in values:
        graph.register_initializer(value)


def import_contrib_operators(model: ir.Model) -> None:
    """Import `com.microsoft` version 1 if, and only if, a node is of that domain."""
    used = any(node.domain == CONTRIB_DOMAIN for node in model.graph.all_nodes())
    model.opset_imports.pop(CONTRIB_DOMAIN, None)
    if used:
        model.opset_imports[CONTRIB_DOMAIN] = 1
