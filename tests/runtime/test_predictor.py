"""Batched logits: batch, padding and cache must not change what a sequence gets."""

import numpy as np
import pytest
import torch

from qlx.errors import InputRefused
from qlx.runtime import CausalDecoder, OnnxPredictor, open_model, positions


@pytest.fixture(scope="module")
def predictor(llama):
    return OnnxPredictor(llama[0].path, threads=1)


def reference(model, ids):
    """Torch's logits of one unpadded sequence."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0].numpy()


SEQUENCES = [[7, 8, 9, 10, 11, 12], [200, 31, 5], [90]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(predictor, llama, side):
    width = max(map(len, SEQUENCES))
    ids, mask = np.zeros((3, width), np.int64), np.zeros((3, width), np.int64)
    spans = [
        slice(0, len(each)) if side == "right" else slice(width - len(each), width)
        for each in SEQUENCES
    ]
    for row, (each, span) in enumerate(zip(SEQUENCES, spans, strict=True)):
        ids[row, span], mask[row, span] = each, 1
    logits = predictor.predict({"input_ids": ids, "attention_mask": mask})
    unmasked = predictor.predict({"input_ids": ids})
    for row, (each, span) in enumerate(zip(SEQUENCES, spans, strict=True)):
        np.testing.assert_allclose(logits[row, span], reference(llama[1], each), atol=2e-5)
        if side == "left" and len(each) < width:
            assert np.abs(unmasked[row, span] - logits[row, span]).max() > 1e-2


def test_step_by_step_equals_all_at_once(predictor, llama):
    ids = np.array([[7, 8, 9, 10, 11, 12, 13, 14], [50, 51, 52, 53, 54, 55, 56, 57]])
    mask = np.array([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    whole = predictor.predict({"input_ids": ids, "attention_mask": mask})
    decoder = CausalDecoder(predictor.model, batch=2)
    cuts = [slice(0, 3), slice(3, 4), slice(4, 8)]
    parts = np.concatenate([decoder.feed(ids[:, cut], mask[:, cut]) for cut in cuts], axis=1)
    assert decoder.length == 8
    np.testing.assert_allclose(parts[mask.astype(bool)], whole[mask.astype(bool)], atol=2e-5)
    np.testing.assert_allclose(parts[1], reference(llama[1], ids[1].tolist()), atol=2e-5)


def test_positions_count_real_tokens_only():
    mask = np.array([[0, 0, 1, 1], [1, 1, 0, 0]])
    np.testing.assert_array_equal(positions(mask), [[0, 0, 0, 1], [0, 1, 1, 1]])


@pytest.mark.parametrize("count", [1, 3, 5])
def test_images_of_any_batch(vit, count):
    pixels = np.random.default_rng(count).standard_normal((count, 3, 16, 16)).astype(np.float32)
    logits = OnnxPredictor(vit[0].path, threads=1).predict({"pixel_values": pixels})
    with torch.inference_mode():
        expected = vit[1](pixel_values=torch.from_numpy(pixels)).logits.numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    assert np.abs(logits - expected[:, ::-1]).max() > 1e-2


def test_two_runs_and_two_thread_counts_agree(vit, llama):
    pixels = np.ones((2, 3, 16, 16), np.float32)
    first, second = (OnnxPredictor(vit[0].path, threads=1) for _ in range(2))
    np.testing.assert_array_equal(
        first.predict({"pixel_values": pixels}), second.predict({"pixel_values": pixels})
    )
    ids = {"input_ids": np.arange(6, 40)[None]}
    one, two = (OnnxPredictor(llama[0].path, threads=n).predict(ids) for n in (1, 2))
    np.testing.assert_allclose(one, two, atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "word"),
    [
        ({}, "pixel_values"),
        ({"pixel_values": np.zeros((1, 3, 8, 8), np.float32)}, "16, 16"),
        ({"pixel_values": np.zeros((3, 16, 16), np.float32)}, "4 axes"),
        ({"pixel_values": np.zeros((0, 3, 16, 16), np.float32)}, "at least one"),
    ],
)
def test_wrong_image_inputs_are_named(vit, inputs, word):
    with pytest.raises(InputRefused, match=word):
        OnnxPredictor(vit[0].path).predict(inputs)


def test_a_mask_of_another_shape_is_refused(predictor):
    with pytest.raises(InputRefused, match="must agree"):
        predictor.predict({"input_ids": np.ones((1, 4)), "attention_mask": np.ones((1, 3))})


def test_the_model_says_what_it_is(llama):
    model = open_model(llama[0].path, threads=1)
    assert model.task == "causal-lm"
    assert model.shapes["past_key_values.1.value"] == ["batch", 2, "past", 16]
    assert model.outputs[0] == "logits"
