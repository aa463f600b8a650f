"""Image classification with an ONNX checkpoint: images in, labels with probabilities out."""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from sys import maxsize
from typing import Any, Protocol

import numpy as np

from qlx.checkpoint import load_object
from qlx.errors import CorruptCheckpoint, InputRefused
from qlx.inputs import ImagePreprocessor
from qlx.runtime.adapters import AdapterChoice
from qlx.runtime.devices import Device
from qlx.runtime.predictor import OnnxPredictor
from qlx.runtime.session import OnnxModel, opened

__all__ = [
    "Classification",
    "Classifier",
    "ImageModel",
    "LogitsPredictor",
    "class_labels",
    "classification",
    "whole_calls",
]

_BATCH = 32


@dataclass(frozen=True)
class Classification:
    """One image's result: the likeliest label and every label's probability, in the model's order."""

    label: str
    probability: float
    probabilities: dict[str, float]


class LogitsPredictor(Protocol):
    """Whatever turns prepared inputs into logits."""

    def predict(self, inputs: Mapping[str, Any]) -> Any:
        """`pixel_values` float32 [n, 3, H, W] to logits [n, classes]."""
        ...


class ImageModel:
    """Anything that classifies images: preprocessing, a predictor and the labels of its outputs.

    `batch` is how many images are looked at together at most.
    """

    batch = _BATCH

    def __init__(
        self, preprocess: ImagePreprocessor, predictor: LogitsPredictor, labels: Sequence[str]
    ) -> None:
        self.preprocess = preprocess
        self.predictor = predictor
        self.labels = tuple(labels)

    def classify(self, images: Sequence[Any]) -> list[Classification]:
        """Classify images: Pillow images, or uint8 arrays [H, W, 3] or [H, W], of any size."""
        results: list[Classification] = []
        for start in range(0, len(images), self.batch):
            pixels = self.preprocess(images[start : start + self.batch])
            logits = self.predictor.predict({"pixel_values": pixels})
            results += [classification(row, self.labels) for row in logits]
        return results


class Classifier(ImageModel):
    """An image classifier in ONNX.

    Args:
        directory: a checkpoint of kind `onnx` and task `image-classification`, or an opened model.
        threads, device: see `open_model`.
        adapter: which of its swappable adapters to use, None for the base; or a list of these, one for
            each image of a call.

    Raises:
        InputRefused: a checkpoint of another kind or task.
        CorruptCheckpoint: labels or preprocessing are missing or do not fit the graph.
        UsageError: there is no such adapter; the message lists those there are.
    """

    predictor: OnnxPredictor

    def __init__(
        self,
        directory: Path | str | OnnxModel,
        threads: int | None = None,
        adapter: AdapterChoice = None,
        device: Device = "cpu",
    ) -> None:
        model = opened(directory, threads, device)
        if model.task != "image-classification":
            raise InputRefused(f"{model.path}: a model for {model.task} does not classify images")
        prepare = ImagePreprocessor.from_directory(model.path)
        predictor = OnnxPredictor(model, adapter=adapter)
        super().__init__(prepare, predictor, class_labels(model.path))
        self.model, self.batch = model, whole_calls(predictor, _BATCH)

    def with_adapter(self, adapter: AdapterChoice) -> "Classifier":
        """The same model with another adapter; it shares the session and costs next to nothing."""
        other = copy(self)
        other.predictor = self.predictor.with_adapter(adapter)
        other.batch = whole_calls(other.predictor, _BATCH)
        return other


def whole_calls(predictor: OnnxPredictor, usual: int) -> int:
    """Most inputs of one run: the usual number, or no limit where adapters are named for each of a call."""
    return usual if predictor.rows is None else maxsize


def classification(logits: Any, labels: Sequence[str]) -> Classification:
    """Softmax over logits [classes] as a result, in float64.

    Raises:
        CorruptCheckpoint: there are more or fewer labels than logits.
    """
    if len(labels) != len(logits):
        raise CorruptCheckpoint(
            f"config.json names {len(labels)} labels, the graph has {len(logits)} outputs"
        )
    weights = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    weights /= weights.sum()
    best = int(np.argmax(weights))
    named = {label: float(weight) for label, weight in zip(labels, weights, strict=True)}
    return Classification(labels[best], float(weights[best]), named)


def class_labels(directory: Path) -> tuple[str, ...]:
    """The labels in class order, from `id2label` of a directory's `config.json`.

    Raises:
        CorruptCheckpoint: missing, not numbered from 0 without gaps, or not unique.
    """
    file = Path(directory) / "config.json"
    named = load_object(file).get("id2label") if file.is_file() else None
    if not isinstance(named, dict) or sorted(named, key=str) != sorted(map(str, range(len(named)))):
        raise CorruptCheckpoint(
            f"{file}: id2label does not number the classes from 0; export the checkpoint again"
        )
    labels = tuple(str(named[str(index)]) for index in range(len(named)))
    if len(set(labels)) != len(labels):
        raise CorruptCheckpoint(f"{file}: id2label gives one name to two classes")
    return labels
