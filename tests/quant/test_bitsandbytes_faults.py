"""What stock bitsandbytes gets wrong on CPU, and that the guard makes it right.

Each `test_stock_*` demonstrates a fault. When a newer bitsandbytes mends it, that test fails with
«guard no longer needed», so that a guard is removed when it can be and not kept by habit.
"""

import copy
import io

import pytest
import torch
from torch import nn

from qlx.checkpoint import QuantSpec
from qlx.errors import Unsupported
from qlx.quant import (
    dequantize_tensor,
    guard_bitsandbytes,
    packed_entries,
    packed_of_module,
    quantize_tensor,
)

bnb = pytest.importorskip("bitsandbytes")
F = bnb.functional

REPACKS = bool(F.has_avx512bf16())
needs_repacking_cpu = pytest.mark.skipif(
    not REPACKS,
    reason="this CPU has no AVX512-BF16 (or bitsandbytes does not see it), so stock bitsandbytes "
    "never takes the path that repacks weights in place: the fault cannot be shown here",
)
needs_its_cpu_library = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="where there is a GPU, bitsandbytes computes on the CPU by other code, without this fault",
)
SPEC = QuantSpec(method="qlora", scheme="nf4", group_size=64)


def mended(what):
    return f"guard no longer needed: this bitsandbytes ({bnb.__version__}) {what}"


def stock_layer(out_features=64, in_features=128, nested=False, bias=False, dtype=torch.float32):
    torch.manual_seed(out_features + in_features)
    layer = bnb.nn.Linear4bit(
        in_features, out_features, bias, dtype, compress_statistics=nested, quant_type="nf4"
    )
    weight = torch.randn(out_features, in_features) * 0.05
    layer.weight = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=nested
    )
    if bias:
        layer.bias.data = torch.randn(out_features)
    return layer.to("cpu").eval(), weight


def oracle(weight, nested=False):
    spec = SPEC.model_copy(update={"double_quant": nested})
    return dequantize_tensor(quantize_tensor(weight, spec), torch.float64)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# 1. dequantize_4bit where a row is not a whole number of blocks


@needs_its_cpu_library
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="the faulty kernel is the AVX512 one; this CPU runs another",
)
@pytest.mark.parametrize("columns", [96, 688, 4064])
def test_stock_dequantize_is_wrong_for_rows_of_broken_blocks(columns):
    weight = torch.randn(32, columns, generator=torch.Generator().manual_seed(columns))
    codes, state = F.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    stock = relative(F.dequantize_4bit(codes, state), weight)
    ours = relative(oracle(weight), weight)
    assert ours < 0.1
    assert stock > 1.3 * ours, mended("dequantizes rows that are not whole blocks")


@needs_its_cpu_library
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="the faulty kernel is AVX512's"
)
def test_stock_fault_depends_on_the_block_not_on_64():
    """192 columns are whole blocks of 64, and are wrong with blocks of 128."""
    weight = torch.randn(32, 192, generator=torch.Generator().manual_seed(0))
    wrong = F.dequantize_4bit(*F.quantize_4bit(weight, blocksize=128, quant_type="nf4"))
    right = F.dequantize_4bit(*F.quantize_4bit(weight, blocksize=64, quant_type="nf4"))
    assert relative(right, weight) < 0.1
    assert relative(wrong, weight) > 0.1, mended("dequantizes rows that are not whole blocks")


def test_guard_refuses_rows_of_broken_blocks():
    model = nn.Sequential(stock_layer(in_features=96)[0])
    with pytest.raises(Unsupported, match=r"'0' has 96 inputs.*skip_modules"):
        guard_bitsandbytes(model)


# 2. a forward in eval mode repacks codes and scales in place


@needs_repacking_cpu
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
def test_stock_forward_destroys_the_weights(nested):
    layer, weight = stock_layer(nested=nested)
    before = F.dequantize_4bit(layer.weight, layer.weight.quant_state)
    assert relative(before, oracle(weight, nested)) < 1e-7
    with torch.no_grad():
        layer(torch.randn(3, 128))
    after = dequantized_if_possible(layer)
    assert after is None or relative(after, before) > 0.5, mended("no longer repacks in place")


def dequantized_if_possible(layer):
    try:
        return F.dequantize_4bit(layer.weight, layer.weight.quant_state).view(64, 128)
    except (AttributeError, RuntimeError):
        return None  # the state has lost its nested scales


@needs_repacking_cpu
def test_stock_saves_other_scales_after_a_forward():
    layer, _ = stock_layer(nested=True)
    before = {k: v.clone() for k, v in copy.deepcopy(layer).state_dict().items()}
    with torch.no_grad():
        layer(torch.randn(3, 128))
    after = layer.state_dict()
    changed = [k for k in before if k not in after or not torch.equal(before[k], after[k])]
    assert changed, mended("saves what it loaded")


@needs_repacking_cpu
def test_stock_backward_fails_after_a_forward_in_eval_mode():
    layer, _ = stock_layer(nested=True)
    with torch.no_grad():
        layer(torch.randn(3, 128))
    x = torch.randn(3, 128, requires_grad=True)
    gradient = None
    try:
        layer(x).sum().backward()
        gradient = x.grad
    except (AttributeError, TypeError, RuntimeError):
        pass
    right = torch.ones(3, 64).double() @ oracle(stock_layer(nested=True)[1], True)
    assert gradient is None or relative(gradient, right) > 0.1, mended("differentiates")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
def test_guarded_forward_is_exact_and_changes_nothing(nested, dtype):
    layer, weight = stock_layer(nested=nested, bias=True, dtype=dtype)
    model = nn.Sequential(layer)
    assert guard_bitsandbytes(model) == 1
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(5, 128)
    with torch.no_grad():
        y = model(x)
        again = model(x)
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(y, again)
    right = x.double() @ oracle(weight, nested).T + layer.bias.double()
    assert relative(y, right) < (1e-6 if dtype is torch.float32 else 8e-3)
    assert relative(dequantize_tensor(packed_of_module(layer)), oracle(weight, nested)) < 1e-7
    assert relative(y, right + 0.01 * right.abs().max()) > 1e-3  # negative control


def test_guarded_backward_is_exact_also_after_a_forward_in_eval_mode():
    layer, weight = stock_layer(nested=True)
    model = nn.Sequential(layer)
    guard_bitsandbytes(model)
    with torch.no_grad():
        model(torch.randn(3, 128))
    x = torch.randn(3, 128, requires_grad=True)
    gradient_of_y = torch.randn(3, 64)
    (model(x) * gradient_of_y).sum().backward()
    right = gradient_of_y.double() @ oracle(weight, True)
    assert relative(x.grad, right) < 1e-6
    assert relative(-x.grad, right) > 1  # negative control


def test_guarded_model_saves_what_it_loaded():
    layer, _ = stock_layer(nested=True)
    model = nn.Sequential(layer)
    guard_bitsandbytes(model)
    entries = packed_entries(packed_of_module(layer), "0.weight")
    with torch.no_grad():
        model(torch.randn(3, 128))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert {k: v.reshape(-1).tolist() for k, v in saved.items()} == {
        k: v.reshape(-1).tolist() for k, v in entries.items()
    }


@needs_repacking_cpu
def test_guard_refuses_a_layer_that_was_repacked_already():
    layer, _ = stock_layer()
    with torch.no_grad():
        layer(torch.randn(3, 128))
    with pytest.raises(Unsupported, match="load the model again"):
        guard_bitsandbytes(nn.Sequential(layer))
    with pytest.raises(Unsupported, match="repacked"):
        packed_of_module(layer)


# 3. the same path asserts for shapes it cannot repack


@needs_repacking_cpu
@pytest.mark.parametrize("rows", [48, 10])
def test_stock_forward_asserts_for_rows_not_a_multiple_of_32(rows):
    layer, _ = stock_layer(out_features=rows)
    failed = False
    try:
        with torch.no_grad():
            layer(torch.randn(3, 128))
    except (AssertionError, RuntimeError):
        failed = True
    assert failed, mended("takes any number of rows")


@needs_repacking_cpu
def test_stock_forward_fails_for_broken_blocks():
    layer, _ = stock_layer(in_features=96)
    failed = False
    try:
        with torch.no_grad():
            layer(torch.randn(3, 96))
    except (AssertionError, RuntimeError):
        failed = True
    assert failed, mended("takes any number of columns")


@pytest.mark.parametrize("rows", [48, 10, 1])
def test_guarded_forward_takes_any_number_of_rows(rows):
    layer, weight = stock_layer(out_features=rows)
    guard_bitsandbytes(nn.Sequential(layer))
    x = torch.randn(3, 128)
    with torch.no_grad():
        assert relative(layer(x), x.double() @ oracle(weight).T) < 1e-6


# 4. the bias is cast in place


def test_stock_forward_rounds_the_bias_in_place():
    layer, _ = stock_layer(bias=True, dtype=torch.bfloat16)
    before = layer.bias.data.clone()
    layer.train()(torch.randn(3, 128))
    changed = layer.bias.dtype is not torch.float32 or not torch.equal(before, layer.bias)
    assert changed, mended("leaves the bias alone")


def test_guarded_forward_leaves_the_bias_alone():
    layer, _ = stock_layer(bias=True, dtype=torch.bfloat16)
    guard_bitsandbytes(nn.Sequential(layer))
    before = layer.bias.data.clone()
    layer.train()(torch.randn(3, 128))
    layer.eval()(torch.randn(3, 128))
    assert layer.bias.dtype is torch.float32
    assert torch.equal(before, layer.bias)


# and one that is documented rather than guarded


def test_stock_backward_uses_other_values_than_its_forward():
    """For a base in bfloat16 and float32 compute, stock backward uses rounded weights.

    Its forward multiplies by level * absmax; the guard uses that in both passes.
    """
    weight = (torch.randn(64, 128, generator=torch.Generator().manual_seed(5)) * 0.05).bfloat16()
    layer = bnb.nn.Linear4bit(128, 64, False, torch.float32, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
    layer = layer.to("cpu").train()
    right = dequantize_tensor(packed_of_module(layer), torch.float32).sum(0)

    def gradient():
        x = torch.zeros(1, 128, requires_grad=True)
        layer(x).sum().backward()
        return x.grad[0]

    assert relative(gradient(), right) > 1e-4, mended("uses one value in both passes")
    guard_bitsandbytes(nn.Sequential(layer))
    assert relative(gradient(), right) < 1e-6
