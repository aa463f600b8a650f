"""Task metrics against torch's own cross-entropy."""

import numpy as np
import pytest
import torch

from qlx.errors import InputRefused
from qlx.inputs import Score


def test_classifier_against_torch():
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(40, 5)).astype(np.float32), random.integers(0, 5, 40)
    score = Score("image-classification")
    score.add(logits[:25], labels[:25])
    score.add(logits[25:], labels[25:])
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits).double(), torch.tensor(labels)
    ).item()
    assert score.metrics()["loss"] == pytest.approx(expected, rel=1e-12)
    assert score.metrics()["accuracy"] == (logits.argmax(-1) == labels).mean()


def test_language_model_loss_is_that_of_transformers():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 50, (3, 12))
    labels = ids.clone()
    labels[0, :7] = -100
    with torch.no_grad():
        output = model(input_ids=ids, labels=labels)
    score = Score("causal-lm")
    score.add(output.logits.numpy(), labels.numpy())
    assert score.metrics()["loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    assert score.count == 11 * 2 + 5
    unshifted = Score("image-classification")
    unshifted.add(output.logits.numpy().reshape(-1, 50), labels.numpy().reshape(-1))
    assert unshifted.metrics()["loss"] != pytest.approx(output.loss.item(), rel=1e-3)


def test_nothing_to_predict_is_an_error():
    score = Score("causal-lm")
    score.add(np.zeros((1, 3, 4), np.float32), np.full((1, 3), -100))
    with pytest.raises(InputRefused):
        score.metrics()
