"""What quantized layers weigh in training, with scales and states, against bf16; and that no copy is kept."""

import pytest
import torch
from torch import nn

from qlx.checkpoint import QuantSpec
from qlx.quant import packed_modules, quantize_model

SHAPES = ((1024, 1024), (256, 1024), (2816, 1024), (1024, 2816))


def spec(scheme, **fields):
    bits = {"ternary": 2, "int2": 2, "int8": 8}.get(scheme, 4)
    return QuantSpec(
        method="qlora", weight_bits=bits, scheme=scheme, compute_dtype="float32", **fields
    )


LIMITS = {  # most bytes a weight, as a share of bf16's two
    "nf4": (spec("nf4", group_size=64), 0.282),
    "nf4, double": (spec("nf4", group_size=64, double_quant=True), 0.26),
    "fp4": (spec("fp4", group_size=64), 0.282),
    "nf4, blocks of 128": (spec("nf4", group_size=128), 0.267),
    "int8": (spec("int8"), 0.503),
    "int4": (spec("int4", group_size=128), 0.267),
    "int2": (spec("int2", group_size=128, symmetric=False), 0.145),
    "ternary": (spec("ternary", group_size=128), 0.142),
    "ternary, groups of 64": (spec("ternary", group_size=64), 0.16),
    "ternary, whole": (spec("ternary"), 0.1255),
}


def tensors_of(value, seen):
    """All tensors that a layer reaches: parameters, buffers, and those of bitsandbytes' states."""
    if isinstance(value, torch.Tensor):
        yield value
        value = value.__dict__
    elif isinstance(value, list | tuple):
        value = dict(enumerate(value))
    elif hasattr(value, "__dict__"):
        value = value.__dict__
    if isinstance(value, dict) and id(value) not in seen:
        seen.add(id(value))
        for item in value.values():
            yield from tensors_of(item, seen)


def stored_bytes(model):
    storages = {}
    for _, layer in packed_modules(model):
        for tensor in tensors_of(layer, set()):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def quantized(spec):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(inner, outer, bias=False) for outer, inner in SHAPES))
    assert len(quantize_model(model, spec)) == len(SHAPES)
    return model


@pytest.mark.parametrize("name", LIMITS)
def test_quantized_layers_weigh_what_is_said(name):
    spec, limit = LIMITS[name]
    model = quantized(spec)
    plain = 2 * sum(outer * inner for outer, inner in SHAPES)
    share = stored_bytes(model) / plain
    assert limit - 0.02 < share <= limit
    x = torch.randn(2, 1024, requires_grad=True)
    model[0](x).sum().backward()  # a forward and a backward pass leave nothing behind
    assert stored_bytes(model) / plain == share


def test_a_kept_copy_of_a_weight_would_show():
    model = quantized(LIMITS["ternary"][0])
    before = stored_bytes(model)
    model[0].cached = torch.zeros(SHAPES[0], dtype=torch.bfloat16)
    assert stored_bytes(model) > before + SHAPES[0][0] * SHAPES[0][1]
