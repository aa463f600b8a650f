"""A bitsandbytes `Linear4bit` that is exact on CPU and never changes its own weights.

Imported lazily, because importing bitsandbytes takes seconds. What bitsandbytes 0.50 does on CPU,
each shown by a test in tests/quant/test_bitsandbytes_faults.py:

1. `dequantize_4bit` is wrong when a row is not a whole number of blocks (and a multiple of 16).
2. The first forward in eval mode on a CPU with AVX512-BF16 repacks codes and scales in place; any
   later dequantize or merge returns noise, and a saved model has other weights.
3. The same path asserts when the rows are no multiple of 32.
4. `forward` casts the bias in place to the compute dtype; its low bits are lost for good.

The guard avoids all four: one product with the dequantized weight, which is computed as
level * absmax in float32 and cast once to the compute dtype (the value the stock forward computes
with), dequantized again in the backward pass instead of kept.
"""

from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from qlx.errors import Unsupported
from qlx.quant.codec4bit import (
    NESTED_BLOCK,
    NestedScales,
    Packed4bit,
    levels,
    unnest_scales,
)
from qlx.quant.recompute import linear_remade

__all__ = ["GuardedLinear4bit", "guard_module", "guarded_linear", "packed_of_module"]


def _values(weight: Tensor, *, state: Any, dtype: torch.dtype) -> Tensor:
    """The dequantized weight [out, in], level * absmax in float32, cast to `dtype`."""
    absmax = _scales(state) if state.nested else state.absmax
    values: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        weight.view(-1, 1), absmax, state.blocksize, state.quant_type, state.shape, dtype
    )
    return values


def _scales(state: Any) -> Tensor:
    """`unnest_scales` in one pass over the scales; a layer needs them twice a training step."""
    inner = state.state2
    scales: Tensor = torch.ops.bitsandbytes.dequantize_blockwise.default(
        state.absmax, inner.absmax, inner.code, inner.blocksize, torch.float32
    )
    return scales.add_(state.offset)


def _product(x: Tensor, weight: Tensor, *, state: Any) -> Tensor:
    """X [..., in] times the weight's transpose on a GPU, where bitsandbytes' one operation is as exact as our three."""
    inner = state.state2
    scales = state.absmax if inner is None else inner.absmax
    nested = {} if inner is None else {
        "absmax_8bit": state.absmax, "absmax_code": inner.code, "absmax_offset": state.offset
    }  # fmt: skip
    result: Tensor = torch.ops.bitsandbytes.gemm_4bit.default(
        x, weight.view(-1, 1), state.shape, scales, state.blocksize, state.quant_type, **nested
    )
    return result


def _nested_of(state: Any) -> NestedScales:
    return NestedScales(state.absmax, state.state2.absmax, state.offset, state.state2.code)


class GuardedLinear4bit(bnb.nn.Linear4bit):  # type: ignore[misc,unused-ignore]
    """`Linear4bit` with a forward that is exact, never repacks and never touches its bias."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out] in the dtype of x, computed in `compute_dtype` if set."""
        dtype, state = self.compute_dtype or x.dtype, _state_of(self)
        make = partial(_values, state=state, dtype=dtype)
        product = partial(_product, state=state) if x.is_cuda else None
        y = linear_remade(x.to(dtype), make, self.weight, product=product)
        if self.bias is not None:
            y += self.bias.to(dtype)
        return y.to(x.dtype)


def _state_of(module: Any) -> Any:
    """The quantization state, which some wrappers leave on the module only."""
    state = getattr(module.weight, "quant_state", None) or module.quant_state
    if state is None:
        raise Unsupported(
            "a 4-bit layer has no quantization state; move the model to its device first"
        )
    return state


def guard_module(name: str, module: Any) -> None:
    """Turn one quantized `Linear4bit` into a guarded one, in place.

    Raises:
        Unsupported: bitsandbytes has repacked it already, it stands for a transposed `Conv1D`, or
            its rows are not whole blocks, which stock bitsandbytes would read wrongly.
    """
    state = _state_of(module)
    if getattr(state, "packing_format_for_cpu", False):
        raise Unsupported(
            f"layer {name!r} was run before it was guarded and its weights are repacked; "
            "load the model again and guard it before the first forward"
        )
    if getattr(module, "source_cls", nn.Linear).__name__ == "Conv1D":
        raise Unsupported(
            f"layer {name!r} is a transposed Conv1D; quantize this model with mode: manual"
        )
    columns = state.shape[-1]
    if columns % state.blocksize:
        raise Unsupported(
            f"layer {name!r} has {columns} inputs, not a multiple of the block size "
            f"{state.blocksize}; bitsandbytes reads such weights wrongly: add it to skip_modules"
        )
    state.dtype = torch.float32  # what PEFT's DoRA decodes to; the codes mean float32 values
    module.__class__ = GuardedLinear4bit
    module.support_avx512bf16_for_cpu = False


def packed_of_module(module: Any) -> Packed4bit:
    """Codes and scales of a quantized `Linear4bit`, sharing its memory.

    Raises:
        Unsupported: the layer is not quantized yet, or bitsandbytes has repacked it.
    """
    state = _state_of(module)
    if getattr(state, "packing_format_for_cpu", False):
        raise Unsupported("the layer's weights were repacked by bitsandbytes; load the model again")
    nested = _nested_of(state) if state.nested else None
    return Packed4bit(
        codes=module.weight.detach().contiguous().view(torch.uint8).reshape(-1),
        absmax=state.absmax if nested is None else unnest_scales(nested),
        nested=nested,
        shape=tuple(state.shape),
        dtype=state.dtype,
        scheme=state.quant_type,
        block_size=state.blocksize,
    )


def guarded_linear(
    packed: Packed4bit, bias: nn.Parameter | None, compute_dtype: torch.dtype
) -> GuardedLinear4bit:
    """A guarded layer around an already packed weight [out, in]; `bias` is used as it is."""
    out_features, in_features = packed.shape
    with torch.device("meta"):
        layer = GuardedLinear4bit(
            in_features,
            out_features,
            bias=False,
            compute_dtype=compute_dtype,
            compress_statistics=packed.nested is not None,
            quant_type=packed.scheme,
        )
    state = _quant_state(packed)
    layer.weight = bnb.nn.Params4bit(
        packed.codes.view(-1, 1),
        requires_grad=False,
        quant_state=state,
        blocksize=packed.block_size,
        compress_statistics=packed.nested is not None,
        quant_type=packed.scheme,
        module=layer,
        bnb_quantized=True,
    )
    layer.quant_state = state
    layer.bias = bias
    layer.support_avx512bf16_for_cpu = False
    return layer


def _quant_state(packed: Packed4bit) -> Any:
    state = bnb.functional.QuantState
    nested = packed.nested
    inner = None
    if nested is not None:
        inner = state(
            absmax=nested.absmax,
            code=nested.map.clone(),
            blocksize=NESTED_BLOCK,
            dtype=torch.float32,
        )
    return state(
        absmax=packed.absmax if nested is None else nested.codes,
        shape=torch.Size(packed.shape),
        code=levels(packed.scheme).clone(),
        blocksize=packed.block_size,
        quant_type=packed.scheme,
        dtype=packed.dtype,
        offset=None if nested is None else nested.offset,
        state2=inner,
    )
