"""Task scores against torch's cross entropy, and their independence from batching."""

import numpy as np
import pytest
import torch

from qlx.errors import CheckFailed, Mismatch
from qlx.verification.scores import Tally, tally_images, tally_tokens


@pytest.fixture
def tokens():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 9, size=(4, 6))
    labels[0, 3:] = -100
    labels[:, 0] = -100
    return rng.normal(size=(4, 6, 9)).astype(np.float32), labels


def test_tokens_match_torch(tokens):
    logits, labels = tokens
    shifted = torch.from_numpy(logits)[:, :-1].reshape(-1, 9)
    expected = torch.nn.functional.cross_entropy(
        shifted, torch.from_numpy(labels)[:, 1:].reshape(-1)
    )
    metrics = tally_tokens(logits, labels).metrics("causal-lm")
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert metrics["perplexity"] == pytest.approx(np.exp(metrics["loss"]))
    assert tally_tokens(logits, labels).count == 17


def test_a_missing_shift_would_be_noticed(tokens):
    logits, labels = tokens
    perfect = np.eye(9)[np.where(labels == -100, 0, labels)] * 50
    ahead = np.roll(perfect, -1, axis=1)
    assert tally_tokens(ahead, labels).metrics("causal-lm")["token_accuracy"] == 1
    assert tally_tokens(perfect, labels).metrics("causal-lm")["token_accuracy"] < 0.5


def test_batches_add_up(tokens):
    logits, labels = tokens
    whole = tally_tokens(logits, labels)
    parts = sum((tally_tokens(logits[i : i + 1], labels[i : i + 1]) for i in range(4)), Tally())
    assert (parts.count, parts.right) == (whole.count, whole.right)
    assert parts.loss == pytest.approx(whole.loss)


def test_images():
    logits = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    metrics = tally_images(logits, np.array([0, 1, 1])).metrics("image-classification")
    assert metrics["accuracy"] == pytest.approx(2 / 3)


def test_nothing_to_predict_and_broken_models_are_no_score():
    with pytest.raises(Mismatch, match="nothing to predict"):
        tally_images(np.zeros((2, 3)), np.array([-100, -100])).metrics("image-classification")
    with pytest.raises(CheckFailed, match="not finite"):
        tally_images(np.full((1, 3), np.nan), np.array([0])).metrics("image-classification")
