"""Logits of a whole batch at once, for verification, evaluation and anything that needs no sampling."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from qlx.errors import InputRefused
from qlx.runtime.adapters import AdapterChoice
from qlx.runtime.decoder import CausalDecoder
from qlx.runtime.devices import Device
from qlx.runtime.session import OnnxModel, opened

__all__ = ["OnnxPredictor"]

Array = NDArray[Any]


class OnnxPredictor:
    """An ONNX checkpoint as a function from model inputs to logits.

    Args:
        directory: a checkpoint of kind `onnx`, or a model that `open_model` returned.
        threads, device: see `open_model`.
        adapter: which of its swappable adapters to use, None for the base; a list names one, or None, for
            each row of every batch.

    Raises:
        UsageError: there is no such adapter; the message lists those there are.
    """

    def __init__(
        self,
        directory: Path | str | OnnxModel,
        threads: int | None = None,
        adapter: AdapterChoice = None,
        device: Device = "cpu",
    ) -> None:
        self.model = opened(directory, threads, device)
        self._adapter = self.model.adapters.choose(adapter)

    @property
    def rows(self) -> int | None:
        """The size of every batch, where its rows have adapters of their own; else None."""
        return self._adapter.rows

    def with_adapter(self, adapter: AdapterChoice) -> "OnnxPredictor":
        """The same session with another adapter."""
        return OnnxPredictor(self.model, adapter=adapter)

    def predict(self, inputs: Mapping[str, Array]) -> Array:
        """Logits for a batch.

        Args:
            inputs: `pixel_values` float32 [n, 3 · frames, H, W]; or `input_ids` int64 [n, T] and, if anything is
                padded, `attention_mask` int64 [n, T] (padding on either side).

        Returns:
            float32 [n, classes], [n, K, h, w], or [n, T, vocabulary] (meaningless where the mask is 0).

        Raises:
            InputRefused: an input is missing or has the wrong shape.
            UsageError: adapters are named for another number of rows.
        """
        if self.model.task != "causal-lm":
            return self._look(_named(inputs, "pixel_values", 4))
        tokens = _named(inputs, "input_ids", 2)
        mask = inputs.get("attention_mask")
        if mask is not None and mask.shape != tokens.shape:
            raise InputRefused(
                f"attention_mask has shape {mask.shape}, input_ids has {tokens.shape}; they must agree"
            )
        return CausalDecoder(self.model, tokens.shape[0], self._adapter).feed(tokens, mask)

    def _look(self, pixels: Array) -> Array:
        wanted = self.model.shapes["pixel_values"][1:]
        if list(pixels.shape[1:]) != wanted:
            raise InputRefused(
                f"pixel_values has shape {pixels.shape}, the model takes [n, "
                f"{', '.join(map(str, wanted))}]"
            )
        name = "heatmaps" if self.model.task == "heatmap" else "logits"
        images = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(pixels, np.float32))
        inputs = {"pixel_values": images, **self._adapter.for_batch(len(pixels))}
        (logits,) = self.model.run([name], inputs)
        return np.asarray(logits.numpy(), np.float32)


def _named(inputs: Mapping[str, Array], name: str, axes: int) -> Array:
    if name not in inputs:
        raise InputRefused(
            f"the model needs an input {name!r}; given: {', '.join(sorted(inputs)) or 'none'}"
        )
    if inputs[name].ndim != axes or not inputs[name].size:
        raise InputRefused(
            f"input {name!r} has shape {inputs[name].shape}; "
            f"{axes} axes and at least one element are needed"
        )
    return inputs[name]
