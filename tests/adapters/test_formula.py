"""The update formulas against float64, with controls that a wrong formula fails."""

from dataclasses import replace
from math import sqrt

import pytest
import torch

from qlx.adapters import (
    LoraDelta,
    delta_bias,
    delta_rows,
    delta_shape,
    delta_weight,
    merged_weight,
    scaling_of,
)
from qlx.errors import InputRefused, Mismatch

SHAPES = {
    "square": (64, 64, 8),
    "wide": (48, 160, 4),
    "tall": (160, 48, 16),
    "rank one": (32, 32, 1),
}


def trained(out, inp, rank, seed=0, *, dora=False, dtype=torch.float32, scaling=2.5):
    """Factors of the size that training leaves, and a scaling that is not 1."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, inp, generator=g) / sqrt(inp)
    b = torch.randn(out, rank, generator=g) * 0.05
    magnitude = (torch.rand(out, generator=g) + 0.5) if dora else None
    return LoraDelta("m", a.to(dtype), b.to(dtype), scaling, magnitude)


def base(shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def oracle(weight, delta):
    """The same in float64, written another way: explicit sums, norms by the definition."""
    a, b, w = delta.a.double(), delta.b.double(), weight.double()
    update = torch.einsum("or,ri->oi", b, a)
    w = w + delta.scaling * update
    if delta.magnitude is None:
        return w
    return torch.stack(
        [
            row * (m / (row * row).sum().sqrt())
            for row, m in zip(w, delta.magnitude.double(), strict=True)
        ]
    )


def half_ulp(values, dtype):
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(values.abs().double().clamp(min=info.tiny)))
    return 0.5 * torch.exp2(exponent) * info.eps


def worst(got, right, dtype, rank):
    """Error in units of what is allowed: half an ulp of the target dtype + float32 accumulation."""
    terms = right.abs() + right.abs().mean()
    allowed = half_ulp(right, dtype) + terms * (rank + 8) * 2**-23
    return ((got.to(dtype).double() - right).abs() / allowed).max().item()


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_merged_weight_is_the_float64_result_rounded_once(shape, dtype, dora):
    out, inp, rank = SHAPES[shape]
    for seed in range(4):
        delta = trained(out, inp, rank, seed, dora=dora, dtype=dtype)
        weight = base((out, inp), seed + 10)
        got, right = merged_weight(weight, delta), oracle(weight, delta)
        assert got.dtype is torch.float32
        assert worst(got, right, dtype, rank) <= 1


WRONG = {
    "sign flipped": lambda d: replace(d, b=-d.b),
    "scaling doubled": lambda d: replace(d, scaling=2 * d.scaling),
    "scaling forgotten": lambda d: replace(d, scaling=1.0),
    "alpha/r for alpha/sqrt(r)": lambda d: replace(d, scaling=d.scaling / sqrt(d.rank)),
    "A transposed": lambda d: replace(d, a=d.b.T.contiguous(), b=d.a.T.contiguous()),
    "ranks reversed": lambda d: replace(d, a=d.a.flip(0)),
    "one rank dropped": lambda d: replace(d, a=d.a[1:], b=d.b[:, 1:]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_delta_fails_the_check(wrong, dtype):
    """Negative controls for the check above."""
    delta, weight = trained(64, 64, 8), base((64, 64))
    right = oracle(weight, delta)
    assert worst(merged_weight(weight, delta), right, dtype, 8) <= 1
    assert worst(merged_weight(weight, WRONG[wrong](delta)), right, dtype, 8) > 10


def test_a_wrong_dora_axis_fails_the_check():
    delta, weight = trained(64, 64, 8, dora=True), base((64, 64))
    right = oracle(weight, delta)
    columns = merged_weight(weight, replace(delta, fan_in_fan_out=True))
    assert worst(columns, right, torch.bfloat16, 8) > 10
    assert (
        worst(merged_weight(weight, replace(delta, magnitude=None)), right, torch.bfloat16, 8) > 10
    )


def test_scaling():
    assert scaling_of(16, 4, use_rslora=False) == 4
    assert scaling_of(16, 4, use_rslora=True) == 8


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_fan_in_fan_out_is_the_transpose(dora):
    delta, weight = trained(48, 96, 4, dora=dora), base((48, 96))
    stored = merged_weight(weight.T.contiguous(), replace(delta, fan_in_fan_out=True))
    assert delta_shape(replace(delta, fan_in_fan_out=True)) == (96, 48)
    assert torch.allclose(stored.T, merged_weight(weight, delta), atol=1e-7)


def test_delta_does_not_depend_on_the_factors_dtype_beyond_their_values():
    """Half-precision factors are widened before they are multiplied."""
    delta = trained(64, 64, 8, dtype=torch.bfloat16)
    wide = replace(delta, a=delta.a.float(), b=delta.b.float())
    assert torch.equal(delta_weight(delta), delta_weight(wide))
    narrow = (delta.b @ delta.a).float() * delta.scaling
    assert not torch.equal(delta_weight(delta), narrow)


def test_bias_is_scaled():
    delta = replace(trained(8, 8, 2), bias=torch.ones(8))
    assert torch.equal(delta_bias(delta), torch.full((8,), 2.5))
    assert delta_bias(trained(8, 8, 2)) is None


def test_refusals():
    delta = trained(48, 96, 4)
    with pytest.raises(Mismatch, match=r"'m'.*\[96, 48\].*\[48, 96\]"):
        merged_weight(base((96, 48)), delta)
    dora = trained(8, 8, 2, dora=True)
    with pytest.raises(InputRefused, match="all zero"):
        merged_weight(torch.zeros(8, 8), replace(dora, b=torch.zeros_like(dora.b)))


@pytest.mark.parametrize("kind", ["linear", "transposed", "dora", "embedding", "conv2d"])
def test_some_rows_of_an_update_are_those_of_the_whole(kind):
    delta = trained(24, 40, 4, dora=kind == "dora")
    if kind == "conv2d":
        delta = replace(
            delta, a=delta.a.reshape(4, 10, 2, 2), b=delta.b[:, :, None, None], kind=kind
        )
    elif kind == "embedding":
        delta = replace(delta, kind=kind)
    elif kind == "transposed":
        delta = replace(delta, fan_in_fan_out=True)
    weight = base(delta_shape(delta))
    whole, rows = merged_weight(weight, delta), slice(5, 17)
    part = delta_rows(delta, rows)
    assert torch.allclose(merged_weight(weight[rows], part), whole[rows], rtol=1e-6, atol=1e-7)
    assert not torch.allclose(
        merged_weight(weight[rows], delta_rows(delta, slice(6, 18))), whole[rows]
    )


def test_rows_that_depend_on_each_other_are_not_taken_apart():
    delta = trained(24, 40, 4, dora=True)
    assert delta_rows(replace(delta, fan_in_fan_out=True), slice(0, 4)) is None
    assert delta_rows(replace(delta, kind="embedding"), slice(0, 4)) is None
