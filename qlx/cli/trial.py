"""An adapter tried on its base: attached, replayed on its probe, and asked once by hand.

Works through the same predictor as verification, so what is seen here is what is verified there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qlx.checkpoint import Checkpoint
from qlx.errors import UsageError
from qlx.inputs import ImagePreprocessor, TextCodec, open_image
from qlx.merging import adapter_checkpoint
from qlx.verification import (
    Check,
    Comparison,
    Predictor,
    base_of,
    predictor_of,
    probe_of,
    verify_outputs,
)
from qlx.verification.metrics import log_softmax

MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Trial:
    """What came of it: the adapter, its distance from training's outputs, the answer if asked."""

    adapter: Checkpoint
    comparisons: Mapping[str, Comparison]
    checks: tuple[Check, ...]
    answer: str | None

    @property
    def passed(self) -> bool:
        """Whether the adapter still computes what training saw."""
        return bool(self.checks) and all(check.passed for check in self.checks)


def try_adapter(
    directory: Path, base: str, *, prompt: str | None = None, image: Path | None = None
) -> Trial:
    """Load `directory` (qlx or plain PEFT) onto `base` and run it.

    Raises:
        Mismatch: the base is not the one that the adapter was trained on.
        UsageError: a prompt for an image model, or an image for a language model.
    """
    with adapter_checkpoint(directory, base) as (adapter, _):
        task = adapter.manifest.task
        wrong = image if task == "causal-lm" else prompt
        if wrong is not None:
            raise UsageError(
                f"{directory}: a model for {task}; give --prompt to a language model, --input to an image model"
            )
        predictor = predictor_of(adapter, base_of(adapter, base))
        probe = probe_of(adapter)
        outputs = np.asarray(predictor.predict(probe.inputs), np.float32)
        comparisons, checks = verify_outputs(adapter.manifest, probe, outputs)
        answer = None
        if prompt is not None:
            answer = complete(predictor, TextCodec.from_directory(adapter.path), prompt)
        elif image is not None:
            answer = classify(predictor, adapter.path, image)
        return Trial(
            Checkpoint(directory, adapter.manifest, adapter.digest),
            comparisons,
            tuple(checks),
            answer,
        )


def complete(predictor: Predictor, codec: TextCodec, prompt: str) -> str:
    """The likeliest continuation of `prompt`, up to the end token or `MAX_NEW_TOKENS`."""
    ids = list(codec.tokenizer.encode(prompt).ids)
    start = len(ids)
    while len(ids) - start < MAX_NEW_TOKENS:
        tokens = np.array([ids], np.int64)
        logits = predictor.predict({"input_ids": tokens, "attention_mask": np.ones_like(tokens)})
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == codec.end_id:
            break
    return codec.decode(ids[start:])


def classify(predictor: Predictor, directory: Path, image: Path) -> str:
    """The likeliest label of an image file, with its probability."""
    from qlx.models import read_config

    pixels = ImagePreprocessor.from_directory(directory)([open_image(image)])
    chances = np.exp(log_softmax(predictor.predict({"pixel_values": pixels})))[0]
    best = int(chances.argmax())
    label = read_config(directory)["id2label"][str(best)]
    return f"{label} ({chances[best]:.1%})"
