"""The weights of an ONNX graph as they act, by the in-memory names that the export kept.

Needs onnx and onnxruntime. A packed matrix is read through the runtime's own kernel: a graph of that
one node, given the unit vectors.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qlx.errors import require
from qlx.verification.metrics import Array

__all__ = ["graph_weights"]

_TURNED, _CODES, _DOWN, _UP = ".weight.T", ".weight_codes", ".lora_A", ".lora_B"
_PARTS = (_DOWN, _UP, ".weight_absmax", ".weight_scales", ".weight_zeros")


def graph_weights(path: Path) -> dict[str, Callable[[], Array]]:
    """Weights fp32 of an exported graph by name, [out, in] for matrices, each computed when called.

    Where the adapter lies beside its base in the graph, the weight is both together. Constants that
    tracing made carry no name of the model and are left out.
    """
    onnx = require("onnx", "export")
    graph = onnx.load(path).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    nodes = {name: node for node in graph.node for name in node.input if name.endswith(_CODES)}
    makers = {name: node for node in graph.node for name in node.output}

    def array(name: str) -> Array:
        return np.asarray(onnx.numpy_helper.to_array(stored[name]), np.float32)

    def matrix(module: str) -> Array:
        """[in, out], the base's part."""
        if f"{module}{_CODES}" not in stored:
            return array(f"{module}{_TURNED}")
        node = nodes[f"{module}{_CODES}"]
        values = _through_kernel(node, stored)
        maker = makers.get(node.input[0])
        if maker is None or maker.op_type != "Gather" or maker.input[1] not in stored:
            return values
        # Reordered columns (GPTQ's desc_act); tracing gives the order a name of its own.
        order = onnx.numpy_helper.to_array(stored[maker.input[1]])
        return values[np.argsort(order)] if order.shape == values.shape[:1] else values

    def whole(module: str) -> Callable[[], Array]:
        if f"{module}{_DOWN}" not in stored:
            return lambda: matrix(module).T
        return lambda: (matrix(module) + array(f"{module}{_DOWN}") @ array(f"{module}{_UP}")).T

    found: dict[str, Callable[[], Array]] = {}
    for name in stored:
        if name.endswith((_TURNED, _CODES)):
            module = name.removesuffix(_TURNED).removesuffix(_CODES)
            found[f"{module}.weight"] = whole(module)
        elif "." in name and not name.endswith(_PARTS):
            found[name] = _reader(array, name)
    return found


def _reader(array: Callable[[str], Array], name: str) -> Callable[[], Array]:
    return lambda: array(name)


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
