"""Probes: real inputs with padding, bounded in size, and outputs with the adapter on and off."""

import numpy as np
import torch

from qlx.checkpoint import open_checkpoint, read_probe, resolve_source
from qlx.inputs import Encoded
from qlx.models import (
    MAX_LOGITS_BYTES,
    forward_logits,
    load_base,
    load_model,
    make_probe,
    probe_texts,
    synthetic_inputs,
)


def _texts(count, length):
    return [Encoded(list(range(1, length + 1)), list(range(1, length + 1))) for _ in range(count)]


def test_texts_hold_padding_even_when_all_are_equally_long():
    batch = probe_texts(_texts(6, 20), 0, count=6, max_length=12, vocabulary=100)
    assert batch.inputs["input_ids"].shape == (6, 12)
    lengths = batch.inputs["attention_mask"].sum(axis=1).tolist()
    assert lengths == [12, 9] * 3
    assert batch.inputs["input_ids"][0].tolist() == list(range(9, 21)), (
        "the end of the text is kept"
    )
    assert (batch.labels[1, 9:] == -100).all()


def test_large_vocabularies_get_fewer_and_shorter_texts():
    for vocabulary in (1_000, 50_000, 152_000, 262_144):
        batch = probe_texts(_texts(64, 200), 0, count=64, max_length=128, vocabulary=vocabulary)
        count, length = batch.inputs["input_ids"].shape
        assert count >= 2
        assert length >= 4
        assert 4 * count * length * vocabulary <= MAX_LOGITS_BYTES
        assert (batch.inputs["attention_mask"] == 0).any()


def test_probe_of_a_run(python_run, python_base):
    run, base = open_checkpoint(python_run), resolve_source(str(python_base))
    stored = read_probe(python_run)
    model = load_model(run, base)
    probe = make_probe(model, "causal-lm", stored.inputs, stored.labels, has_adapter=True)
    np.testing.assert_allclose(
        probe.reference, stored.reference, rtol=0, atol=1e-5 * np.abs(stored.reference).max()
    )
    assert probe.native is None
    quantized = load_base(base.path, "causal-lm", quant=run.manifest.quantization)
    assert np.array_equal(probe.base, forward_logits(quantized, "causal-lm", stored.inputs))
    assert (stored.inputs["attention_mask"] == 0).any()
    assert (stored.labels != -100).any()


def test_native_outputs_are_those_of_the_training_dtype(digits_run, digits_base):
    run, base = open_checkpoint(digits_run), resolve_source(str(digits_base))
    inputs = read_probe(digits_run).inputs
    model = load_model(run, base, compute_dtype=torch.bfloat16)
    native = forward_logits(model, "image-classification", inputs)
    probe = make_probe(model, "image-classification", inputs, None, has_adapter=True)
    assert np.array_equal(probe.native, native)
    assert 0 < np.abs(probe.native - probe.reference).max() < 0.1 * np.abs(probe.reference).max()


def test_synthetic_inputs_are_always_the_same(digits_base, python_base):
    for path, task in ((digits_base, "image-classification"), (python_base, "causal-lm")):
        config = load_base(path, task).config
        first, again = synthetic_inputs(task, config), synthetic_inputs(task, config)
        assert all(np.array_equal(first[name], again[name]) for name in first)
        if task == "causal-lm":
            assert (first["attention_mask"] == 0).any()
