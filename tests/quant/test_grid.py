"""Weights as places among codes: where they lie, how they move, and what the gradient says of it."""

import pytest
import torch

from qlx.checkpoint import QuantSpec
from qlx.errors import Unsupported
from qlx.quant import EXACT_SCHEMES, Grid, Move, linear_learned, packed_from_codes, quantize_tensor

SPECS = {
    "nf4": QuantSpec(scheme="nf4", group_size=64),
    "nf4 double": QuantSpec(scheme="nf4", group_size=64, double_quant=True),
    "int8": QuantSpec(scheme="int8"),
    "int4": QuantSpec(scheme="int4", group_size=32),
    "int4 zeros": QuantSpec(scheme="int4", group_size=32, symmetric=False),
    "int2": QuantSpec(scheme="int2", group_size=64, symmetric=False),
    "ternary": QuantSpec(scheme="ternary", group_size=64),
    "ternary whole": QuantSpec(scheme="ternary"),
}


def made(name, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(48, 128, generator=generator) * 0.05
    weight[3] = 0
    return weight, Grid.of(quantize_tensor(weight, SPECS[name]), weight)


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SPECS)
def test_without_a_correction_the_codes_stay(name):
    weight, grid = made(name)
    nothing = torch.zeros(weight.shape)
    assert torch.equal(grid.moved(Move(nothing)).codes, grid.packed.codes)
    assert torch.equal(grid.values(Move(nothing)), grid.packed.values())
    assert torch.equal(grid.nearest(grid.packed.values()).codes, grid.packed.codes)
    inside = grid.fractions.float() / 256
    assert inside.abs().max() < 0.5
    assert inside.std() > 0.1  # not all at their codes


@pytest.mark.parametrize("name", SPECS)
def test_the_values_of_training_are_those_of_the_packed_weight(name):
    weight, grid = made(name)
    correction = draw(1, *weight.shape)
    scales = None if grid.scale_shape is None else 0.1 * draw(2, *grid.scale_shape)
    moved = grid.moved(Move(correction, scales))
    assert torch.equal(grid.values(Move(correction, scales)), moved.values())
    leaf = correction.clone().requires_grad_()
    assert torch.equal(grid.values(Move(leaf, scales)).detach(), moved.values())  # on the tape, too
    low, high = grid.limits
    codes = Grid(moved, None).codes()
    assert low <= codes.min() and codes.max() <= high
    assert not torch.equal(moved.codes, grid.packed.codes)
    assert not torch.equal(
        grid.moved(Move(correction + 1, scales)).codes, moved.codes
    )  # negative control


@pytest.mark.parametrize("name", SPECS)
def test_a_fraction_says_how_far_the_next_code_is(name):
    """A correction that is a little too short to reach it changes nothing, a little more changes the code by one."""
    _, grid = made(name)
    inside = (grid.codes() > grid.limits[0]) & (grid.codes() < grid.limits[1])
    way = 0.5 - grid.fractions.float() / 256
    for share, wanted in ((way - 0.01, 0), (way + 0.01, 1)):
        moved = Grid(grid.moved(Move(share)), None).codes() - grid.codes()
        assert torch.equal(moved[inside], torch.full_like(moved[inside], wanted))


@pytest.mark.parametrize("name", ["int4", "int4 zeros", "int2", "ternary"])
def test_the_gradient_is_that_of_the_formula(name):
    """dW/dC = scale where the code is inside the grid, 0 where it is pushed out; dW/dl = W."""
    weight, grid = made(name)
    correction = (2 * draw(3, *weight.shape)).requires_grad_()
    logs = (0.1 * draw(4, *grid.scale_shape)).requires_grad_()
    direction = draw(5, *weight.shape)
    values = grid.values(Move(correction, logs))
    found = torch.autograd.grad((values * direction).sum(), [correction, logs])
    place = (grid.places() + correction).detach()
    low, high = grid.limits
    inside = (place >= low - 0.5) & (place <= high + 0.5)
    assert 0 < inside.float().mean() < 1
    scales = (grid.packed.scales * logs.exp()).detach().repeat_interleave(128 // logs.shape[1], 1)
    torch.testing.assert_close(found[0], direction * scales * inside)
    groups = (values.detach() * direction).reshape(48, logs.shape[1], -1).sum(-1)
    torch.testing.assert_close(found[1], groups)


def test_the_gradient_of_nf4_follows_the_distance_of_its_levels():
    _, grid = made("nf4")
    correction = torch.zeros(48, 128, requires_grad=True)
    (found,) = torch.autograd.grad(grid.values(Move(correction)).sum(), [correction])
    up, down = (grid.moved(Move(torch.full((48, 128), step))).values() for step in (1.0, -1.0))
    inside = (grid.codes() > 0) & (grid.codes() < 15)
    wanted = (up - down) / 2
    torch.testing.assert_close(found[inside], wanted[inside])


@pytest.mark.parametrize("name", ["int4 zeros", "int2"])
def test_whole_zero_points_move_inside_the_grid(name):
    """Values are those of the packed weight; dW/dz = -scale where the zero point is inside the grid, else 0."""
    _, grid = made(name)
    correction, logs = draw(1, 48, 128), 0.1 * draw(2, *grid.scale_shape)
    zeros = (3 * draw(3, *grid.scale_shape)).requires_grad_()
    values = grid.values(Move(correction, logs, zeros))
    moved = grid.moved(Move(correction, logs, zeros.detach()))
    assert torch.equal(values.detach(), moved.values())
    assert moved.zeros.dtype == torch.int8
    low, high = grid.limits
    assert low <= moved.zeros.min() and moved.zeros.max() <= high
    assert not torch.equal(moved.zeros, grid.packed.zeros)
    direction = draw(4, 48, 128)
    (found,) = torch.autograd.grad((values * direction).sum(), [zeros])
    place = grid.packed.zeros + zeros.detach()
    inside = (place >= low - 0.5) & (place <= high + 0.5)
    assert 0 < inside.float().mean() < 1
    summed = direction.reshape(48, logs.shape[1], -1).sum(-1)
    torch.testing.assert_close(found, -moved.scales * summed * inside)


@pytest.mark.parametrize("name", ["int4 zeros", "int2"])
def test_what_all_values_of_a_group_gain_goes_into_its_zero_point(name):
    _, grid = made(name)
    folded, logs = 0.02 * draw(1, *grid.scale_shape), 0.1 * draw(2, *grid.scale_shape)
    moved = grid.moved(Move(log_scales=logs, folded=folded))
    leaf = folded.clone().requires_grad_()
    values = grid.values(Move(log_scales=logs, folded=leaf))
    assert torch.equal(values.detach(), moved.values())
    assert torch.equal(moved.codes, grid.packed.codes)
    assert torch.equal(Grid(moved, None).nearest(moved.values()).codes[:3], moved.codes[:3])
    apart = grid.moved(Move(log_scales=logs)).values() + folded.repeat_interleave(
        128 // folded.shape[1], 1
    )
    living = moved.scales.repeat_interleave(128 // folded.shape[1], 1) > 0
    assert not bool(living[3].any())  # a row of zeros stays one, and its gradient finite
    torch.testing.assert_close(moved.values()[living], apart[living])
    wrong = grid.moved(Move(log_scales=logs, folded=-folded)).values()
    assert (wrong - apart)[living].abs().max() > 0.01  # negative control
    (found,) = torch.autograd.grad(values.sum(), [leaf])
    torch.testing.assert_close(found, (moved.scales > 0) * (128 / folded.shape[1]))


def test_where_only_the_codes_are_known_the_weights_lie_on_them():
    weight, grid = made("int4")
    bare = Grid.of(grid.packed, None)
    assert bare.fractions is None
    assert torch.equal(bare.places(), grid.codes())
    assert torch.equal(bare.moved(Move(torch.full_like(weight, 0.4))).codes, grid.packed.codes)


def test_columns_in_another_order_keep_their_scales():
    generator = torch.Generator().manual_seed(0)
    groups = torch.randperm(64, generator=generator).int() % 4
    packed = packed_from_codes(
        torch.randint(-8, 8, (8, 64), generator=generator),
        torch.rand(8, 4, generator=generator) + 0.1,
        groups=groups,
        scheme="int4",
        dtype=torch.float32,
        group_size=16,
    )
    found = Grid.of(packed, packed.values())
    assert not found.fractions.any()
    assert torch.equal(found.nearest(packed.values()).codes, packed.codes)


def test_what_has_no_grid_is_refused():
    packed = quantize_tensor(torch.randn(8, 64), QuantSpec(scheme="fp4", group_size=64))
    with pytest.raises(Unsupported, match=", ".join(EXACT_SCHEMES)):
        Grid.of(packed, None)


def test_a_learned_product_has_the_gradients_of_a_plain_one():
    x, a, b = draw(0, 5, 3, 16), draw(1, 4, 16), draw(2, 8, 4)
    pairs = []
    for product in (
        lambda x, a, b: linear_learned(x, lambda a, b: b @ a, a, b),
        lambda x, a, b: torch.nn.functional.linear(x, b @ a),
        lambda x, a, b: torch.nn.functional.linear(x, b @ a.detach()),  # negative control
    ):
        leaves = [part.clone().requires_grad_() for part in (x, a, b)]
        y = product(*leaves)
        gradients = torch.autograd.grad((y * draw(3, *y.shape)).sum(), leaves, allow_unused=True)
        pairs.append((y, *gradients))
    for found, wanted in zip(*pairs[:2], strict=True):
        torch.testing.assert_close(found, wanted)
    assert pairs[2][2] is None
