"""A module as a finished ONNX graph on disk: trace, passes, write, check."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from torch import nn

from qlx.errors import CheckFailed
from qlx.exporting import passes
from qlx.exporting.rotations import halve_rotations
from qlx.exporting.same_inputs import join_same_inputs
from qlx.exporting.trace import trace
from qlx.runtime.session import DATA_FILE, GRAPH_FILE

__all__ = ["INLINE_LIMIT", "build_graph", "write_graph"]

INLINE_LIMIT = 2**24
"""Largest sum of weights, in bytes (16 MiB), kept inside `model.onnx`.

onnxruntime parses what is inside into a copy of its own and copies that again when it prepares products; what lies
outside it maps. Loading a large graph in two files takes less than half the time and the memory of one.
"""
_EXTERNAL_FROM = 1024


def build_graph(
    model: nn.Module,
    task: str,
    *,
    half: bool = False,
    prefixes: Mapping[str, str] | None = None,
    swappable: bool = False,
    fuse: bool = False,
) -> ir.Model:
    """Trace a module in eval mode and turn the trace into its final form.

    Args:
        model: a transformers classifier or causal LM in float32, packed layers as `PackedLinear`.
        task: `image-classification` or `causal-lm`.
        half: store large weights as float16.
        prefixes: old → new prefix of initializer names.
        swappable: adapters are inputs of the graph (`SwappableLora` holds their places).
        fuse: trace attention and norms as onnxruntime's own operators (`can_fuse` says of which models).

    Returns:
        A graph whose bytes depend only on the weights and the architecture.
    """
    graph = trace(model, task, fuse=fuse)
    passes.optimise(graph)
    if fuse:
        passes.drop_reshapes(graph)
        passes.fuse_residual_norms(graph)
        halve_rotations(graph)
    passes.drop_unused(graph)
    passes.rename_initializers(graph, _renamed(graph, prefixes or {}))
    passes.transpose_weights(graph)
    if task == "causal-lm":
        join_same_inputs(graph)
    passes.name_interface(graph)
    if swappable:
        passes.declare_adapters(graph)
    if half:
        passes.store_as_float16(graph)
    passes.strip_metadata(graph)
    passes.sort_initializers(graph)
    passes.import_contrib_operators(graph)
    return graph


def _renamed(graph: ir.Model, prefixes: Mapping[str, str]) -> dict[str, str]:
    pairs = (
        (name, old) for name in graph.graph.initializers for old in prefixes if name.startswith(old)
    )
    return {name: prefixes[old] + name.removeprefix(old) for name, old in pairs}


def write_graph(graph: ir.Model, directory: Path, task: str) -> None:
    """Write `model.onnx`, and `model.onnx.data` where weights lie outside, then run onnx's checker.

    A language model's weights always lie outside: onnxruntime and onnxruntime-genai map that file
    instead of copying it, and a directory looks the same at any size. A small classifier is one
    self-contained file, up to `INLINE_LIMIT`.

    Raises:
        CheckFailed: onnx finds the graph invalid.
    """
    outside = task == "causal-lm" or _weight_bytes(graph) > INLINE_LIMIT
    path = directory / GRAPH_FILE
    if outside:
        ir.save(graph, path, external_data=DATA_FILE, size_threshold_bytes=_EXTERNAL_FROM)
    else:
        ir.save(graph, path)
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise CheckFailed(
            f"{path}: onnx finds the exported graph invalid ({str(error).splitlines()[0]})"
        ) from error


def _weight_bytes(graph: ir.Model) -> int:
    values: Any = graph.graph.initializers.values()
    return sum(value.const_value.nbytes for value in values)
