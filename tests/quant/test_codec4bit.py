"""Our codec against bitsandbytes: codes, scales and values equal bit for bit."""

import pytest
import torch

from qlx.checkpoint import QuantSpec
from qlx.errors import InputRefused, Unsupported
from qlx.quant import dequantize_tensor, levels, quantize_tensor
from qlx.quant.codec4bit import dynamic_map, nest_scales, pack_codes, unnest_scales, unpack_codes

F = pytest.importorskip("bitsandbytes.functional")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def spec(scheme="nf4", nested=False, block=64):
    return QuantSpec(
        method="post-training", scheme=scheme, double_quant=nested, group_size=block, weight_bits=4
    )


def stock(weight, scheme, nested, block=64):
    return F.quantize_4bit(weight, blocksize=block, quant_type=scheme, compress_statistics=nested)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(a, b):
    return a.dtype == b.dtype and a.numel() == b.numel() and torch.equal(bits(a), bits(b))


def equally_decoded(ours, stock):
    """To the bit; where there is a GPU, bitsandbytes decodes on the CPU by other code, to the last bits."""
    if not torch.cuda.is_available():
        return same(ours, stock)
    kind = torch.finfo(ours.dtype)
    near, smallest = 4 * kind.eps, 4 * kind.eps * kind.smallest_normal
    return ours.dtype == stock.dtype and torch.allclose(
        ours.double(), stock.double(), near, smallest
    )


def flushed(values):
    return torch.where(values.abs() < torch.finfo(torch.float32).tiny, 0 * values, values)


def uneven(shape, seed):
    """Rows of very different size, a few outliers, some exact zeros."""
    g = torch.Generator().manual_seed(seed)
    w = (
        torch.randn(shape, generator=g)
        * torch.exp(2 * torch.randn(shape[0], 1, generator=g))
        * 0.02
    )
    w[torch.rand(shape, generator=g) < 0.01] *= 20
    w[torch.rand(shape, generator=g) < 0.02] = 0
    return w


def trained():
    """The first layer of a small network after 60 steps of Adam."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(128, 192), torch.nn.Tanh(), torch.nn.Linear(192, 8))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    x = torch.randn(256, 128)
    y = (x[:, :8] * x[:, 8:16]).sin()
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
    return net[0].weight.detach()


def ties(scheme, shape):
    """Values exactly halfway between two levels, where rounding could go either way."""
    ordered = levels(scheme).sort().values
    values = torch.cat([ordered, (ordered[:-1] + ordered[1:]) / 2, torch.tensor([1.0])])
    return values.repeat(-(-shape[0] * shape[1] // len(values)))[: shape[0] * shape[1]].view(shape)


CASES = {
    "random": lambda scheme: (
        torch.randn(96, 192, generator=torch.Generator().manual_seed(1)) * 0.02
    ),
    "trained": lambda scheme: trained(),
    "uneven rows": lambda scheme: uneven((80, 256), 2),
    "zeros": lambda scheme: torch.zeros(32, 64),
    "one zero block": lambda scheme: torch.cat([torch.zeros(1, 64), uneven((40, 64), 3)]),
    "tiny": lambda scheme: uneven((32, 128), 4) * 1e-30,
    "subnormal": lambda scheme: uneven((32, 128), 5) * 1e-38,
    "huge": lambda scheme: uneven((32, 128), 6) * 1e30,
    "ties": lambda scheme: ties(scheme, (64, 64)),
    "constant": lambda scheme: torch.full((64, 64), 0.25),
    "many scales": lambda scheme: uneven((700, 128), 7),
}


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
@pytest.mark.parametrize("case", CASES)
def test_codec_equals_bitsandbytes(case, scheme, nested):
    weight = CASES[case](scheme)
    for dtype in DTYPES:
        w = weight.to(dtype)
        if not torch.isfinite(w).all():
            continue
        codes, state = stock(w, scheme, nested)
        packed = quantize_tensor(w, spec(scheme, nested))
        assert same(packed.codes, codes), dtype
        if nested:
            assert same(packed.nested.codes, state.absmax)
            assert same(packed.nested.absmax, state.state2.absmax)
            assert same(packed.nested.map, state.state2.code)
            assert same(packed.nested.offset, state.offset)
        else:
            assert same(packed.absmax, state.absmax)
        values, stock_values = dequantize_tensor(packed), F.dequantize_4bit(codes, state)
        if dtype is torch.bfloat16:  # the AVX512 conversion flushes values below 1.2e-38 to zero
            values, stock_values = flushed(values), flushed(stock_values)
        assert equally_decoded(values, stock_values), dtype


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [32, 64, 128, 256, 512, 4096])
def test_every_block_size(block, scheme):
    weight = uneven((24, 4096), block)
    codes, state = stock(weight, scheme, True, block)
    packed = quantize_tensor(weight, spec(scheme, True, block))
    assert same(packed.codes, codes)
    assert equally_decoded(dequantize_tensor(packed), F.dequantize_4bit(codes, state))


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(3, 50), (5, 33), (7, 96), (33, 70), (64, 688), (1, 1), (3, 64)])
def test_rows_that_are_not_whole_blocks(shape, scheme):
    """Codes and scales equal bitsandbytes; values are within half a step of the weight.

    Those that bitsandbytes itself dequantizes there are not.
    """
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    codes, state = stock(weight, scheme, False)
    packed = quantize_tensor(weight, spec(scheme))
    assert same(packed.codes, codes)
    assert same(packed.absmax, state.absmax)
    ordered = levels(scheme).sort().values
    widest = (ordered[1:] - ordered[:-1]).max() / 2
    scale = packed.absmax.repeat_interleave(64)[: weight.numel()].view(shape)
    assert ((dequantize_tensor(packed) - weight).abs() <= widest * scale * (1 + 1e-6)).all()


def test_codec_notices_a_wrong_code_and_a_wrong_scale():
    """Negative control: the equality used above fails for one nibble and for one ulp."""
    packed = quantize_tensor(torch.randn(32, 64), spec())
    codes = packed.codes.clone()
    codes[5] ^= 1
    assert not same(packed.codes, codes)
    scale = packed.absmax.clone()
    scale[3] = torch.nextafter(scale[3], torch.tensor(9.0))
    assert not same(packed.absmax, scale)


def test_levels_and_dynamic_map_are_those_of_bitsandbytes():
    assert same(levels("nf4"), F.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(levels("fp4"), F.get_4bit_type("fp4", device="cpu"))
    assert same(dynamic_map(), F.create_dynamic_map())


def test_nested_scales_stay_close_to_the_scales():
    scales = torch.rand(5000, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.05
    restored = unnest_scales(nest_scales(scales))
    assert (restored - scales).abs().max() < 0.01 * scales.max()
    assert (restored.roll(1) - scales).abs().max() > 0.01 * scales.max()


def test_offset_is_the_same_on_any_number_of_threads():
    """The offset of bitsandbytes itself differs between 1 and 3 threads for these scales."""
    scales = torch.rand(1048576, generator=torch.Generator().manual_seed(1)) * 0.1 + 0.05
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = nest_scales(scales).offset
        torch.set_num_threads(3)
        three = nest_scales(scales).offset
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert same(one, three)


def test_packing_codes_is_reversible_and_high_half_first():
    codes = torch.randint(0, 16, (101,), dtype=torch.uint8)
    packed = pack_codes(codes)
    assert torch.equal(unpack_codes(packed, 101), codes)
    assert packed[0] == codes[0] * 16 + codes[1]


def test_dequantize_to_float32_does_not_pass_through_the_base_dtype():
    weight = uneven((32, 128), 9).bfloat16()
    packed = quantize_tensor(weight, spec())
    exact = dequantize_tensor(packed, torch.float32)
    assert torch.equal(exact, dequantize_tensor(quantize_tensor(weight.float(), spec())))
    assert not torch.equal(exact, dequantize_tensor(packed).float())


INFINITY = float("inf")


@pytest.mark.parametrize("unfit", [[float("nan")], [INFINITY], [-INFINITY], [INFINITY, -INFINITY]])
def test_values_that_are_not_finite_are_refused(unfit):
    weight = torch.ones(4, 64)
    weight.view(-1)[7 : 7 + len(unfit)] = torch.tensor(unfit)
    with pytest.raises(InputRefused, match="NaN"):
        quantize_tensor(weight, spec())


def test_finite_values_whose_sum_overflows_are_quantized():
    weight = torch.full((4, 64), 3e38)
    assert not torch.isfinite(weight.sum())
    assert torch.equal(dequantize_tensor(quantize_tensor(weight, spec())), weight)


def test_refusals():
    with pytest.raises(Unsupported, match="scheme"):
        quantize_tensor(torch.ones(1, 64), QuantSpec())
    with pytest.raises(Unsupported, match="group size 48"):
        quantize_tensor(torch.ones(1, 64), spec(block=48))
    with pytest.raises(Unsupported, match="int64"):
        quantize_tensor(torch.ones(1, 64, dtype=torch.int64), spec())


@pytest.mark.exhaustive
@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_double_quantization_of_millions_of_scales(scheme):
    for seed in range(12):
        scales = torch.rand(2**18 + seed, generator=torch.Generator().manual_seed(seed))
        state = F.quantize_blockwise(scales - scales.mean(), blocksize=256)
        nested = nest_scales(scales)
        assert same(nested.codes, state[0])
        assert same(nested.absmax, state[1].absmax)


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_the_table_of_nearest_levels_agrees_with_a_search_next_to_every_boundary(scheme):
    from qlx.quant.codec4bit import _CELLS, _ascending, _nearest

    midpoints, _ = _ascending(scheme)
    edges = torch.cat([midpoints, torch.linspace(-1, 1, _CELLS + 1)])
    below, above, values = edges, edges, [edges, torch.linspace(-1, 1, 100_001)]
    for _ in range(20):
        below = torch.nextafter(below, torch.tensor(-2.0))
        above = torch.nextafter(above, torch.tensor(2.0))
        values += [below, above]
    every = torch.cat(values).clamp(-1, 1)
    assert torch.equal(_nearest(every, scheme).int(), torch.bucketize(every, midpoints).int())
    assert not torch.equal(
        _nearest(every, scheme).int(), torch.bucketize(every, midpoints, right=True).int()
    )
