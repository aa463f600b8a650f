"""Finding places with an ONNX checkpoint: frames in, where each keypoint is out, in the frame's own pixels."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qlx.errors import CorruptCheckpoint, InputRefused
from qlx.inputs import DETECTED, ImagePreprocessor, as_image, find_peaks, rescaled
from qlx.runtime.adapters import AdapterChoice
from qlx.runtime.classify import LogitsPredictor, class_labels, whole_calls
from qlx.runtime.devices import Device
from qlx.runtime.predictor import OnnxPredictor
from qlx.runtime.session import OnnxModel, opened

__all__ = ["KeypointModel", "Location", "Locator"]

_BATCH = 8


@dataclass(frozen=True)
class Location:
    """Where one keypoint is: x and y in pixels of the frame as given (0, 0 is the first pixel's centre).

    `score` is the probability of the heatmap's highest cell; `found` says whether it is at least ½, below
    which the place means nothing.
    """

    name: str
    x: float
    y: float
    score: float

    @property
    def found(self) -> bool:
        """Whether the model says that the keypoint is in the frame at all."""
        return self.score >= DETECTED


class KeypointModel:
    """Anything that finds places: preprocessing, a predictor and the names of its heatmaps.

    `batch` is how many clips are looked at together at most.
    """

    batch = _BATCH

    def __init__(
        self, preprocess: ImagePreprocessor, predictor: LogitsPredictor, names: Sequence[str]
    ) -> None:
        self.preprocess = preprocess
        self.predictor = predictor
        self.names = tuple(names)

    @property
    def frames(self) -> int:
        """How many consecutive frames the model sees at once."""
        return self.preprocess.frames

    def locate(self, clips: Sequence[Any]) -> list[list[Location]]:
        """Find every keypoint in each of `clips`, one `Location` per heatmap.

        A clip is an image (a path, a Pillow image or a uint8 array [H, W, 3] or [H, W] of any size) or, for a
        model of several frames, a sequence of so many, the latest, whose places are asked for, last. A single
        image stands for all of them: nothing has moved.

        Raises:
            InputRefused: not images, or another number of them.
        """
        found: list[list[Location]] = []
        for start in range(0, len(clips), self.batch):
            batch = [_frames(clip) for clip in clips[start : start + self.batch]]
            heatmaps = self.predictor.predict({"pixel_values": self.preprocess(batch)})
            sizes = [clip[-1].size for clip in batch]
            found += [self._places(*pair) for pair in zip(heatmaps, sizes, strict=True)]
        return found

    def _places(self, heatmaps: Any, size: tuple[int, int]) -> list[Location]:
        if len(self.names) != len(heatmaps):
            raise CorruptCheckpoint(
                f"config.json names {len(self.names)} keypoints, the graph makes {len(heatmaps)} heatmaps"
            )
        cells, scores = find_peaks(heatmaps)
        grid = np.array([heatmaps.shape[-1], heatmaps.shape[-2]])
        places = rescaled(cells, grid, np.array(size))
        return [
            Location(name, float(x), float(y), float(score))
            for name, (x, y), score in zip(self.names, places, scores, strict=True)
        ]


def _frames(clip: Any) -> list[Any]:
    frames = list(clip) if isinstance(clip, list | tuple) else [clip]
    if not frames:
        raise InputRefused("there is no frame to look at")
    return [as_image(frame) for frame in frames]


class Locator(KeypointModel):
    """A model of keypoints in ONNX.

    Args:
        directory: a checkpoint of kind `onnx` and task `heatmap`, or an opened model.
        threads, device: see `open_model`.
        adapter: which of its swappable adapters to use, None for the base; or a list of these, one for
            each clip of a call.

    Raises:
        InputRefused: a checkpoint of another kind or task.
        CorruptCheckpoint: names or preprocessing are missing.
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
        if model.task != "heatmap":
            raise InputRefused(f"{model.path}: a model for {model.task} does not find places")
        prepare = ImagePreprocessor.from_directory(model.path)
        predictor = OnnxPredictor(model, adapter=adapter)
        super().__init__(prepare, predictor, class_labels(model.path))
        self.model, self.batch = model, whole_calls(predictor, _BATCH)

    def with_adapter(self, adapter: AdapterChoice) -> "Locator":
        """The same model with another adapter; it shares the session and costs next to nothing."""
        other = copy(self)
        other.predictor = self.predictor.with_adapter(adapter)
        other.batch = whole_calls(other.predictor, _BATCH)
        return other
