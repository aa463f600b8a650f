"""From a torch module to an unoptimised ONNX graph with free batch and sequence axes.

The route is transformers' own exporter. A causal LM is traced once, on a step of several tokens over a
filled cache, so that one graph prefills (empty cache) and decodes; the sample is padded, because an
all-ones mask makes the exporter drop `attention_mask`.
"""

import contextlib
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from qlx.errors import Unsupported
from qlx.exporting.fused import FUSED_OPSET, fused
from qlx.exporting.quiet import quiet
from qlx.models import image_shape

__all__ = ["trace"]

_FREE = torch.export.Dim.DYNAMIC
_TRACE_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)
"""What tracing raises on a model it cannot follow; torch's own errors are RuntimeErrors."""


def trace(model: nn.Module, task: str, *, fuse: bool = False) -> ir.Model:
    """Trace a model in eval mode; inputs and outputs keep the exporter's names.

    Args:
        model: the module; with `fuse` one that `can_fuse`.
        task: of the checkpoint it came from.
        fuse: trace attention and norms as onnxruntime's own operators.

    Raises:
        Unsupported: torch cannot trace the architecture; its reason is in the message.
    """
    from transformers.exporters import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    sample, shapes = _text_sample(model) if task == "causal-lm" else _image_sample(model)
    config = OnnxConfig(
        dynamic_shapes=shapes, optimize=False, opset_version=FUSED_OPSET if fuse else None
    )
    operators = fused(model) if fuse else contextlib.nullcontext()
    try:
        with quiet(), torch.no_grad(), operators:
            return OnnxExporter().export(model, sample, config).program
    except _TRACE_ERRORS as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        name = type(model).__name__
        raise Unsupported(
            f"{name}: torch cannot export this architecture to ONNX ({reason})"
        ) from error


def _image_sample(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    pixels = torch.zeros(2, *image_shape(model.config))
    return {"pixel_values": pixels}, {"pixel_values": {0: _FREE}}


def _text_sample(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    from transformers.cache_utils import DynamicCache

    past, fresh = 4, 3
    mask = torch.ones(2, past + fresh, dtype=torch.long)
    mask[0, :2] = 0
    spots = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache()
    with torch.no_grad():
        model(
            input_ids=torch.ones(2, past, dtype=torch.long),
            attention_mask=mask[:, :past],
            position_ids=spots[:, :past],
            past_key_values=cache,
            use_cache=True,
        )
    sample = {
        "input_ids": torch.ones(2, fresh, dtype=torch.long),
        "attention_mask": mask,
        "position_ids": spots[:, past:],
        "past_key_values": cache,
        "use_cache": True,
    }
    rows = {0: _FREE, 1: _FREE}
    tensors = 2 * len(cache.layers)
    shapes = {
        "input_ids": rows,
        "attention_mask": rows,
        "position_ids": rows,
        "past_key_values": [{0: _FREE, 2: _FREE}] * tensors,
    }
    return sample, shapes
