"""What the factors of a folded exact adapter mean: scaling * B A, added to every weight of a group."""

import torch

from qlx.adapters.exact import ExactUpdate
from qlx.checkpoint import QuantSpec
from qlx.quant import Grid, quantize_tensor

SCALING, GROUP = 1.5, 32


def test_a_folded_adapter_adds_its_scaled_product_to_each_group():
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 128, generator=draw)
    spec = QuantSpec(
        method="qlora",
        weight_bits=2,
        scheme="int2",
        symmetric=False,
        group_size=GROUP,
        backend="qlx",
    )
    packed = quantize_tensor(weight, spec)
    a, b = torch.randn(3, 128 // GROUP, generator=draw), torch.randn(16, 3, generator=draw)
    update = ExactUpdate(a, b, SCALING, folded=True)
    moved = update.applied(Grid.of(packed, None)).values() - packed.values()
    product = (b @ a).repeat_interleave(GROUP, 1)
    torch.testing.assert_close(moved, SCALING * product, rtol=1e-4, atol=1e-4)
    for wrong in (-SCALING, 1.0, 2 * SCALING):
        assert (moved - wrong * product).norm() > 0.1 * moved.norm()
