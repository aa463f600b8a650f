"""Keys and values of a sequence batch between the runs of a causal LM's graph.

A graph of onnxruntime's fused attention appends to a buffer in place: `SharedCache` gives it one of fixed size
for input and output, so that a step copies nothing. Any other graph returns its cache as new tensors, which
`ReturnedCache` hands back.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from qlx.runtime.devices import Device
from qlx.runtime.session import OnnxModel

__all__ = ["Cache", "ReturnedCache", "SharedCache"]

Array = NDArray[Any]
Values = Mapping[str, ort.OrtValue]

_ROOM = 256
"""Tokens beyond those at hand that a new buffer has room for."""


class Cache(Protocol):
    """One sequence batch's keys and values."""

    def run(self, feeds: Mapping[str, Array], adapter: Values, total: int) -> Array:
        """Run the graph; `total` is how many tokens the cache holds afterwards.

        Returns:
            The logits float32 [B, T, vocabulary], an array of the caller's own.
        """
        ...


class ReturnedCache:
    """Cache tensors that each run returns, one token longer or more, and the next takes.

    Args:
        model: its graph's first output is the logits, the others are the cache, which stays on the model's device.
        layers: (heads, head size) by name of the cache input.
        batch: number of sequences.
    """

    def __init__(self, model: OnnxModel, layers: Mapping[str, tuple[int, int]], batch: int) -> None:
        self._model = model
        self._outputs = model.outputs
        self._held = {name: _value(_empty(batch, size, 0)) for name, size in layers.items()}

    def run(self, feeds: Mapping[str, Array], adapter: Values, total: int) -> Array:
        """See `Cache`."""
        values = {name: _value(array) for name, array in feeds.items()}
        inputs = {**values, **adapter, **self._held}
        logits, *present = self._model.run(self._outputs, inputs, stay=self._outputs[1:])
        self._held = dict(zip(self._held, present, strict=True))
        return np.asarray(logits.numpy(), np.float32)


class SharedCache:
    """Buffers with room to grow, which the graph reads and appends to in place.

    They are replaced by larger ones, at least twice the size, when a run would not fit.

    Args:
        model: its graph's attention takes past and present as one buffer, which lies on the model's device.
        layers: (heads, head size) by name of the cache input.
        batch: number of sequences.
    """

    def __init__(self, model: OnnxModel, layers: Mapping[str, tuple[int, int]], batch: int) -> None:
        self._session, self._device = model.session, model.device
        self._binding = model.session.io_binding()
        self._layers, self._batch = layers, batch
        self._buffers: dict[str, ort.OrtValue] = {}
        self._adapter: Values = {}
        self._bound: dict[str, Array] = {}
        self._logits = np.empty(0, np.float32)
        self._vocabulary = int(model.session.get_outputs()[0].shape[-1])
        self._room = 0

    def run(self, feeds: Mapping[str, Array], adapter: Values, total: int) -> Array:
        """See `Cache`. A step binds what changed and no more: threads that wait for it fall asleep."""
        if total > self._room:
            self._grow(max(total + _ROOM, 2 * self._room))
        if adapter is not self._adapter:
            for name, value in adapter.items():
                self._binding.bind_ortvalue_input(name, value)
            self._adapter = adapter
        for name, array in feeds.items():
            # What is bound to another device was copied there: the array may hold other numbers by now.
            if self._device != "cpu" or self._bound.get(name) is not array:
                self._binding.bind_cpu_input(name, array)
                self._bound[name] = array
        shape = (*feeds["input_ids"].shape, self._vocabulary)
        if self._logits.shape != shape:
            self._logits = np.empty(shape, np.float32)
            self._binding.bind_ortvalue_output("logits", _value(self._logits))
        self._session.run_with_iobinding(self._binding)
        return self._logits.copy()

    def _grow(self, room: int) -> None:
        self._binding.clear_binding_outputs()
        self._logits = np.empty(0, np.float32)
        for name, size in self._layers.items():
            wider = _empty(self._batch, size, room)
            if self._room:
                wider[:, :, : self._room] = self._buffers[name].numpy()
            self._buffers[name] = value = _value(wider, self._device)
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        self._room = room


def _empty(batch: int, size: tuple[int, int], length: int) -> Array:
    heads, width = size
    return np.zeros((batch, heads, length, width), np.float32)


def _value(array: Array, device: Device = "cpu") -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_numpy(array, device, 0)
