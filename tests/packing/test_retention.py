"""Weight-space retention: a step smaller than the grid is lost, a large one kept."""

import pytest
import torch

from qlx.checkpoint import QuantSpec
from qlx.packing.retention import layer_retention, overall
from qlx.quant import dequantize_tensor, quantize_tensor

SPEC = QuantSpec(scheme="nf4", group_size=64)


@pytest.fixture
def base():
    torch.manual_seed(0)
    return dequantize_tensor(quantize_tensor(torch.randn(64, 128), SPEC))


def packed(weight):
    return dequantize_tensor(quantize_tensor(weight, SPEC))


def low_rank(size):
    delta = torch.randn(64, 4) @ torch.randn(4, 128)
    return size * delta / delta.norm()


@pytest.mark.parametrize(("size", "low", "high"), [(0.02, -0.2, 0.2), (60.0, 0.97, 1.03)])
def test_small_deltas_are_lost_and_large_ones_kept(base, size, low, high):
    merged = base + low_rank(size)
    layer = layer_retention("w", base, merged, packed(merged))
    assert low < layer.retention < high
    assert (layer.step_share > 1) == (size > 1)


def test_exact_packing_keeps_all_and_the_base_keeps_nothing(base):
    merged = base + low_rank(1.0)
    assert layer_retention("w", base, merged, merged).retention == pytest.approx(1)
    assert layer_retention("w", base, merged, base).retention == pytest.approx(0)
    assert layer_retention("w", base, merged, 2 * base - merged).retention == pytest.approx(-1)


def test_no_adapter_has_no_retention(base):
    assert layer_retention("w", base, base, packed(base)).retention is None
    assert overall([layer_retention("w", base, base, packed(base))]) is None


def test_overall_is_weighted_by_energy(base):
    large, small = base + low_rank(10.0), base + low_rank(1.0)
    kept, lost = layer_retention("a", base, large, large), layer_retention("b", base, small, base)
    assert overall([kept, lost]) == pytest.approx(100 / 101, rel=1e-3)
