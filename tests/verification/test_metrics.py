"""Metrics against values worked out by hand or with scipy's own formulas, and their refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlx.errors import CheckFailed, Mismatch
from qlx.inputs import log_softmax
from qlx.verification.metrics import compare, divergence, margins


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(size=(5, 7, 11)).astype(np.float32)


def test_equal_outputs_have_no_distance(logits):
    result = compare(logits, logits.copy(), base=logits + np.arange(11))
    assert (result.max_abs, result.relative, result.kl_mean, result.top1) == (0, 0, 0, 1)
    assert result.retention == 1.0
    assert result.positions == 35


def test_relative_and_max_abs_are_the_norms(logits):
    noise = np.random.default_rng(1).normal(size=logits.shape) * 1e-3
    result = compare(logits, logits + noise)
    assert result.max_abs == pytest.approx(np.abs(noise).max())
    assert result.relative == pytest.approx(np.linalg.norm(noise) / np.linalg.norm(logits))


def test_divergence_by_hand():
    left = np.log(np.array([[0.5, 0.25, 0.25]]))
    right = np.log(np.array([[0.25, 0.5, 0.25]]))
    expected = 0.5 * np.log(2) + 0.25 * np.log(0.5)
    assert divergence(left, right)[0] == pytest.approx(expected)
    assert divergence(left, right + 3.0)[0] == pytest.approx(expected)  # softmax knows no offset


def test_p99_is_of_positions_not_the_mean():
    reference = np.zeros((1000, 2))
    candidate = reference.copy()
    candidate[:20, 0] = 5.0
    result = compare(reference, candidate)
    assert result.kl_p99 == pytest.approx(divergence(reference[:1], candidate[:1])[0])
    assert result.kl_mean == pytest.approx(result.kl_p99 * 0.02)


def test_mask_leaves_padding_out(logits):
    mask = np.ones((5, 7), np.int64)
    mask[:, 4:] = 0
    spoiled = logits.copy()
    spoiled[:, 4:] = np.nan
    assert compare(logits, spoiled, mask).relative == 0
    assert compare(logits, spoiled, mask).positions == 20
    with pytest.raises(CheckFailed, match="15 of 35"):
        compare(logits, spoiled)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_fails(logits, bad):
    spoiled = logits.copy()
    spoiled[3, 2, 1] = bad
    with pytest.raises(CheckFailed, match="not finite"):
        compare(logits, spoiled)
    with pytest.raises(Mismatch, match="reference"):
        compare(spoiled, logits)


def test_shapes_that_do_not_fit_are_refused(logits):
    with pytest.raises(Mismatch, match="shape"):
        compare(logits, logits[:, :, :10])
    with pytest.raises(Mismatch, match="mask"):
        compare(logits, logits, np.ones((5, 6)))
    with pytest.raises(Mismatch, match="no outputs"):
        compare(logits, logits, np.zeros((5, 7)))


def test_top1_counts_only_decided_positions_within_the_tolerance():
    reference = np.array([[1.0, 0.9999], [1.0, 0.0]])
    swapped_tie = np.array([[0.9999, 1.0], [1.0, 0.0]])
    result = compare(reference, swapped_tie, tolerance=1e-3)
    assert (result.top1, result.top1_decided, result.decided) == (0.5, 1.0, 1)
    swapped_sure = np.array([[1.0, 0.9999], [0.0, 1.0]])
    assert compare(reference, swapped_sure, tolerance=1e-3).top1_decided == 0.0


def test_retention_is_one_minus_the_share_of_divergence():
    base, reference = np.zeros((4, 3)), np.tile([2.0, 0.0, 0.0], (4, 1))
    half = reference / 2
    expected = 1 - divergence(reference, half).mean() / divergence(reference, base).mean()
    assert compare(reference, half, base=base).retention == pytest.approx(expected)
    assert compare(reference, base, base=base).retention == 0.0
    assert compare(reference, -reference, base=base).retention < 0  # worse than no adapter
    assert compare(reference, reference, base=reference).retention is None  # no effect to keep
    assert compare(reference, half).retention is None


def test_blocks_of_rows_change_nothing():
    wide = np.random.default_rng(2).normal(size=(5, 2**19)).astype(np.float32)
    other = wide + np.float32(0.01) * np.random.default_rng(3).normal(size=wide.shape).astype(
        np.float32
    )
    result = compare(wide, other)
    left, right = log_softmax(wide), log_softmax(other)
    assert result.kl_mean == pytest.approx((np.exp(left) * (left - right)).sum(1).mean(), rel=1e-9)
    assert result.relative == pytest.approx(
        np.linalg.norm(other.astype(float) - wide) / np.linalg.norm(wide.astype(float))
    )


def test_margin_of_ties_and_of_one_class():
    assert margins(np.array([[3.0, 1.0, 3.0], [0.0, 5.0, 2.0]])).tolist() == [0.0, 3.0]
    assert margins(np.array([[3.0]])).tolist() == [np.inf]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.floats(-50, 50), st.floats(0.01, 30))
def test_divergence_is_never_negative_and_ignores_offsets(seed, classes, offset, scale):
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(2, 4, classes)) * scale
    kl = divergence(left, right)
    assert (kl >= 0).all()
    assert np.isfinite(kl).all()
    np.testing.assert_allclose(divergence(left + offset, right - offset), kl, rtol=1e-6, atol=1e-9)
