"""Layers whose weights stay packed: outputs, gradients, bytes, and what PEFT makes of them."""

import copy

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from qlx.checkpoint import QuantSpec
from qlx.quant import (
    IntegerLinear,
    dequantize_tensor,
    eligible_modules,
    packed_fingerprint,
    packed_modules,
    packed_of_module,
    quantize_activations,
    quantize_model,
    quantize_tensor,
    set_compute_dtype,
)

SPECS = {
    "ternary": QuantSpec(scheme="ternary", group_size=64, weight_bits=2),
    "ternary whole": QuantSpec(scheme="ternary", weight_bits=2),
    "int4": QuantSpec(scheme="int4", group_size=32, weight_bits=4, symmetric=False),
    "int8": QuantSpec(scheme="int8", weight_bits=8),
}


def made(name="ternary", bias=True, rows=48, columns=128, **options):
    torch.manual_seed(0)
    dense = nn.Linear(columns, rows, bias=bias)
    packed = quantize_tensor(dense.weight, SPECS[name])
    return dense, IntegerLinear(packed, dense.bias, **options)


def with_values(dense, layer):
    reference = copy.deepcopy(dense)
    reference.weight.data = dequantize_tensor(layer.packed, torch.float32)
    return reference


@pytest.mark.parametrize("name", SPECS)
def test_output_and_gradient_equal_a_dense_layer_of_the_same_values(name):
    dense, layer = made(name)
    reference = with_values(dense, layer)
    x = torch.randn(3, 5, 128, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out, expected = layer(x), reference(y)
    assert torch.equal(out, expected)
    target = torch.randn_like(out)
    (out * target).sum().backward()
    (expected * target).sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert not torch.allclose(x.grad, target @ dense.weight, rtol=1e-3)  # negative control
    assert layer.weight.grad is None


def test_gradient_is_that_of_finite_differences():
    _, layer = made(rows=4, columns=64)
    layer.compute_dtype = torch.float64
    x = torch.randn(2, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_nothing_of_the_weights_size_is_kept_for_the_backward_pass():
    """A dense layer keeps its weight; this one keeps only what it holds packed anyway."""
    dense, layer = made(rows=256, columns=256)
    reference = with_values(dense, layer)
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}

    def kept(module, x):
        sizes = []

        def note(tensor):
            if tensor.untyped_storage().data_ptr() not in own:
                sizes.append(tensor.untyped_storage().nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            module(x).sum()
        return sum(sizes)

    x = torch.randn(2, 256, requires_grad=True)
    assert kept(layer, x) < 4096
    assert kept(reference, x) >= 256 * 256 * 4  # negative control


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    _, layer = made()
    x = torch.randn(3, 128)
    gradients = []
    for checkpointed in (False, True):
        y = x.clone().requires_grad_()
        run = torch.utils.checkpoint.checkpoint
        out = run(layer, y, use_reentrant=reentrant) if checkpointed else layer(y)
        out.square().sum().backward()
        gradients.append(y.grad)
    assert torch.equal(*gradients)
    assert gradients[0].abs().sum() > 0


def bytes_of(module):
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@pytest.mark.parametrize(
    ("name", "limit"), [("ternary", 0.16), ("ternary whole", 0.126), ("int4", 0.34), ("int8", 0.51)]
)
def test_bytes_of_the_packed_layers_of_a_model(name, limit):
    """Measured in storages, after a training step, against the same layers in bfloat16."""
    model = nn.Sequential(
        nn.Linear(512, 256, bias=False), nn.ReLU(), nn.Linear(256, 512, bias=False)
    )
    dense = bytes_of(copy.deepcopy(model).bfloat16())
    quantize_model(model, SPECS[name])
    model(torch.randn(2, 512, requires_grad=True)).sum().backward()
    share = bytes_of(model) / dense
    assert share <= limit
    assert share > limit - 0.04  # negative control: the limit is not slack
    held = sum(packed_of_module(module).nbytes for _, module in packed_modules(model))
    assert held == bytes_of(model)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_casts_and_copies_leave_codes_and_scales_alone(cast):
    for name in SPECS:
        _, layer = made(name)
        before = packed_fingerprint([("w", layer.packed)])
        moved = copy.deepcopy(layer).to(cast)
        assert moved.bias.dtype is cast
        assert packed_fingerprint([("w", moved.packed)]) == before
        fresh = made(name)[1]
        fresh.load_state_dict(layer.state_dict())
        assert packed_fingerprint([("w", fresh.packed)]) == before
        assert moved.weight_scale.dtype is torch.float32


def test_the_bias_is_never_changed():
    _, layer = made(compute_dtype=torch.bfloat16)
    before = layer.bias.detach().clone()
    layer(torch.randn(2, 128))
    assert layer.bias.dtype is torch.float32
    assert torch.equal(layer.bias, before)
    assert not torch.equal(before, before.bfloat16().float())  # it would show


def test_compute_dtype_and_autocast():
    _, layer = made()
    x = torch.randn(4, 128)
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), exact)
    set_compute_dtype(layer, torch.bfloat16)
    rough = layer(x)
    assert rough.dtype is torch.float32
    assert 1e-4 < (rough - exact).norm() / exact.norm() < 2e-2
    assert layer(x.bfloat16()).dtype is torch.bfloat16


def test_activations_are_rounded_as_bitnet_rounds_them():
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    x = torch.randn(3, 7, 64) * 3
    x[0, 0] = 0
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(quantize_activations(x), bitnet.ActQuant.apply(x))
    y = x.clone().requires_grad_()
    quantize_activations(y).sum().backward()
    assert torch.equal(y.grad, torch.ones_like(y))
    assert not torch.equal(quantize_activations(x), x)


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        vocab_size=64,
    )
    return transformers.LlamaForCausalLM(config).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 9)[None]).logits


@pytest.mark.parametrize("name", SPECS)
def test_a_quantized_model_is_the_model_with_dequantized_weights(name):
    model = llama()
    reference, original = copy.deepcopy(model), logits(model)
    names = quantize_model(model, SPECS[name])
    assert names == eligible_modules(reference)
    assert names == [name for name, _ in packed_modules(model)]
    for module in names:
        linear = reference.get_submodule(module)
        linear.weight.data = dequantize_tensor(quantize_tensor(linear.weight, SPECS[name]))
    assert torch.equal(logits(model), logits(reference))
    floor = 1e-3 if name == "int8" else 1e-2
    assert (logits(model) - original).norm() / original.norm() > floor  # negative control


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("name", ["ternary", "int8"])
def test_peft_trains_on_packed_layers_as_on_dense_ones(name, options):
    """The same adapter values after the same steps, within float noise."""
    peft = pytest.importorskip("peft")
    model = llama()
    dense = copy.deepcopy(model)
    for module in quantize_model(model, SPECS[name]):
        linear = dense.get_submodule(module)
        linear.weight.data = dequantize_tensor(quantize_tensor(linear.weight, SPECS[name]))
    results = []
    for base in (model, dense):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], **options)
        adapted = peft.get_peft_model(base, config).train()
        trained = [p for p in adapted.parameters() if p.requires_grad]
        assert all(p.is_floating_point() for p in trained)
        optimizer = torch.optim.SGD(trained, lr=0.5)
        ids = torch.arange(1, 17)[None]
        for _ in range(3):
            optimizer.zero_grad()
            adapted(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        results.append(torch.cat([p.detach().reshape(-1) for p in trained]))
    start = (results[0] - results[1]).abs().max()
    assert start < 1e-6
    assert results[0].abs().max() > 1e-3


def test_peft_cannot_merge_into_packed_layers():
    """It fails loudly; `qlx merge` is the way."""
    peft = pytest.importorskip("peft")
    model = llama()
    quantize_model(model, SPECS["ternary"])
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(RuntimeError):
        adapted.merge_and_unload()
