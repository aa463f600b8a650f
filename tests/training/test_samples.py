"""What the report shows of single examples."""

import numpy as np
import pytest
import torch
from PIL import Image

from qlx.inputs import TextCodec, TextExample, TextSplit
from qlx.models import load_base
from qlx.training.samples import _tint, greedy, text_samples


def test_answers_are_the_likeliest_tokens_and_prompts_are_cut_to_the_room_there_is(python_base):
    model, codec = load_base(python_base, "causal-lm").eval(), TextCodec.from_directory(python_base)
    fed = []
    model.register_forward_pre_hook(
        lambda _, __, given: fed.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    text = TextExample(completion="for i in range")
    prompt = codec.encode(text, 64, completion_only=False)[0][:-1]  # without the end
    answer, ids = greedy(model, prompt, codec, 8), list(prompt)
    with torch.inference_mode():
        for token in answer:
            assert (
                int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
                == token
            )
            ids.append(token)
    assert len(answer) == 8 > len(set(answer)) > 3
    long = TextSplit((TextExample(prompt="def add(a, b):\n" * 100, completion="    return"),))
    for longest, most in ((1000, 96), (50, 50)):
        fed.clear()
        assert len(text_samples(model, codec, long, longest)) == 1
        assert max(fed) == most


@pytest.mark.parametrize("sure", [True, False])
def test_a_picture_is_coloured_where_the_model_sees_something(sure):
    picture = Image.new("RGB", (80, 48), (40, 40, 40))
    logits = np.full((2, 6, 10), -20, np.float32)
    if sure:
        logits[1, 2, 7] = 20
    _tint(picture, logits)
    pixels = np.asarray(picture).astype(int)
    at = pixels[20, 60]  # the middle of that cell
    assert bool(at[0] > 150 and at[2] > 120 and at[1] < 80) is sure
    assert (pixels[:, :40] == 40).all()
