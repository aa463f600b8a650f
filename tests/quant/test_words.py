"""GPTQ and AWQ tensors built from the published description, in plain Python, against a dense oracle."""

import numpy as np
import pytest
import torch

from qlx.errors import CorruptCheckpoint, Unsupported
from qlx.quant import packed_from_awq, packed_from_gptq
from qlx.quant.words import unpack_words
from tests.coded_support import AWQ_PLACES, words

OUT, IN, GROUP = 16, 64, 16


def parts(bits=4, seed=0, symmetric=False, order=None, top=None):
    """Unsigned codes [out, in], zeros and fp16 scales [groups, out], the group of each input, values."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 1 << bits, (OUT, IN))
    groups = np.arange(IN) // GROUP if order is None else np.arange(IN)[order] // GROUP
    count = IN // GROUP
    zeros = random.integers(1, (1 << bits) - 1 if top is None else top, (count, OUT))
    if symmetric:
        zeros[:] = 1 << (bits - 1)
    scales = (random.random((count, OUT)) * 0.02 + 0.001).astype(np.float16)
    values = np.empty((OUT, IN))
    for row in range(OUT):
        for column in range(IN):
            group = groups[column]
            values[row, column] = float(scales[group, row]) * int(
                codes[row, column] - zeros[group, row]
            )
    return codes, zeros, scales, groups, values


def gptq(bits=4, less_one=1, **options):
    codes, zeros, scales, groups, values = parts(bits, **options)
    entries = {
        "l.qweight": words(codes, bits).T.contiguous(),  # in [in * bits / 32, out]
        "l.qzeros": words(zeros - less_one, bits),
        "l.scales": torch.from_numpy(scales),
        "l.g_idx": torch.from_numpy(groups.astype(np.int32)),
    }
    return entries, torch.from_numpy(values)


def awq(**options):
    codes, zeros, scales, _, values = parts(4, **options)
    entries = {
        "l.qweight": words(codes.T, 4, AWQ_PLACES),
        "l.qzeros": words(zeros, 4, AWQ_PLACES),
        "l.scales": torch.from_numpy(scales),
    }
    return entries, torch.from_numpy(values)


def same(packed, values):
    """Equal to the float64 oracle within the one rounding of a float32 product."""
    return torch.equal(packed.values(), values.float())


@pytest.mark.parametrize("bits", [4, 8])
def test_words_are_read_lowest_bits_first(bits):
    table = np.random.default_rng(0).integers(0, 1 << bits, (3, 16))
    assert unpack_words(words(table, bits), bits).tolist() == table.tolist()
    assert unpack_words(words(table, bits), bits).tolist() != table[:, ::-1].tolist()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("less_one", [True, False], ids=["gptq", "gptq_v2"])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_values(bits, symmetric, less_one, act_order):
    order = np.random.default_rng(9).permutation(IN) if act_order else None
    entries, values = gptq(bits, int(less_one), symmetric=symmetric, order=order)
    packed = packed_from_gptq(
        entries, "l.weight", bits=bits, symmetric=symmetric, zeros_less_one=less_one
    )
    assert same(packed, values)
    assert packed.shape == (OUT, IN)
    assert packed.group_size == GROUP
    assert (packed.groups is None) is not act_order
    assert (packed.zeros is None) is symmetric
    if not symmetric:  # negative control: the offset of the other format
        wrong = packed_from_gptq(
            entries, "l.weight", bits=bits, symmetric=False, zeros_less_one=not less_one
        )
        assert not same(wrong, values)


def test_gptq_act_order_needs_its_groups():
    entries, values = gptq(order=np.random.default_rng(9).permutation(IN))
    del entries["l.g_idx"]
    packed = packed_from_gptq(entries, "l.weight", bits=4, symmetric=False)
    assert not same(packed, values)


def test_gptq_one_scale_a_row():
    codes, _, scales, _, _ = parts()
    entries = {
        "l.qweight": words(codes, 4).T.contiguous(),
        "l.qzeros": words(np.full((1, OUT), 7), 4),
        "l.scales": torch.from_numpy(scales[:1]),
        "l.g_idx": torch.zeros(IN, dtype=torch.int32),
    }
    packed = packed_from_gptq(entries, "l.weight", bits=4, symmetric=True)
    expected = (codes - 8) * scales[0].astype(np.float64)[:, None]
    assert same(packed, torch.from_numpy(expected))
    assert packed.group_size is None


@pytest.mark.parametrize("labelled_first", [True, False])
def test_symmetric_zeros_are_read_right_under_either_label(labelled_first):
    """Some writers store the zeros of gptq_v2 and call the format gptq; an offset of one scale."""
    entries, values = gptq(less_one=0 if labelled_first else 1, symmetric=True)
    packed = packed_from_gptq(
        entries, "l.weight", bits=4, symmetric=True, zeros_less_one=labelled_first
    )
    assert same(packed, values)


def test_a_zero_that_readers_disagree_about_is_refused():
    _codes, zeros, _scales, _groups, _ = parts()
    entries, _ = gptq()
    stored = zeros - 1
    stored[0, 0] = 15
    entries["l.qzeros"] = words(stored, 4)
    with pytest.raises(Unsupported, match="stored as 15"):
        packed_from_gptq(entries, "l.weight", bits=4, symmetric=False)
    packed_from_gptq(entries, "l.weight", bits=4, symmetric=False, zeros_less_one=False)


def test_awq_values_and_order():
    entries, values = awq()
    packed = packed_from_awq(entries, "l.weight")
    assert same(packed, values)
    assert packed.group_size == GROUP
    codes, _zeros, _scales, _, _ = parts()
    entries["l.qweight"] = words(codes.T, 4)  # negative control: in plain order
    assert not same(packed_from_awq(entries, "l.weight"), values)


@pytest.mark.parametrize("bits", [3, 5])
def test_other_bits_are_refused_with_the_reason(bits):
    entries, _ = gptq()
    with pytest.raises(Unsupported, match=f"gptq with {bits} bits is not supported: .+"):
        packed_from_gptq(entries, "l.weight", bits=bits, symmetric=True)
    with pytest.raises(Unsupported, match="AWQ defines 4-bit codes only"):
        packed_from_awq(entries, "l.weight", bits=8)


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_parts_that_are_missing_or_misfit_are_refused_by_name(part):
    for make, read in (
        (gptq, lambda e: packed_from_gptq(e, "l.weight", bits=4, symmetric=False)),
        (awq, lambda e: packed_from_awq(e, "l.weight")),
    ):
        entries, _ = make()
        read(entries)
        missing = {key: value for key, value in entries.items() if not key.endswith(part)}
        with pytest.raises(CorruptCheckpoint, match=f"l.{part}.*missing"):
            read(missing)
        with pytest.raises(CorruptCheckpoint, match="l"):
            read(entries | {f"l.{part}": entries[f"l.{part}"][:-1]})
        with pytest.raises(CorruptCheckpoint, match=f"l.{part}"):
            read(entries | {f"l.{part}": entries[f"l.{part}"].to(torch.complex64).abs().bool()[0]})


def test_corrupt_groups_and_symmetric_zeros_are_refused():
    entries, _ = gptq(symmetric=True)
    with pytest.raises(CorruptCheckpoint, match="g_idx"):
        packed_from_gptq(
            entries | {"l.g_idx": entries["l.g_idx"] + 1}, "l.weight", bits=4, symmetric=True
        )
    crooked, _ = gptq()
    with pytest.raises(CorruptCheckpoint, match="whose zero point is 8"):
        packed_from_gptq(crooked, "l.weight", bits=4, symmetric=True)
