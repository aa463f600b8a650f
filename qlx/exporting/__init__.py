"""ONNX: a checkpoint as a graph that onnxruntime runs, verified before it appears.

Tracing, graph passes, the unmerged adapter's branch, and onnxruntime-genai's configuration live here;
running the result is `qlx.runtime`.
"""

from qlx.exporting.export import PRECISIONS, export_onnx
from qlx.exporting.graph import INLINE_LIMIT, build_graph, write_graph
from qlx.exporting.separate import SeparateLora, separate_adapter
from qlx.exporting.swappable import export_adapters, named_adapters

__all__ = [
    "INLINE_LIMIT",
    "PRECISIONS",
    "SeparateLora",
    "build_graph",
    "export_adapters",
    "export_onnx",
    "named_adapters",
    "separate_adapter",
    "write_graph",
]
