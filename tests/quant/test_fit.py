"""Ternary scales fitted to their codes: exact on the grid, never worse off it."""

import pytest
import torch

from qlx.checkpoint import QuantSpec
from qlx.quant import fitted_ternary, materialize, quantize_tensor


def spec(group_size):
    return QuantSpec(scheme="ternary", group_size=group_size)


@pytest.mark.parametrize("group_size", [32, None])
def test_a_weight_on_the_grid_is_found_again_bit_for_bit(group_size):
    torch.manual_seed(0)
    codes = torch.randint(-1, 2, (16, 64)).float()
    shape = (16, 2) if group_size else (1, 1)
    weight = materialize(codes, torch.rand(shape) + 0.1)
    packed = quantize_tensor(weight, spec(group_size))
    assert not torch.allclose(packed.values(), weight, rtol=0.1)  # the mean is another scale
    assert torch.equal(fitted_ternary(packed, weight).values(), weight)


@pytest.mark.parametrize("group_size", [32, None])
def test_the_error_falls_and_any_other_scale_is_worse(group_size):
    torch.manual_seed(0)
    weight = torch.randn(16, 64)
    packed = quantize_tensor(weight, spec(group_size))
    fitted = fitted_ternary(packed, weight)
    assert torch.equal(fitted.codes, packed.codes)
    best = (fitted.values() - weight).norm()
    assert best < (packed.values() - weight).norm()
    for factor in (0.99, 1.01):
        assert best < (factor * fitted.values() - weight).norm()


def test_groups_of_zeros_keep_their_scale():
    packed = quantize_tensor(torch.zeros(4, 32), spec(32))
    assert torch.equal(fitted_ternary(packed, torch.zeros(4, 32)).scales, packed.scales)
