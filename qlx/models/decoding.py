"""Decoding with a torch model, one sequence at a time, as `qlx.runtime.TextModel` drives it."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qlx.models.predict import device_of

__all__ = ["TorchDecoder"]

Array = NDArray[Any]


class TorchDecoder:
    """One sequence being decoded by a transformers model; the cache stays in torch."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._cache: Any = None

    def feed(self, tokens: Array) -> Array:
        """Append tokens int64 [1, T]; logits float32 [1, T, vocabulary] of those positions."""
        device = device_of(self._model)
        with torch.inference_mode():
            ids = torch.from_numpy(np.ascontiguousarray(tokens, np.int64)).to(device)
            result = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True)
        self._cache = result.past_key_values
        logits: Array = result.logits.float().cpu().numpy()
        return logits
