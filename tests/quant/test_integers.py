"""Integer codecs against values computed in float64, one weight at a time, and against BitNet's own."""

import pytest
import torch

from qlx.checkpoint import QuantSpec
from qlx.errors import InputRefused, Unsupported
from qlx.quant import (
    SCALE_DTYPE,
    dequantize_tensor,
    materialize,
    packed_fingerprint,
    packed_from_codes,
    quantize_tensor,
)
from qlx.quant.bits import pack_integers, row_bytes, unpack_integers

SCHEMES = {"ternary": 2, "int2": 2, "int4": 4, "int8": 8}


def spec(scheme, group_size=64, **changes):
    fields = {"scheme": scheme, "group_size": group_size, "weight_bits": SCHEMES[scheme]}
    fields |= {"symmetric": False} if scheme == "int2" else {}
    return QuantSpec(method="qlora", backend="qlx", **fields | changes)


def weight(rows=32, columns=128, seed=0, scale=0.02):
    """Rows of very different size, with a few outliers and exact zeros."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=g)
    w *= torch.exp(torch.randn(rows, 1, generator=g)) * scale
    w[torch.rand(w.shape, generator=g) < 0.02] *= 10
    w[torch.rand(w.shape, generator=g) < 0.02] = 0
    return w


def blocks(w, group_size, scheme):
    if group_size is None:
        return w.reshape(1, -1) if scheme == "ternary" else w
    return w.reshape(-1, group_size)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [1, 3, 8, 13, 64])
def test_bits_are_packed_lowest_first_and_reversibly(bits, columns):
    g = torch.Generator().manual_seed(columns)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (5, columns), generator=g, dtype=torch.int8)
    packed = pack_integers(codes, bits)
    assert packed.shape == (5, row_bytes(columns, bits))
    assert torch.equal(unpack_integers(packed, bits, columns), codes.float())
    assert int(packed[0, 0]) & ((1 << bits) - 1) == int(codes[0, 0]) + half
    if columns > 1:
        swapped = codes.flip(1)
        assert torch.equal(codes, swapped) or not torch.equal(pack_integers(swapped, bits), packed)


@pytest.mark.parametrize("group_size", [32, 128, None])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_integers_are_the_nearest_of_their_grid(scheme, symmetric, group_size):
    w = weight()
    packed = quantize_tensor(w, spec(scheme, group_size, symmetric=symmetric))
    cut = blocks(w.double(), group_size, scheme)
    top = 2 ** SCHEMES[scheme] - 1
    span = cut.amax(1).clamp(min=0) - cut.amin(1).clamp(max=0)
    step = cut.abs().amax(1) / {"int4": 7.5, "int8": 127}[scheme] if symmetric else span / top
    scales = packed.scales.double().reshape(-1)
    assert ((scales - step).abs() <= 1e-6 * step).all()
    error = (blocks(packed.values().double(), group_size, scheme) - cut).abs().amax(1)
    assert (error <= 0.5001 * step).all()
    assert (error > 0.2 * step).any()  # negative control: the bound is not slack
    assert packed.values().eq(0)[w == 0].all()


@pytest.mark.parametrize("group_size", [32, 128, None])
def test_int2_covers_as_much_of_a_range_as_leaves_the_least_error(group_size):
    w = weight()
    packed = quantize_tensor(w, spec("int2", group_size, symmetric=False))
    cut = blocks(w.double(), group_size, "int2")
    low, high = cut.amin(1, keepdim=True).clamp(max=0), cut.amax(1, keepdim=True).clamp(min=0)
    errors = []
    for share in [1, 1.5, *(1 - at / 32 for at in range(1, 24))]:
        step = (high - low) * share / 3
        zero = (-2 - low * share / step).round().clamp(-2, 1)
        values = ((cut / step + zero).round().clamp(-2, 1) - zero) * step
        errors.append((values - cut).square().sum(1))
    best = torch.stack(errors).amin(0)
    found = (blocks(packed.values().double(), group_size, "int2") - cut).square().sum(1)
    torch.testing.assert_close(found, best, rtol=1e-3, atol=0)
    assert found.sum() < 0.8 * errors[0].sum()  # negative control: the whole range
    assert packed.zeros.dtype == torch.int8
    assert packed.values().eq(0)[w == 0].all()


@pytest.mark.parametrize("group_size", [64, 128, None])
def test_ternary_is_round_of_weight_by_mean_magnitude(group_size):
    w = weight()
    packed = quantize_tensor(w, spec("ternary", group_size))
    cut = blocks(w.double(), group_size, "ternary")
    mean = cut.abs().mean(1, keepdim=True)
    codes = (cut / mean).round().clamp(-1, 1).reshape(w.shape)
    differs = packed.integers() != codes
    assert differs.sum() <= 1  # a value that float32 puts on the other side of a half
    assert set(packed.integers().unique().tolist()) == {-1.0, 0.0, 1.0}
    assert packed.scales.shape == ((1, 1) if group_size is None else (32, 128 // group_size))
    assert torch.allclose(packed.scales.double().reshape(-1, 1), mean, rtol=1e-6)
    maximum = cut.abs().amax(1, keepdim=True)  # negative control: absmax instead of the mean
    assert ((cut / maximum).round().reshape(w.shape) != packed.integers()).any()


@pytest.mark.parametrize("seed", range(4))
def test_ternary_of_a_whole_tensor_equals_bitnet_online(seed):
    """What transformers computes with while it trains a BitNet model.

    Equal codes, and a scale equal but for the last bit of a float32 mean, which depends on threads.
    """
    bitnet = pytest.importorskip("transformers.integrations.bitnet")
    w = weight(64, 96, seed)
    packed = quantize_tensor(w, spec("ternary", None))
    with torch.compiler.set_stance("force_eager"):
        theirs = bitnet.WeightQuant.apply(w)
    assert torch.equal(packed.integers(), theirs.sign())
    assert (packed.scales - theirs.abs().max()).abs() <= 1.2e-7 * packed.scales
    other = quantize_tensor(w, spec("ternary", 96))
    assert not torch.equal(other.integers(), theirs.sign())
    assert ((other.scales - theirs.abs().max()).abs() > 1e-3 * packed.scales).all()


def test_ternary_scales_do_not_depend_on_threads():
    """The float32 mean of this tensor does: its last bit differs between one thread and three."""
    w = torch.rand(1024, 1024, generator=torch.Generator().manual_seed(1)) * 0.1 + 0.05
    before, means, scales = torch.get_num_threads(), set(), set()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            means.add(w.abs().mean().item())
            scales.add(quantize_tensor(w, spec("ternary", None)).scales.item())
    finally:
        torch.set_num_threads(before)
    assert len(scales) == 1
    assert len(means) == 2


def test_int8_rows_equal_the_codes_of_llm_int8():
    """Up to a tie: bitsandbytes multiplies by 127 / absmax, one rounding more or less."""
    functional = pytest.importorskip("bitsandbytes.functional")
    w = weight(64, 256, 3)
    packed = quantize_tensor(w, spec("int8", None))
    codes, absmax, _ = functional.int8_vectorwise_quant(w.half())
    again = quantize_tensor(w.half(), spec("int8", None))
    assert torch.equal(again.scales[:, 0], absmax / 127)
    assert (again.integers() != codes).float().mean() < 1e-3
    assert (packed.integers() - codes).abs().max() <= 1


def test_materialize_is_scale_times_code_less_zero():
    codes = torch.tensor([[0, 1, 2, 3], [-4, -3, 2, 1]])
    scales, zeros = torch.tensor([[0.5, 2.0], [1.0, 0.25]]), torch.tensor([[1, 0], [0, -2]])
    expected = torch.tensor([[-0.5, 0.0, 4.0, 6.0], [-4.0, -3.0, 1.0, 0.75]])
    assert torch.equal(materialize(codes, scales, zeros), expected)
    groups = torch.tensor([0, 0, 1, 1])
    assert torch.equal(materialize(codes, scales, zeros, groups), expected)
    assert not torch.equal(materialize(codes, scales, zeros, groups.flip(0)), expected)
    assert torch.equal(materialize(codes, torch.ones(1, 1)), codes.float())


def test_materialize_passes_gradients_to_scales_and_zeros():
    codes = torch.randint(-8, 8, (3, 8)).double()
    scales = torch.rand(3, 2, requires_grad=True)
    zeros = torch.rand(3, 2, requires_grad=True)
    seen = torch.randn(3, 8)
    (materialize(codes, scales, zeros) * seen).sum().backward()
    cut = seen.view(3, 2, 4)
    assert torch.allclose(zeros.grad, -(cut * scales.detach()[..., None]).sum(-1), atol=1e-6)
    distance = codes.view(3, 2, 4).float() - zeros.detach()[..., None]
    assert torch.allclose(scales.grad, (cut * distance).sum(-1), atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantizing_again_what_was_quantized_changes_nothing_but_for_ternary_scales(scheme):
    """int8 and int2 are idempotent; a ternary group's mean shrinks, the reason merges keep scales."""
    once = quantize_tensor(weight(), spec(scheme))
    twice = quantize_tensor(once.values(), spec(scheme))
    same = torch.equal(once.integers(), twice.integers())
    if scheme == "int4":  # absmax / 7.5 is no value of the grid: the grid itself shrinks
        assert (once.values() - twice.values()).abs().max() <= once.scales.max() / 2
    elif scheme in ("int8", "int2"):
        assert same or scheme == "int2"  # a group may be told by other codes and zero point
        assert torch.allclose(once.values(), twice.values(), rtol=1e-6)
    else:
        assert (twice.scales < once.scales).any()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_scales_can_be_rounded_before_codes_are_chosen(scheme, name):
    """So that a layout whose scales have 16 bits holds exactly what training saw."""
    w = weight()
    narrow = quantize_tensor(w, spec(scheme, extras={SCALE_DTYPE: name}))
    wide = quantize_tensor(w, spec(scheme))
    assert str(narrow.scales.dtype) == f"torch.{name}"
    equal = narrow.scales == wide.scales.to(narrow.scales.dtype)
    assert equal.float().mean() > 0.9 if scheme == "int2" else equal.all()  # which chooses by them
    step = narrow.scales.float().repeat_interleave(64, 1)
    if scheme == "int8":
        assert ((narrow.values() - w).abs() <= 0.51 * step + 0.01 * w.abs()).all()
    assert not torch.equal(narrow.values(), wide.values())


def test_zeros_and_empty_groups_stay_zero():
    for scheme in SCHEMES:
        for symmetric in (True, False):
            if symmetric is {"ternary": False, "int2": True}.get(scheme):
                continue
            w = weight(4, 128)
            w[1] = 0
            packed = quantize_tensor(w, spec(scheme, symmetric=symmetric))
            assert packed.values()[1].eq(0).all()
            assert packed.values()[0].ne(0).any()


def test_fingerprint_sees_codes_scales_zeros_and_form_only():
    w = weight()
    packed = quantize_tensor(w, spec("int4", symmetric=False))
    reference = packed_fingerprint([("a", packed)])
    half = quantize_tensor(w.bfloat16().float(), spec("int4", symmetric=False))
    narrow = quantize_tensor(w.bfloat16(), spec("int4", symmetric=False))
    assert packed_fingerprint([("a", half)]) == packed_fingerprint([("a", narrow)])
    zeros = packed.zeros.clone()
    zeros[0, 0] ^= 1
    integers = packed.integers()
    changed = packed_from_codes(
        integers, packed.scales, scheme="int4", dtype=w.dtype, zeros=zeros, group_size=64
    )
    same = packed_from_codes(
        integers, packed.scales, scheme="int4", dtype=w.dtype, zeros=packed.zeros, group_size=64
    )
    assert packed_fingerprint([("a", same)]) == reference
    others = [
        packed_fingerprint([("a", changed)]),
        packed_fingerprint([("b", packed)]),
        packed_fingerprint([("a", half)]),
        packed_fingerprint([("a", quantize_tensor(w, spec("int4")))]),
    ]
    assert len({reference, *others}) == 5


def test_dequantize_rounds_once_to_the_dtype_before():
    w = weight().bfloat16()
    packed = quantize_tensor(w, spec("ternary"))
    assert dequantize_tensor(packed).dtype is torch.bfloat16
    exact = dequantize_tensor(packed, torch.float32)
    assert torch.equal(exact.bfloat16(), dequantize_tensor(packed))
    assert not torch.equal(exact, dequantize_tensor(packed).float())


def test_refusals():
    with pytest.raises(Unsupported, match="130 inputs are no multiple of the group size 64"):
        quantize_tensor(torch.ones(2, 130), spec("int4"))
    with pytest.raises(Unsupported, match="no zero point"):
        quantize_tensor(torch.ones(2, 64), spec("ternary", symmetric=False))
    with pytest.raises(Unsupported, match="int2 weights have zero points"):
        quantize_tensor(torch.ones(2, 64), spec("int2", symmetric=True))
    with pytest.raises(Unsupported, match="a matrix"):
        quantize_tensor(torch.ones(64), spec("int8", None))
    with pytest.raises(InputRefused, match="NaN"):
        quantize_tensor(torch.full((2, 64), float("nan")), spec("int4"))
    with pytest.raises(Unsupported, match="int64"):
        quantize_tensor(torch.ones(2, 64, dtype=torch.int64), spec("int4"))
    with pytest.raises(InputRefused, match="too large for float16"):
        quantize_tensor(torch.full((2, 64), 1e30), spec("int8", extras={SCALE_DTYPE: "float16"}))
    one = torch.ones(1, 1)
    with pytest.raises(InputRefused, match=r"outside -1…1"):
        packed_from_codes(torch.tensor([[2]]), one, scheme="ternary", dtype=torch.float32)
    with pytest.raises(InputRefused, match="NaN"):
        packed_from_codes(torch.tensor([[1]]), one / 0, scheme="ternary", dtype=torch.float32)
    with pytest.raises(InputRefused, match="do not fit"):
        packed_from_codes(torch.ones(2, 4), torch.ones(2, 3), scheme="ternary", dtype=torch.float32)
