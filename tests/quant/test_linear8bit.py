"""What bitsandbytes' 8-bit layer does on CPU, for which reasons int8 bases are trained in ours.

Right: its values are code * absmax / 127, weight only, repeatable, with exact gradients. Wrong: it
goes through float16 to find the codes, and casts its bias in place for good. On a GPU the same layer
rounds its inputs, too, so a model trained there computes something else here.
"""

import pytest
import torch
from torch import nn

from qlx.checkpoint import QuantSpec
from qlx.quant import IntegerLinear, quantize_tensor

bnb = pytest.importorskip("bitsandbytes")
SPEC = QuantSpec(scheme="int8", weight_bits=8)


def layers(scale=1.0):
    torch.manual_seed(0)
    dense = nn.Linear(128, 48)
    dense.weight.data *= scale
    stock = bnb.nn.Linear8bitLt(128, 48, has_fp16_weights=False, threshold=6.0)
    stock.load_state_dict(dense.state_dict())
    ours = IntegerLinear(quantize_tensor(dense.weight, SPEC), nn.Parameter(dense.bias.clone()))
    return dense, stock.to("cpu"), ours


def stock_values(stock):
    codes = stock.weight.CB if stock.weight.CB is not None else stock.state.CB
    scales = stock.weight.SCB if stock.weight.SCB is not None else stock.state.SCB
    return codes.float() * scales[:, None] / 127


def relative(a, b):
    return float((a - b).detach().norm() / b.detach().norm())


def test_both_compute_with_their_codes_and_agree():
    dense, stock, ours = layers()
    x = torch.randn(16, 128)
    x[:, 3] *= 30  # an outlier column, which the layer would treat apart on a GPU
    out = stock(x)
    assert relative(out, nn.functional.linear(x, stock_values(stock), dense.bias)) < 1e-6
    assert relative(ours(x), out) < 2e-3
    assert relative(dense(x), out) > 1e-3  # negative control: quantization is not nothing
    assert torch.equal(stock(x), out)


def test_the_stock_layer_loses_bits_of_its_bias_and_ours_does_not():
    dense, stock, ours = layers()
    for layer in (stock, ours):
        layer(torch.randn(2, 128).bfloat16())
    assert stock.bias.dtype is torch.bfloat16
    assert not torch.equal(stock.bias.float(), dense.bias)
    assert torch.equal(ours.bias, dense.bias)


def test_the_stock_layer_finds_codes_through_float16():
    """Weights outside float16's range are lost; in ours they are quantized like any others."""
    dense, stock, ours = layers(scale=1e7)
    assert relative(ours.dequantize(), dense.weight) < 1e-2
    values = stock_values(stock)
    assert not bool(torch.isfinite(values).all()) or relative(values, dense.weight) > 0.1
