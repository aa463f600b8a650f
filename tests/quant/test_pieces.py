"""Rows quantized and decoded apart are those of the whole weight, bit for bit."""

import pytest
import torch

from qlx.checkpoint import QuantSpec
from qlx.quant import (
    packed_line,
    packed_rows,
    quantize_rows,
    quantize_tensor,
    row_unit,
    value_unit,
)

SPECS = {
    "nf4": QuantSpec(scheme="nf4", group_size=64, double_quant=True),
    "fp4": QuantSpec(scheme="fp4", group_size=128),
    "int8": QuantSpec(scheme="int8"),
    "int4": QuantSpec(scheme="int4", group_size=16, symmetric=False),
    "ternary": QuantSpec(scheme="ternary", group_size=16),
}
SHAPES = [(130, 192), (77, 48), (64, 64), (33, 256), (31, 80)]


@pytest.fixture(params=SHAPES, ids=str)
def weight(request):
    torch.manual_seed(sum(request.param))
    made = torch.randn(request.param)
    made[3] = 0  # a group without a scale
    return made


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("times", [1, 3, 1000])
def test_rows_apart_give_the_codes_scales_and_values_of_the_whole(weight, name, times):
    spec, shape = SPECS[name], tuple(weight.shape)
    rows = row_unit(shape, spec)
    packed = quantize_rows(lambda r: weight[r], shape, spec, rows * times)
    whole = quantize_tensor(weight, spec)
    assert packed_line("x", packed) == packed_line("x", whole)
    step = value_unit(packed) * times
    ranges = [slice(at, min(at + step, shape[0])) for at in range(0, shape[0], step)]
    values = torch.cat([packed_rows(packed, each).values() for each in ranges])
    assert torch.equal(values, whole.values())


def test_rows_that_share_a_scale_are_taken_together():
    spec = SPECS["nf4"]
    assert row_unit((10, 48), spec) == 4  # three groups of 64 are four rows of 48
    weight = torch.randn(12, 48)
    wrong = quantize_rows(lambda r: weight[r], (12, 48), spec, 3)
    assert packed_line("x", wrong) != packed_line("x", quantize_tensor(weight, spec))


def test_one_scale_a_tensor_needs_the_whole_tensor():
    assert row_unit((8, 8), QuantSpec(scheme="ternary")) is None
    assert row_unit((8, 8), SPECS["ternary"]) == 1


def test_one_scale_a_tensor_can_still_be_decoded_by_rows():
    weight = torch.randn(9, 20)
    packed = quantize_tensor(weight, QuantSpec(scheme="ternary"))
    values = torch.cat([packed_rows(packed, slice(at, at + 3)).values() for at in (0, 3, 6)])
    assert torch.equal(values, packed.values())
