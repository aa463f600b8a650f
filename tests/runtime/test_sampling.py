"""Sampling against its definition."""

import numpy as np
import pytest

from qlx.errors import UsageError
from qlx.runtime import Sampler, SamplingOptions, next_distribution

LOGITS = np.log(np.array([0.5, 0.25, 0.125, 0.0625, 0.0625]))


def test_temperature_one_is_the_softmax():
    options = SamplingOptions(temperature=1.0)
    np.testing.assert_allclose(next_distribution(LOGITS, options), np.exp(LOGITS))


def test_a_lower_temperature_sharpens():
    weights = next_distribution(LOGITS, SamplingOptions(temperature=0.5))
    np.testing.assert_allclose(weights, np.exp(2 * LOGITS) / np.exp(2 * LOGITS).sum())


@pytest.mark.parametrize("temperature", [1e-5, 1e-40, 1e-310, 5e-324])
def test_next_to_no_temperature_is_the_best_token(temperature):
    weights = next_distribution(1e4 * LOGITS, SamplingOptions(temperature=temperature))
    np.testing.assert_array_equal(weights, [1, 0, 0, 0, 0])
    assert Sampler(SamplingOptions(temperature=temperature, seed=1)).choose(LOGITS) == 0


def test_top_k_keeps_the_k_likeliest():
    weights = next_distribution(LOGITS, SamplingOptions(temperature=1.0, top_k=2))
    np.testing.assert_allclose(weights, [2 / 3, 1 / 3, 0, 0, 0])


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.4, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.8, 3), (1.0, 5)]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    weights = next_distribution(LOGITS, SamplingOptions(temperature=1.0, top_p=top_p))
    assert (weights > 0).sum() == kept
    assert weights.sum() == pytest.approx(1)


def test_the_penalty_lowers_what_was_seen_whatever_its_sign():
    logits = np.array([2.0, -2.0, 1.0])
    options = SamplingOptions(temperature=1.0, repetition_penalty=2.0)
    weights = next_distribution(logits, options, seen=[0, 1])
    expected = np.exp([1.0, -4.0, 1.0])
    np.testing.assert_allclose(weights, expected / expected.sum())


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 3},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 0.9, "top_k": 4, "top_p": 0.6, "repetition_penalty": 1.5},
    ],
)
def test_the_distribution_is_that_of_transformers(options):
    import torch
    from transformers.generation import logits_process as hf

    random = np.random.default_rng(1)
    logits = random.standard_normal(50) * 3
    seen = [3, 9, 4]
    scores = torch.from_numpy(logits)[None]
    if "repetition_penalty" in options:
        scores = hf.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"])(
            torch.tensor([seen]), scores
        )
    scores = hf.TemperatureLogitsWarper(options["temperature"])(None, scores)
    if "top_k" in options:
        scores = hf.TopKLogitsWarper(options["top_k"])(None, scores)
    if "top_p" in options:
        scores = hf.TopPLogitsWarper(options["top_p"])(None, scores)
    expected = torch.softmax(scores, -1)[0].numpy()
    found = next_distribution(logits, SamplingOptions(**options), seen)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_draws_follow_the_distribution():
    sampler = Sampler(SamplingOptions(temperature=1.0, seed=3))
    counts = np.bincount([sampler.choose(LOGITS) for _ in range(20_000)], minlength=5)
    np.testing.assert_allclose(counts / counts.sum(), np.exp(LOGITS), atol=0.012)


def test_greedy_takes_the_likeliest_and_needs_no_seed():
    assert Sampler(SamplingOptions()).choose(LOGITS) == 0
    greedy = Sampler(SamplingOptions(repetition_penalty=5.0))
    first = np.array([1.0, 0.9, 0.5])
    assert [greedy.choose(first) for _ in range(3)] == [0, 1, 2]


def test_the_seed_decides():
    def draw(seed):
        sampler = Sampler(SamplingOptions(temperature=1.0, seed=seed))
        return [sampler.choose(LOGITS) for _ in range(30)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("stop", ("",)),
    ],
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(UsageError, match=field):
        SamplingOptions(**{field: value})
