"""Logits of a torch model for prepared inputs."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qlx.checkpoint import Task
from qlx.errors import InputRefused

__all__ = ["TorchPredictor", "device_of", "forward_logits"]

_ROWS = 16
_INPUTS = {
    "image-classification": ("pixel_values",),
    "heatmap": ("pixel_values",),
    "causal-lm": ("input_ids", "attention_mask"),
}


def forward_logits(
    model: nn.Module, task: Task, inputs: Mapping[str, NDArray[Any]]
) -> NDArray[np.float32]:
    """Logits float32 [n, classes], [n, T, vocabulary] or [n, K, h, w], at most 16 rows at a time, in eval mode.

    The model is left in the mode (training or evaluation) it was in.

    Raises:
        InputRefused: an input is missing.
    """
    missing = [name for name in _INPUTS[task][:1] if name not in inputs]
    if missing:
        raise InputRefused(
            f"the model needs an input {missing[0]!r}; given: {', '.join(sorted(inputs)) or 'none'}"
        )
    device = device_of(model)
    options = {"use_cache": False} if task == "causal-lm" else {}
    names = [name for name in _INPUTS[task] if name in inputs]
    was_training = model.training
    model.eval()
    pieces = []
    try:
        with (
            torch.no_grad()
        ):  # inference_mode's tensors do not outlive it, as a sharded model's must
            for start in range(0, len(inputs[names[0]]), _ROWS):
                batch = {
                    name: _tensor(model, inputs[name][start : start + _ROWS], device)
                    for name in names
                }
                result = model(**batch, **options)
                logits = result.heatmaps if task == "heatmap" else result.logits
                pieces.append(logits.float().cpu().numpy())
    finally:
        model.train(was_training)
    return np.concatenate(pieces)


def device_of(model: nn.Module) -> torch.device:
    """Where the model computes: where an adapter is, if the weights come to the layers as they run, or the CPU."""
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def _tensor(model: nn.Module, array: NDArray[Any], device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array)).to(device)
    return tensor.to(_float_dtype(model)) if tensor.is_floating_point() else tensor


def _float_dtype(model: nn.Module) -> torch.dtype:
    """The dtype images must have: that of the first floating-point parameter that is no adapter's."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and "lora_" not in name:
            return parameter.dtype
    return torch.float32


class TorchPredictor:
    """A torch model as a function from model inputs (arrays) to logits (float32 arrays)."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        self.model = model
        self.task = task

    def predict(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Logits for a batch, as `forward_logits` gives them."""
        return forward_logits(self.model, self.task, inputs)
