"""Held-out inputs with the answers before and after training, for the report."""

import io
from typing import Any

import numpy as np
import torch
from torch import nn

from qlx.checkpoint import Probe
from qlx.errors import require
from qlx.inputs import ImageSplit, TextCodec, TextSplit, open_image
from qlx.training.report import Sample

__all__ = ["greedy", "image_samples", "text_samples"]

_IMAGES = 12
_TEXTS = 6
_NEW_TOKENS = 32
_SIDE = 160


def image_samples(split: ImageSplit, probe: Probe) -> list[Sample]:
    """The probe's images with the labels the model gives them, its adapter off and on."""
    after = probe.reference.argmax(axis=-1)
    before = (
        [""] * len(after)
        if probe.base is None
        else [split.classes[at] for at in probe.base.argmax(axis=-1)]
    )
    return [
        Sample(
            expected=split.classes[int(split.labels[at])],
            before=before[at],
            after=split.classes[int(after[at])],
            picture=_thumbnail(split.images[at]),
        )
        for at in range(min(_IMAGES, len(after)))
    ]


def _thumbnail(image: Any) -> bytes:
    pillow = require("PIL.Image", "train")
    picture = pillow.fromarray(image) if isinstance(image, np.ndarray) else open_image(image)
    picture.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def text_samples(model: Any, codec: TextCodec, split: TextSplit) -> list[Sample]:
    """The first held-out prompts with greedy answers, the adapter off and on; none for plain texts."""
    chosen = [example for example in split.examples if example.prompt or example.messages][:_TEXTS]
    samples = []
    for example in chosen:
        prompt, completion = codec.parts(example)
        before = ""
        if hasattr(model, "disable_adapter"):
            with model.disable_adapter():
                before = codec.decode(greedy(model, prompt, codec, _NEW_TOKENS)).strip()
        after = codec.decode(greedy(model, prompt, codec, _NEW_TOKENS)).strip()
        asked = example.messages[-2]["content"] if len(example.messages) > 1 else example.prompt
        samples.append(Sample(codec.decode(completion).strip(), before, after, text=asked))
    return samples


def greedy(model: nn.Module, prompt: list[int], codec: TextCodec, count: int) -> list[int]:
    """At most `count` tokens after a prompt, the likeliest each time, up to the end token."""
    device = next(model.parameters()).device
    ids = list(prompt)
    with torch.inference_mode():
        while len(ids) < len(prompt) + count:
            logits = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits
            token = int(logits[0, -1].argmax())
            if token == codec.end_id:
                break
            ids.append(token)
    return ids[len(prompt) :]
