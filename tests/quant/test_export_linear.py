"""A packed linear in torch and in onnxruntime agree with the dequantized weight."""

import numpy as np
import pytest
import torch
from torch import nn

from qlx.checkpoint import QuantSpec
from qlx.errors import Unsupported
from qlx.quant import (
    PackedLinear,
    dequantize_tensor,
    packed_linears,
    quantize_model,
    quantize_tensor,
    set_compute_dtype,
)

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
    with pytest.raises(Unsupported, match="up to 256"):
        packed_linears(net)
