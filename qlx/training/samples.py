"""Held-out inputs with the answers before and after training, for the report."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qlx.checkpoint import Probe
from qlx.errors import require
from qlx.inputs import (
    ABSENT,
    DETECTED,
    TOLERANCE,
    ImageSplit,
    KeypointSplit,
    TextCodec,
    TextSplit,
    find_peaks,
    open_image,
    rescaled,
)
from qlx.models import device_of
from qlx.training.report import Sample

__all__ = ["greedy", "image_samples", "keypoint_samples", "text_samples"]

_IMAGES = 12
_TEXTS = 6
_NEW_TOKENS = 32
_SIDE = 160
_WIDE = 420
_TINT = 0.7  # opacity of a certain place
_TRUE, _BEFORE, _AFTER = "#30e070", "#ffb000", "#ff2fd0"


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


def keypoint_samples(split: KeypointSplit, items: Sequence[int], probe: Probe) -> list[Sample]:
    """The probe's frames with the true place (circle) and the model's (crosses), its adapter off and on."""
    assert probe.labels is not None
    answers = [
        None if probe.base is None else _found(probe.base, probe),
        _found(probe.reference, probe),
    ]
    samples = []
    for row, at in list(enumerate(items))[:_IMAGES]:
        true = [tuple(label[:2]) if label[2] != ABSENT else None for label in probe.labels[row]]
        before, after = (None if places is None else places[row] for places in answers)
        samples.append(
            Sample(
                expected=_places(true),
                before="" if before is None else _places(before, true),
                after=_places(after or [], true),
                picture=_overlay(
                    split.frames[at][-1], probe.reference[row], true, before or [], after or []
                ),
                right=(_near(before or [], true), _near(after or [], true)),
                drawn=True,
            )
        )
    return samples


Place = tuple[float, float] | None


def _found(logits: Any, probe: Probe) -> list[list[Place]]:
    """Places in pixels of the frame for each row and keypoint, None where nothing is detected."""
    assert probe.labels is not None
    cells, scores = find_peaks(logits)
    grid = np.array([logits.shape[-1], logits.shape[-2]])
    places = rescaled(cells, grid, probe.labels[..., 3:5])
    return [
        [
            (float(x), float(y)) if score >= DETECTED else None
            for (x, y), score in zip(*row, strict=True)
        ]
        for row in zip(places, scores, strict=True)
    ]


def _near(found: Sequence[Place], true: Sequence[Place]) -> bool:
    """Whether every keypoint is found within the tolerance, and none that is not there."""
    pairs = list(zip(found, true, strict=False))
    return len(pairs) == len(true) and all(
        place is wanted is None or (place and wanted and math.dist(place, wanted) <= TOLERANCE)
        for place, wanted in pairs
    )


def _places(found: Sequence[Place], true: Sequence[Place] = ()) -> str:
    """Places as text, with their distance from the true ones where both are known."""
    words = []
    for at, place in enumerate(found):
        wanted = true[at] if true else None
        away = f" ({math.dist(place, wanted):.1f} px off)" if place and wanted else ""
        words.append(f"{place[0]:.1f}, {place[1]:.1f}{away}" if place else "none")
    return "; ".join(words)


def _overlay(
    file: Path,
    logits: NDArray[np.float32],
    true: Sequence[Place],
    before: Sequence[Place],
    after: Sequence[Place],
) -> bytes:
    """The frame as a PNG under its heatmaps: a circle around what is true, crosses over what was and is found.

    `logits` are the heatmaps `[K, h, w]` after training.
    """
    draw = require("PIL.ImageDraw", "train")
    picture = open_image(file)
    scale = _WIDE / picture.width
    picture = picture.resize((_WIDE, round(picture.height * scale)))
    _tint(picture, logits)
    pen = draw.Draw(picture)
    for colour, places, mark in ((_TRUE, true, "o"), (_BEFORE, before, "x"), (_AFTER, after, "x")):
        for place in filter(None, places):
            x, y = ((value + 0.5) * scale for value in place)
            if mark == "o":
                pen.ellipse((x - 9, y - 9, x + 9, y + 9), outline=colour, width=2)
            else:
                pen.line((x - 6, y - 6, x + 6, y + 6), fill=colour, width=2)
                pen.line((x - 6, y + 6, x + 6, y - 6), fill=colour, width=2)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def _tint(picture: Any, logits: NDArray[np.float32]) -> None:
    """Colour a picture where the heatmaps `[K, h, w]` say that something is, the more the surer."""
    pillow = require("PIL.Image", "train")
    probability = 1 / (1 + np.exp(-logits.max(axis=0).astype(np.float64)))
    shade = pillow.fromarray(np.uint8(_TINT * 255 * probability))
    shade = shade.resize(picture.size, pillow.Resampling.BILINEAR)
    picture.paste(_AFTER, (0, 0), shade)


def _thumbnail(image: Any) -> bytes:
    pillow = require("PIL.Image", "train")
    picture = pillow.fromarray(image) if isinstance(image, np.ndarray) else open_image(image)
    picture.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def text_samples(model: Any, codec: TextCodec, split: TextSplit, longest: int) -> list[Sample]:
    """The first held-out prompts with greedy answers, the adapter off and on; none for plain texts.

    Of a prompt of more than `longest` tokens, or more than the model has room for, the end is given.
    """
    chosen = [example for example in split.examples if example.prompt or example.messages][:_TEXTS]
    positions = getattr(model.config, "max_position_embeddings", None) or longest + _NEW_TOKENS
    room = max(1, min(longest, positions - _NEW_TOKENS))
    samples = []
    for example in chosen:
        prompt, completion = codec.parts(example)
        prompt = prompt[-room:]
        before = ""
        if hasattr(model, "disable_adapter"):
            with model.disable_adapter():
                before = codec.decode(greedy(model, prompt, codec, _NEW_TOKENS)).strip()
        after = codec.decode(greedy(model, prompt, codec, _NEW_TOKENS)).strip()
        asked = (
            example.messages[-2]["content"] if len(example.messages) > 1 else example.prompt or ""
        )
        samples.append(Sample(codec.decode(completion).strip(), before, after, text=asked))
    return samples


def greedy(model: nn.Module, prompt: list[int], codec: TextCodec, count: int) -> list[int]:
    """At most `count` tokens after a prompt, the likeliest each time, up to the end token."""
    device = device_of(model)
    fed, cache, answer = prompt, None, list[int]()
    with torch.inference_mode():
        while len(answer) < count:
            ids = torch.tensor([fed], device=device)
            outputs = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            token = int(outputs.logits[0, -1].argmax())
            if token == codec.end_id:
                break
            answer.append(token)
            fed = [token]
    return answer
