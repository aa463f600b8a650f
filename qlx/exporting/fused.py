"""Tracing a causal LM with onnxruntime's fused attention in place of the architecture's own.

While `fused` is active, a model of a known architecture computes rotation by `RotaryEmbedding`, one node for
queries and one for keys, norms by `RMSNormalization`, and cache and attention by `GroupQueryAttention` of
`com.microsoft`, which appends to the cache (in place, where past and present are one buffer) and attends. What
the nodes mean is in ONNX's operator documentation, and of the last one in ONNX Runtime's.

The mask goes in as an additive bias over all positions of the cache, so that any padding, on either side,
means what it means in the architecture's own graph.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FUSED", "FUSED_OPSET", "can_fuse", "fused"]

FUSED = frozenset(
    {
        "bitnet",
        "gemma",
        "gemma2",
        "gemma3_text",
        "llama",
        "mistral",
        "mixtral",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
    }
)
"""Model types whose attention is rotary, causal and called through transformers' attention interface."""

FUSED_OPSET = 23
"""The first with RMSNormalization and RotaryEmbedding."""

_NAME = "qlx_fused"
_HEAD_MULTIPLE = 8
_MASKED = -1e9
"""Added to the score of what may not be seen: exp of it is 0 in float32, and a row of nothing else is no NaN."""


def can_fuse(model: nn.Module, task: str) -> bool:
    """Whether `fused` can be used: a known architecture, causal, with a head size that the kernel takes."""
    config: Any = model.config
    if task != "causal-lm" or config.model_type not in FUSED:
        return False
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    causal = not getattr(config, "use_bidirectional_attention", False)
    return causal and size % _HEAD_MULTIPLE == 0


class _Step:
    """What all layers of one forward share, computed once: mask, lengths, tables; and the cache layer at hand.

    `bias` [B, 1, T, total]; `lengths` int32: each row's last place in the cache [B], and the total [1].
    """

    def __init__(self) -> None:
        self.bias: Tensor | None = None
        self.lengths: tuple[Tensor, ...] = ()
        self.tables: dict[int, tuple[Any, ...]] = {}
        self.layer: Any = None


@contextlib.contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Trace `model`'s attention, rotation and norms as fused nodes while this is active.

    Requires: `can_fuse(model)`, and a `DynamicCache` of plain layers in the sample.
    """
    from transformers.cache_utils import DynamicLayer
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    step = _Step()
    config: Any = model.config
    before = config._attn_implementation
    AttentionInterface.register(_NAME, _attention(step))
    AttentionMaskInterface.register(_NAME, _mask(step))
    config._attn_implementation = _NAME
    with contextlib.ExitStack() as patches:
        patches.callback(setattr, config, "_attn_implementation", before)
        _patch(patches, DynamicLayer, "update", _update(step))
        modeling = sys.modules[type(model).__module__]
        _patch(patches, modeling, "apply_rotary_pos_emb", _rotate(step))
        for kind in {
            type(each) for each in model.modules() if type(each).__name__.endswith("RMSNorm")
        }:
            _patch(patches, kind, "forward", _norm)
        yield


def _patch(patches: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    patches.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _mask(step: _Step) -> Callable[..., Tensor]:
    def bias(**given: Any) -> Tensor:
        """[B, 1, T, past + T], 0 where a token is real; causality and the window are the kernel's."""
        mask, length = given["attention_mask"], given["q_length"]
        if step.bias is None:
            seen = mask[:, None, None, :].bool()
            hidden = torch.where(seen, 0.0, _MASKED)
            step.bias = hidden.expand(-1, 1, length, -1).contiguous()
            total = _length(mask, 1)
            step.lengths = (total - 1).expand(mask.shape[0]).contiguous(), total
        return step.bias

    return bias


def _length(x: Tensor, axis: int) -> Tensor:
    """The length of an axis, int32 [1]: two nodes, where a number of the tracer's becomes five."""
    length: Tensor = torch.onnx.ops.symbolic(
        "Shape",
        (x,),
        attrs={"start": axis, "end": axis + 1},
        dtype=torch.int64,
        shape=(1,),
        version=FUSED_OPSET,
    )
    return length.to(torch.int32)


def _rotate(step: _Step) -> Callable[..., tuple[Tensor, Tensor]]:
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        """Queries and keys [B, H, T, D] turned; cos and sin are [B, T, rotated]."""
        if id(cos) not in step.tables:
            half = cos.shape[-1] // 2
            step.tables[id(cos)] = (*(each[..., :half] for each in (cos, sin)), cos)
        cosines, sines, _kept = step.tables[id(cos)]
        return _turned(q, cosines, sines), _turned(k, cosines, sines)

    return rotate


def _turned(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    batch, heads, length, size = x.shape
    rotated = 2 * cosines.shape[-1]
    flat = x.transpose(1, 2).reshape(batch, length, heads * size)
    partial = {} if rotated == size else {"rotary_embedding_dim": rotated}
    turned: Tensor = torch.onnx.ops.symbolic(
        "RotaryEmbedding",
        (flat, cosines, sines),
        attrs={"num_heads": heads, **partial},
        dtype=x.dtype,
        shape=flat.shape,
        version=FUSED_OPSET,
    )
    return turned.reshape(batch, length, heads, size).transpose(1, 2)


def _update(step: _Step) -> Callable[..., tuple[Tensor, Tensor]]:
    def update(
        layer: Any, keys: Tensor, values: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Leaves appending to the kernel; remembers which layer of the cache it is to append to."""
        step.layer = layer
        return keys, values

    return update


def _attention(step: _Step) -> Callable[..., tuple[Tensor, None]]:
    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **given: Any
    ) -> tuple[Tensor, None]:
        """Queries [B, H, T, D], new keys and values [B, G, T, D] to [B, T, H, D]."""
        batch, heads, length, size = query.shape
        groups = key.shape[1]
        cache, (ends, total) = step.layer, step.lengths
        flat = [x.transpose(1, 2).reshape(batch, length, -1) for x in (query, key, value)]
        attributes: dict[str, Any] = {
            "num_heads": heads,
            "kv_num_heads": groups,
            "scale": float(given["scaling"]),
        }
        if given.get("softcap"):
            attributes["softcap"] = float(given["softcap"])
        if given.get("sliding_window"):
            attributes["local_window_size"] = int(given["sliding_window"])
        whole = (batch, groups, mask.shape[-1], size)
        output, cache.keys, cache.values = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            (*flat, cache.keys, cache.values, ends, total, None, None, None, mask),
            attrs=attributes,
            dtypes=(query.dtype,) * 3,
            shapes=((batch, length, heads * size), whole, whole),
            version=1,
        )
        return output.reshape(batch, length, heads, size), None

    return attend


def _norm(module: Any, x: Tensor) -> Tensor:
    """The input scaled to a mean square of 1 over its last axis, times the weight (Gemma's counts from 1)."""
    gemma = not hasattr(module, "variance_epsilon")
    weight = 1.0 + module.weight if gemma else module.weight
    epsilon = module.eps if gemma else module.variance_epsilon
    y: Tensor = torch.onnx.ops.symbolic(
        "RMSNormalization",
        (x, weight),
        attrs={"axis": -1, "epsilon": float(epsilon)},
        dtype=x.dtype,
        shape=x.shape,
        version=FUSED_OPSET,
    )
    return y
