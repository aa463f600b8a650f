"""A packed linear in torch and in onnxruntime agree with the dequantized weight."""

import numpy as np
import pytest
import torch
from torch import nn

from qlx.checkpoint import QuantSpec
from qlx.errors import Unsupported
from qlx.quant import (
    IntegerMatMul,
    PackedLinear,
    dequantize_tensor,
    packed_from_codes,
    packed_linears,
    quantize_model,
    quantize_tensor,
    set_compute_dtype,
)
from qlx.verification.graph import graph_weights

pytest.importorskip("bitsandbytes")


def model(scheme="nf4", nested=True, block=64):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 40, bias=False)).eval()
    spec = QuantSpec(scheme=scheme, group_size=block, double_quant=nested, method="post-training")
    quantize_model(net, spec)
    return net


def relative(a, b):
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_swapping_keeps_the_outputs(scheme):
    net = model(scheme)
    x = torch.randn(5, 128)
    with torch.no_grad():
        before = net(x)
        assert packed_linears(net) == ["0", "2"]
        assert isinstance(net[0], PackedLinear)
        assert (net(x) - before).norm() / before.norm() < 1e-6


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
def test_exports_to_one_packed_node_per_layer(scheme, nested, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net = model(scheme, nested)
    packed_linears(net)
    x = torch.randn(5, 128)
    with torch.no_grad():
        reference = net(x).numpy()
    program = torch.onnx.export(net, (x,), dynamo=True, verbose=False)
    program.model.opset_imports.setdefault("com.microsoft", 1)
    path = tmp_path / "model.onnx"
    program.save(path)
    nodes = [node for node in program.model.graph if node.op_type == "MatMulBnb4"]
    assert len(nodes) == 2
    assert {name for name in program.model.graph.initializers if "weight_codes" in name} == {
        "0.weight_codes",
        "2.weight_codes",
    }
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert relative(output, reference) < 1e-5
    flipped = x.clone()
    flipped[0, 0] += 1  # negative control: the tolerance sees one input changed
    (other,) = session.run(None, {session.get_inputs()[0].name: flipped.numpy()})
    assert relative(other, reference) > 1e-3


def test_compute_dtype_reaches_packed_linears():
    net = model()
    packed_linears(net)
    set_compute_dtype(net, torch.bfloat16)
    assert {m.compute_dtype for m in net if isinstance(m, PackedLinear)} == {torch.bfloat16}


def test_rows_of_broken_blocks_are_right():
    """Our own layer does not share bitsandbytes' fault."""
    weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(1))
    packed = quantize_tensor(weight, QuantSpec(scheme="nf4", group_size=64))
    x = torch.randn(2, 96)
    y = PackedLinear(packed, None)(x)
    assert torch.allclose(y, x @ dequantize_tensor(packed).T, atol=1e-5)


def test_blocks_beyond_the_kernel_are_refused():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(512, 64))
    quantize_model(net, QuantSpec(scheme="nf4", group_size=512))
    with pytest.raises(Unsupported, match=r"layer '0': .*up to 256"):
        packed_linears(net)


def integers(scheme="int4", group=64, columns=192, **fields):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(columns, 192), nn.ReLU(), nn.Linear(192, 40, bias=False)).eval()
    quantize_model(
        net, QuantSpec(method="qlora", scheme=scheme, group_size=group, backend="qlx", **fields)
    )
    return net


def run(net, x, path):
    """The outputs of a network under onnxruntime, and the operators of its graph."""
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    program = torch.onnx.export(net, (x,), dynamo=True, verbose=False)
    program.model.opset_imports.setdefault("com.microsoft", 1)
    program.save(path)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return output, [node.op_type for node in program.model.graph]


@pytest.mark.parametrize(
    "case",
    [
        {"scheme": "int8", "group": None},
        {"scheme": "int8", "group": 32, "symmetric": False},
        {"scheme": "int4", "group": 64},
        {"scheme": "int4", "group": 96},  # in runs of 32
        {"scheme": "int4", "group": 16, "symmetric": False},
        {"scheme": "int4", "group": None, "columns": 100},  # the last run is not full
        {"scheme": "int2", "group": 32, "symmetric": False},
        {"scheme": "ternary", "group": 64},
        {"scheme": "ternary", "group": None, "columns": 24},
        {"scheme": "ternary", "group": None, "activation_bits": 8},
    ],
    ids=lambda case: "-".join(map(str, case.values())),
)
def test_integers_export_to_one_node_per_layer(case, tmp_path):
    net = integers(**case)
    x = torch.randn(5, net[0].in_features)
    with torch.no_grad():
        reference = net(x).numpy()
        assert packed_linears(net) == ["0", "2"]
        assert np.array_equal(net(x).numpy(), reference)
        output, operators = run(net, x, tmp_path / "model.onnx")
        assert operators.count("MatMulNBits") == 2
        assert relative(output, reference) < 1e-6
        net[0].weight_codes[3, 0, 0] ^= 128  # negative control: one bit of one code
        assert relative(run(net, x, tmp_path / "model.onnx")[0], reference) > 1e-4


@pytest.mark.parametrize("scheme", ["int8", "int4", "ternary"])
def test_accuracy_level_4_rounds_the_inputs(scheme, tmp_path):
    net = integers(scheme)
    x = torch.randn(5, net[0].in_features)
    with torch.no_grad():
        reference = net(x).numpy()
        packed_linears(net, accuracy_level=4)
        output, _ = run(net, x, tmp_path / "model.onnx")
    assert 1e-4 < relative(output, reference) < 3e-2


@pytest.mark.parametrize("symmetric", [True, False])
def test_columns_in_another_order_are_put_in_order(symmetric, tmp_path):
    """GPTQ's desc_act: the inputs of a group do not lie together."""
    generator = torch.Generator().manual_seed(1)
    groups = torch.randperm(128, generator=generator) // 32
    packed = packed_from_codes(
        torch.randint(-8, 8, (40, 128), generator=generator),
        torch.rand(40, 4, generator=generator) + 0.5,
        zeros=None if symmetric else torch.randint(-8, 8, (40, 4), generator=generator).char(),
        groups=groups,
        scheme="int4",
        dtype=torch.float32,
        group_size=32,
    )
    net = nn.Sequential(IntegerMatMul(packed, None))
    x = torch.randn(3, 128, generator=generator)
    with torch.no_grad():
        output, _ = run(net, x, tmp_path / "model.onnx")
        assert relative(output, x @ packed.values().T) < 1e-6
        acting = graph_weights(tmp_path / "model.onnx")["0.weight"]()
        assert relative(acting, packed.values()) < 1e-6  # as verify reads it
        net[0].order = net[0].order.flip(0)  # negative control
        assert relative(run(net, x, tmp_path / "model.onnx")[0], x @ packed.values().T) > 0.1


@pytest.mark.parametrize("scheme", ["int4", "int2"])
def test_zero_points_that_are_no_whole_numbers(scheme, tmp_path):
    generator = torch.Generator().manual_seed(1)
    half = {"int4": 8, "int2": 2}[scheme]
    packed = packed_from_codes(
        torch.randint(-half, half, (40, 128), generator=generator),
        torch.rand(40, 4, generator=generator) + 0.5,
        zeros=half * (torch.rand(40, 4, generator=generator) - 0.5),
        scheme=scheme,
        dtype=torch.float32,
        group_size=32,
    )
    net = nn.Sequential(IntegerMatMul(packed, None))
    x = torch.randn(3, 128, generator=generator)
    with torch.no_grad():
        output, _ = run(net, x, tmp_path / "model.onnx")
        assert relative(output, x @ packed.values().T) < 1e-5
        net[0].weight_zeros = net[0].weight_zeros.round()  # negative control
        assert relative(run(net, x, tmp_path / "model.onnx")[0], x @ packed.values().T) > 0.05


def test_groups_that_the_kernel_does_not_take_are_refused():
    with pytest.raises(Unsupported, match=r"layer '0': groups of 24 inputs"):
        packed_linears(integers(group=24))
    uneven = packed_from_codes(
        torch.ones(2, 64),
        torch.ones(2, 2),
        groups=torch.tensor([0] * 16 + [1] * 48),
        scheme="int4",
        dtype=torch.float32,
        group_size=32,
    )
    with pytest.raises(Unsupported, match="equally long"):
        IntegerMatMul(uneven, None)
