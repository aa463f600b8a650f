"""The weights of an ONNX graph as they act, by the in-memory names that the export kept.

Needs onnx and onnxruntime. A packed matrix is read through the runtime's own kernel: a graph of that
one node, given the unit vectors.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qlx.errors import require
from qlx.verification.metrics import Array

__all__ = ["graph_weights", "joined_name"]

_TURNED, _CODES, _DOWN, _UP = ".weight.T", ".weight_codes", ".lora_A", ".lora_B"
_SCALE, _SHIFT = ".lora_scale", ".lora_bias"
_PARTS = (_DOWN, _UP, _SCALE, _SHIFT, ".weight_absmax", ".weight_scales", ".weight_zeros")
_JOIN, _COUNT = "+", ":"


def joined_name(parent: str, rows: Mapping[str, int]) -> str:
    """The name of several modules of one parent whose weights lie in one tensor, row after row.

    `rows` is how many each has, by its leaf name: `self_attn.q_proj:64+k_proj:32+v_proj:32`.
    """
    leaf = _JOIN.join(f"{name}{_COUNT}{count}" for name, count in rows.items())
    return f"{parent}.{leaf}" if parent else leaf


def _modules(name: str) -> dict[str, slice]:
    """The modules that a (perhaps joined) name stands for, each with its rows."""
    parent, dot, leaf = name.rpartition(".")
    if _JOIN not in leaf:
        return {name: slice(None)}
    found, start = {}, 0
    for each in leaf.split(_JOIN):
        module, _, count = each.rpartition(_COUNT)
        found[f"{parent}{dot}{module}"] = slice(start, start := start + int(count))
    return found


def graph_weights(path: Path, adapter: Path | None = None) -> dict[str, Callable[[], Array]]:
    """Weights fp32 of an exported graph by name, [out, in] for matrices, each computed when called.

    Where the adapter lies beside its base in the graph, the weight is both together, and so it is with one
    of its swappable adapters, whose file is `adapter`. Constants that tracing made carry no name of the
    model and are left out.
    """
    onnx = require("onnx", "export")
    graph = onnx.load(path).graph
    given = _adapter_tensors(adapter)
    stored = {tensor.name: tensor for tensor in graph.initializer}
    nodes = {name: node for node in graph.node for name in node.input if name.endswith(_CODES)}
    makers = {name: node for node in graph.node for name in node.output}
    places = {
        module: (name, rows)
        for name in stored
        if name.endswith(_CODES)
        for module, rows in _modules(name.removesuffix(_CODES)).items()
    }

    def array(name: str) -> Array:
        if name in given:
            return given[name]
        return np.asarray(onnx.numpy_helper.to_array(stored[name]), np.float32)

    def matrix(module: str) -> Array:
        """[in, out], the base's part."""
        if module not in places:
            return array(f"{module}{_TURNED}")
        name, rows = places[module]
        node = nodes[name]
        values = _through_kernel(node, stored)[:, rows]
        maker = makers.get(node.input[0])
        if maker is None or maker.op_type != "Gather" or maker.input[1] not in stored:
            return values
        # Reordered columns (GPTQ's desc_act); tracing gives the order a name of its own.
        order = onnx.numpy_helper.to_array(stored[maker.input[1]])
        return values[np.argsort(order)] if order.shape == values.shape[:1] else values

    def whole(module: str) -> Array:
        """[out, in], the base's part and the adapter's."""
        values = matrix(module)
        if f"{module}{_SCALE}" in stored:
            values = values * (1 + _of_one_row(array(f"{module}{_SCALE}")))
        if f"{module}{_DOWN}" in stored:
            down, up = (_of_one_row(array(f"{module}{part}")) for part in (_DOWN, _UP))
            values = values + down @ up
        return values.T

    def bias(name: str) -> Array:
        shift = name.removesuffix(".bias") + _SHIFT
        return array(name) + (array(shift).reshape(-1) if shift in stored else 0)

    found: dict[str, Callable[[], Array]] = {}
    for name in stored:
        if name.endswith((_TURNED, _CODES)):
            for module in _modules(name.removesuffix(_TURNED).removesuffix(_CODES)):
                found[f"{module}.weight"] = _reader(whole, module)
        elif "." in name and not name.endswith(_PARTS):
            found[name] = _reader(bias if name.endswith(".bias") else array, name)
    return found


def _reader(read: Callable[[str], Array], name: str) -> Callable[[], Array]:
    return lambda: read(name)


def _adapter_tensors(file: Path | None) -> dict[str, Array]:
    if file is None:
        return {}
    parameters = require("onnxruntime", "export").AdapterFormat.read_adapter(str(file))
    return {name: value.numpy().copy() for name, value in parameters.get_parameters().items()}


def _of_one_row(values: Array) -> Array:
    """An adapter's matrix as it is in the graph, or without the axis that counts rows of a batch."""
    return values[0] if values.ndim > 2 else values


def _through_kernel(node: Any, stored: dict[str, Any]) -> Array:
    """The matrix [in, out] that a packed product node multiplies by."""
    helper, runtime = require("onnx.helper", "export"), require("onnxruntime", "export")
    width = next(attribute.i for attribute in node.attribute if attribute.name == "K")
    numbers = helper.np_dtype_to_tensor_dtype(np.dtype(np.float32))
    copied = type(node)()
    copied.CopyFrom(node)
    copied.input[0], copied.output[0] = "x", "y"
    graph = helper.make_graph(
        [copied],
        "one packed product",
        [helper.make_tensor_value_info("x", numbers, [None, width])],
        [helper.make_tensor_value_info("y", numbers, None)],
        [stored[name] for name in node.input[1:] if name],
    )
    versions = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=10)
    session = runtime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (answer,) = session.run(["y"], {"x": np.eye(width, dtype=np.float32)})
    return np.asarray(answer)
