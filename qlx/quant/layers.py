"""Quantizing a model in place, and what applies to all of its quantized layers at once."""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qlx.checkpoint import QuantSpec
from qlx.errors import Unsupported, require
from qlx.quant.codec import PackedTensor, quantize_tensor
from qlx.quant.codec4bit import FOUR_BIT, Packed4bit, torch_dtype_of
from qlx.quant.eight_bits import in_eight_bits
from qlx.quant.export_linear import LARGEST_BLOCK, IntegerMatMul, PackedLinear
from qlx.quant.integer_linear import IntegerLinear
from qlx.quant.integers import PackedIntegers

__all__ = [
    "HEAD_NAMES",
    "Keep",
    "eligible_modules",
    "guard_bitsandbytes",
    "head_modules",
    "in_memory",
    "kept",
    "linear4bit_modules",
    "names_part",
    "packed_layer",
    "packed_linears",
    "packed_modules",
    "packed_of_module",
    "quantize_model",
    "rounding_of_levels",
    "set_compute_dtype",
]

HEAD_NAMES = ("lm_head", "classifier", "score", "qa_outputs", "embed_out", "head", "fc")
"""Name components of output heads: small, precise, often trained; never quantized."""


def eligible_modules(
    model: nn.Module, skip_modules: Iterable[str] = (), group_size: int | None = 64
) -> list[str]:
    """Names of the `nn.Linear` layers to quantize, in the order of the model.

    Left out: heads (`HEAD_NAMES`, and what the model calls its output embeddings), layers whose
    weight another module shares, and those that `skip_modules` names. An entry names a layer or a
    whole part of the model by dotted components: `mlp`, `layers.0`, `vit.layers.3.attention`.

    Raises:
        Unsupported: a layer's inputs are no multiple of `group_size` (which bitsandbytes would
            read wrongly; None allows any), or an entry of `skip_modules` matches nothing.
    """
    skips = tuple(skip_modules)
    _check_skips(model, skips)
    shared, heads = _shared_weights(model), head_modules(model)
    names, odd = [], []
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or id(module.weight) in shared:
            continue
        if name in heads or any(names_part(name, skip) for skip in skips):
            continue
        names.append(name)
        if group_size is not None and module.in_features % group_size:
            odd.append(f"{name} ({module.in_features})")
    if odd:
        raise Unsupported(
            f"inputs are no multiple of the block size {group_size} in {', '.join(odd[:4])}"
            f"{' and others' if len(odd) > 4 else ''}; add them to skip_modules"
        )
    return names


def head_modules(model: nn.Module) -> set[str]:
    """Names of the output heads and their parts: `HEAD_NAMES`, and what the model calls its own."""
    output: Any = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        name
        for name, module in model.named_modules()
        if any(names_part(name, head) for head in HEAD_NAMES)
        or (output is not None and module is output)
    }


def names_part(name: str, entry: str) -> bool:
    """Whether the dotted components of `entry` occur in a row in those of `name`."""
    return f".{entry}." in f".{name}."


def _check_skips(model: nn.Module, skips: tuple[str, ...]) -> None:
    names = [name for name, _ in model.named_modules()]
    for entry in skips:
        if not any(names_part(name, entry) for name in names):
            raise Unsupported(f"skip_modules: {entry!r} names no part of this model")


def _shared_weights(model: nn.Module) -> set[int]:
    """Ids of parameters that several modules hold, such as tied embeddings."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


Keep = Callable[[str, Tensor], Tensor]
"""Says where the codes of a weight, given its name, are to lie: returns them, in their new place."""


def in_memory(name: str, codes: Tensor) -> Tensor:
    """The `Keep` of a model that is in memory: codes lie where they were made."""
    return codes


def kept(packed: PackedTensor, name: str, keep: Keep) -> PackedTensor:
    """The same packed weight with its codes where `keep` puts them; scales stay where they are."""
    assert isinstance(packed, Packed4bit | PackedIntegers)
    return replace(packed, codes=keep(name, packed.codes))


def quantize_model(model: nn.Module, spec: QuantSpec, keep: Keep = in_memory) -> list[str]:
    """Replace every eligible `nn.Linear` by a packed layer, in place; returns their names.

    NF4 and FP4 become guarded layers of bitsandbytes, integer schemes an `IntegerLinear`. Codes come
    from qlx's own codec, so merging and packing find the same ones on any machine. The layers
    compute with the float32 values of their codes whatever dtype the base was loaded in.

    Raises:
        Unsupported: as `eligible_modules`, and when no layer is eligible.
        MissingExtra: NF4 or FP4 without bitsandbytes.
    """
    four_bit = spec.scheme in FOUR_BIT
    group_size = spec.group_size or 64 if four_bit else spec.group_size
    names = eligible_modules(model, spec.skip_modules, group_size)
    if not names:
        raise Unsupported("no linear layer of this model can be quantized")
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        packed = kept(quantize_tensor(linear.weight, spec), f"{name}.codes", keep)
        assert isinstance(packed, Packed4bit | PackedIntegers)
        values = replace(packed, dtype=torch.float32)
        dtype = torch_dtype_of(spec.compute_dtype)
        layer = packed_layer(values, linear.bias, dtype, spec.activation_bits)
        layer.train(linear.training)
        model.set_submodule(name, layer.to(linear.weight.device))
    if four_bit:
        model.is_loaded_in_4bit = True  # type: ignore[assignment]  # how PEFT knows
    return names


def packed_layer(
    packed: PackedTensor,
    bias: nn.Parameter | None,
    compute_dtype: torch.dtype | None,
    activation_bits: int | None,
) -> nn.Module:
    """The layer that computes with a packed weight: a guarded one of bitsandbytes, or an `IntegerLinear`."""
    if isinstance(packed, PackedIntegers):
        return IntegerLinear(packed, bias, compute_dtype, activation_bits)
    assert isinstance(packed, Packed4bit)
    require("bitsandbytes", "train")
    from qlx.quant.guard import guarded_linear

    dtype = compute_dtype or torch.float32
    layer: nn.Module = guarded_linear(replace(packed, dtype=torch.float32), bias, dtype)
    return layer


def linear4bit_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every bitsandbytes 4-bit linear layer of a model, guarded or not, with its name."""
    bnb = sys.modules.get("bitsandbytes")  # a model of its layers has imported it
    if bnb is not None:
        for name, module in model.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                yield name, module


def packed_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every linear layer with a packed weight, of any scheme, with its name, in the model's order."""
    four_bit = {name for name, _ in linear4bit_modules(model)}
    for name, module in model.named_modules():
        if name in four_bit or isinstance(module, IntegerLinear):
            yield name, module


def guard_bitsandbytes(model: nn.Module) -> int:
    """Make every bitsandbytes 4-bit linear layer exact and non-mutating; returns how many.

    Call it after loading and before the first forward. See `qlx.quant.guard`.

    Raises:
        Unsupported: a layer cannot be made right (the message says why and what to do).
    """
    require("bitsandbytes", "train")
    from qlx.quant.guard import guard_module

    layers = list(linear4bit_modules(model))
    for name, module in layers:
        guard_module(name, module)
    return len(layers)


def packed_of_module(module: nn.Module) -> PackedTensor:
    """Codes and scales of a packed layer, sharing its memory.

    Raises:
        Unsupported: a bitsandbytes layer that is not quantized yet, or that it has repacked.
    """
    if isinstance(module, IntegerLinear):
        return module.packed
    require("bitsandbytes", "train")
    from qlx.quant.guard import packed_of_module as of_module

    return of_module(module)


def packed_linears(model: nn.Module, *, accuracy_level: int = 0) -> list[str]:
    """Replace every packed layer by one that exports to ONNX, in place; returns their names.

    4-bit layers of bitsandbytes become a `PackedLinear`, integer ones an `IntegerMatMul` with `accuracy_level`;
    with one above 0 so do the 4-bit ones, their levels rounded (`in_eight_bits`).

    Raises:
        Unsupported: onnxruntime's kernels do not take the sizes of a layer, which the message names.
    """
    layers = list(packed_modules(model))
    for name, layer in layers:
        try:
            linear = _exportable(layer, accuracy_level)
        except Unsupported as error:
            raise Unsupported(f"layer {name!r}: {error}") from error
        model.set_submodule(name, linear.train(layer.training))
    return [name for name, _ in layers]


def _exportable(layer: Any, accuracy_level: int) -> nn.Module:
    packed = packed_of_module(layer)
    if isinstance(packed, Packed4bit) and not accuracy_level:
        if packed.block_size > LARGEST_BLOCK:
            raise Unsupported(
                f"onnxruntime's 4-bit product takes blocks up to {LARGEST_BLOCK} values, not {packed.block_size}"
            )
        return PackedLinear(packed, layer.bias, layer.compute_dtype or torch.float32)
    bits = None
    if isinstance(packed, Packed4bit):
        packed = in_eight_bits(packed)
    else:
        bits = layer.activation_bits
    assert isinstance(packed, PackedIntegers)
    return IntegerMatMul(packed, layer.bias, accuracy_level=accuracy_level, activation_bits=bits)


def rounding_of_levels(model: nn.Module) -> float | None:
    """How far all 4-bit weights together are from what `in_eight_bits` makes of them, relative (Frobenius).

    None for a model without any.
    """
    packed = [packed_of_module(layer) for _, layer in packed_modules(model)]
    four_bit = [each for each in packed if isinstance(each, Packed4bit)]
    gap, size = 0.0, 0.0
    for each in four_bit:
        values = each.values()
        gap += float((in_eight_bits(each).values() - values).square().sum(dtype=torch.float64))
        size += float(values.square().sum(dtype=torch.float64))
    return (gap / size) ** 0.5 if size else None


def set_compute_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Let every packed layer multiply in `dtype`; codes, scales and other layers stay as they are."""
    for module in model.modules():
        if isinstance(module, PackedLinear | IntegerLinear):
            module.compute_dtype = dtype
    for _, layer in linear4bit_modules(model):
        layer.compute_dtype = dtype
        layer.compute_type_is_set = True
