"""NF4 and FP4 codes as 8-bit integers: which integers, how far off, and where it cannot be."""

import numpy as np
import pytest
import torch
from torch import nn

from qlx.checkpoint import QuantSpec
from qlx.errors import Unsupported
from qlx.quant import (
    IntegerMatMul,
    in_eight_bits,
    integer_levels,
    levels,
    packed_linears,
    quantize_model,
    quantize_tensor,
    rounding_of_levels,
)

pytest.importorskip("bitsandbytes")


def weight(rows=48, columns=192):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(2)) * 0.05


def packed(scheme="nf4", block=64, double=False, **sizes):
    spec = QuantSpec(scheme=scheme, group_size=block, double_quant=double, method="post-training")
    return quantize_tensor(weight(**sizes), spec)


def moved(four_bit, eight):
    values = four_bit.values()
    return float((eight.values() - values).norm() / values.norm())


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_the_integers_are_the_levels_and_no_other_steps_fit_them_better(scheme):
    integers, steps = integer_levels(scheme)
    exact = levels(scheme).double()
    assert integers.abs().max() <= 127
    assert torch.equal(integers == 0, exact.abs() * steps < 0.5)

    def error(count):
        return float(((exact * count).round() / count - exact).square().sum())

    assert error(steps) <= min(error(float(count)) for count in range(64, 128))
    assert (integers / steps - exact).abs().max() < 0.5 / steps + 1e-7
    assert error(steps) < 0.8 * error(127.0)  # what the search is worth


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize(("scheme", "block"), [("nf4", 64), ("nf4", 128), ("fp4", 64), ("nf4", 32)])
def test_weights_move_by_half_a_percent(scheme, block, double):
    """Each by at most 0.4 % of its block's largest, all together by a little more the longer blocks are."""
    four_bit = packed(scheme, block, double)
    eight = in_eight_bits(four_bit)
    assert eight.scheme == "int8"
    gap = (eight.values() - four_bit.values()).abs().reshape(-1, block)
    assert bool((gap <= 4e-3 * four_bit.absmax[:, None]).all())
    assert 0 < moved(four_bit, eight) < (5e-3 if block <= 64 else 6e-3)
    wrong = type(four_bit)(**{**vars(four_bit), "codes": four_bit.codes ^ 1})  # negative control
    assert moved(wrong, eight) > 5e-2


def test_blocks_that_run_over_the_end_of_a_row_are_cut_where_they_do():
    four_bit = packed(block=128)  # 192 inputs: a block begins in the middle of every other row
    eight = in_eight_bits(four_bit)
    assert eight.group_size == 64
    assert eight.scales.shape == (48, 3)
    assert moved(four_bit, eight) < 6e-3


def test_blocks_too_short_for_the_kernel_are_refused():
    with pytest.raises(Unsupported, match=r"runs of 8 .*--accuracy-level"):
        in_eight_bits(packed(columns=200))


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_layers_become_integer_products_and_the_distance_is_that_of_the_weights(scheme):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64, bias=False)).eval()
    quantize_model(net, QuantSpec(scheme=scheme, group_size=64, method="post-training"))
    x, plain = torch.randn(9, 128), rounding_of_levels(net)
    with torch.no_grad():
        before = net(x)
        packed_linears(net, accuracy_level=4)
        assert all(isinstance(net[at], IntegerMatMul) for at in (0, 2))
        assert net[0].accuracy_level == 4
        far = float((net(x) - before).norm() / before.norm())
    assert 1e-4 < plain < 5e-3
    assert 0.1 * plain < far < 3 * plain
    assert rounding_of_levels(nn.Sequential(nn.Linear(4, 4))) is None


def test_the_values_are_the_products_the_kernel_makes():
    four_bit = packed()
    table, steps = integer_levels("nf4")
    codes = four_bit.codes.numpy()
    indices = np.stack([codes >> 4, codes & 15], -1).reshape(-1)
    scales = (four_bit.absmax.double().numpy() / steps).astype(np.float32)
    expected = (table.numpy()[indices].reshape(-1, 64) * scales[:, None]).reshape(48, 192)
    assert np.array_equal(in_eight_bits(four_bit).values().numpy(), expected)
