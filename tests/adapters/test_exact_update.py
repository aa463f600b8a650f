"""What the factors of a folded exact adapter mean: scaling * B A, added to every weight of a group."""

import torch

from qlx.adapters.exact import ExactLinear, ExactUpdate
from qlx.checkpoint import QuantSpec
from qlx.quant import Grid, packed_layer, quantize_tensor

SCALING, GROUP = 1.5, 32
SPEC = QuantSpec(
    method="qlora",
    weight_bits=2,
    scheme="int2",
    symmetric=False,
    group_size=GROUP,
    backend="qlx",
)


def test_a_folded_adapter_adds_its_scaled_product_to_each_group():
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 128, generator=draw)
    packed = quantize_tensor(weight, SPEC)
    a, b = torch.randn(3, 128 // GROUP, generator=draw), torch.randn(16, 3, generator=draw)
    update = ExactUpdate(a, b, SCALING, folded=True)
    moved = update.applied(Grid.of(packed, None)).values() - packed.values()
    product = (b @ a).repeat_interleave(GROUP, 1)
    torch.testing.assert_close(moved, SCALING * product, rtol=1e-4, atol=1e-4)
    for wrong in (-SCALING, 1.0, 2 * SCALING):
        assert (moved - wrong * product).norm() > 0.1 * moved.norm()


def test_a_fold_begins_as_wide_as_an_adapter_that_moves_codes():
    """So the learning rates of LoRA apply: drawn by its few groups, A would be sqrt(group size) times as large."""
    draw = torch.Generator().manual_seed(0)
    packed = quantize_tensor(torch.randn(64, 4096, generator=draw), SPEC)
    layer = packed_layer(packed, None, None, None)
    widths = {}
    for folded in (True, False):
        torch.manual_seed(0)
        begun = ExactLinear(
            Grid.of(packed, None), layer, rank=64, scaling=1.0, learned_scales=True, folded=folded
        )
        assert begun.lora_A.shape == (64, 4096 // GROUP if folded else 4096)
        assert not begun.lora_B.any()
        widths[folded] = float(begun.lora_A.detach().std())
    assert 0.95 < widths[True] / widths[False] < 1.05
