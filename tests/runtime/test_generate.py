"""Generation against transformers, and everything that can end or shape a text."""

import itertools

import numpy as np
import pytest
import torch

from qlx.errors import InputRefused, UsageError
from qlx.runtime import SamplingOptions, TextGenerator, TextStream
from tests.onnx_support import CONTEXT

PROMPT = "def add(first, second):"


@pytest.fixture(scope="module")
def generator(llama):
    return TextGenerator(llama[0].path, threads=1)


def test_greedy_equals_transformers(generator, llama):
    ids = generator.encode(PROMPT)
    with torch.inference_mode():
        expected = llama[1].generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=40,
            do_sample=False,
        )
    found = generator.generate(PROMPT, SamplingOptions(max_tokens=40))
    assert list(found.tokens) == expected[0, len(ids) :].tolist()
    assert found.text == generator.codec.decode(found.tokens).rstrip("\ufffd")
    assert found.prompt_tokens == len(ids)
    assert found.finish_reason == "length"


def test_greedy_with_a_penalty_equals_transformers(generator, llama):
    ids = generator.encode(PROMPT)
    with torch.inference_mode():
        expected = llama[1].generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=30,
            do_sample=False,
            repetition_penalty=1.3,
        )
    options = SamplingOptions(max_tokens=30, repetition_penalty=1.3)
    found = generator.generate(PROMPT, options)
    assert list(found.tokens) == expected[0, len(ids) :].tolist()
    assert found.tokens != generator.generate(PROMPT, SamplingOptions(max_tokens=30)).tokens


def test_a_stream_adds_up_to_the_whole(generator):
    options = SamplingOptions(max_tokens=40, temperature=1.0, seed=11)
    pieces = list(generator.stream(PROMPT, options))
    assert "".join(piece.text for piece in pieces) == generator.generate(PROMPT, options).text
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == "length"


def test_seeds_repeat_and_differ(generator):
    def text(seed):
        options = SamplingOptions(max_tokens=30, temperature=1.0, top_p=0.95, seed=seed)
        return generator.generate(PROMPT, options).text

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(4)}) == 4


def test_a_stop_string_ends_the_text_before_it(generator):
    whole = generator.generate(PROMPT, SamplingOptions(max_tokens=40)).text
    stop = whole[10:13]
    found = generator.generate(PROMPT, SamplingOptions(max_tokens=40, stop=(stop, "never")))
    assert found.text == whole[: whole.index(stop)]
    assert found.finish_reason == "stop"
    assert len(found.tokens) < 40


def test_the_end_token_ends_the_text(generator):
    first = generator.generate(PROMPT, SamplingOptions(max_tokens=12))
    end = first.tokens[5]
    generator.end_tokens, before = frozenset({end}), generator.end_tokens
    try:
        found = generator.generate(PROMPT, SamplingOptions(max_tokens=40))
    finally:
        generator.end_tokens = before
    assert found.finish_reason == "stop"
    assert found.tokens == first.tokens[: first.tokens.index(end)]


def test_it_stops_where_the_context_ends(generator):
    prompt = generator.encode(PROMPT)
    found = generator.generate(prompt, SamplingOptions(max_tokens=1000))
    assert len(prompt) + len(found.tokens) == CONTEXT
    assert found.finish_reason == "length"


def test_a_prompt_that_leaves_no_room_is_refused(generator):
    with pytest.raises(UsageError, match=str(CONTEXT)):
        generator.generate([7] * CONTEXT)
    with pytest.raises(UsageError, match="empty"):
        generator.stream("")
    with pytest.raises(UsageError, match="between 0 and"):
        generator.generate([10**6])


def test_cancelling_ends_the_stream_before_the_next_token(generator):
    asked = itertools.count()
    taken = list(generator.stream(PROMPT, SamplingOptions(), lambda: next(asked) >= 3))
    assert [piece.finish_reason for piece in taken] == [None, None, None, "cancelled"]


def test_cancelling_ends_the_reading_of_a_long_prompt(generator, monkeypatch):
    monkeypatch.setattr("qlx.runtime.generate._PREFILL_LOGITS", 7 * 320)
    asked = itertools.count()
    taken = list(generator.stream([9] * 40, SamplingOptions(), lambda: next(asked) >= 2))
    assert [(piece.text, piece.finish_reason) for piece in taken] == [("", "cancelled")]
    assert next(asked) == 3  # after the third of six chunks


def test_a_long_prompt_in_chunks_is_the_same(generator, monkeypatch):
    expected = generator.generate([9] * 40, SamplingOptions(max_tokens=8)).tokens
    monkeypatch.setattr("qlx.runtime.generate._PREFILL_LOGITS", 7 * 320)
    assert generator.generate([9] * 40, SamplingOptions(max_tokens=8)).tokens == expected


def test_a_chat_is_rendered_by_the_models_own_template(generator):
    ids = generator.encode_chat([{"role": "user", "content": "hello"}])
    text = generator.tokenizer.decode(ids, skip_special_tokens=False)
    assert text == "<|user|>hello<|end|><|assistant|>"


def test_a_classifier_does_not_generate(vit):
    with pytest.raises(InputRefused, match="image-classification"):
        TextGenerator(vit[0].path)


def test_half_characters_wait_for_their_other_half(generator):
    ids = generator.tokenizer.encode("é→🙂x", add_special_tokens=False).ids
    stream = TextStream(generator.tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) == "é→🙂x"
    assert "\ufffd" not in "".join(pieces)
    assert len(ids) > 4  # some characters really are several tokens


def test_a_possible_beginning_of_a_stop_string_is_held_back(generator):
    ids = generator.tokenizer.encode("abcabd", add_special_tokens=False).ids
    stream = TextStream(generator.tokenizer, stop=("abd",))
    shown = ""
    for token in ids:
        shown += stream.push(token)
        assert "abd".startswith(shown[3:]) or shown == "abc"
        if stream.stopped:
            break
    assert stream.stopped
    assert shown == "abc"
    assert np.all([stream.flush() == ""])
