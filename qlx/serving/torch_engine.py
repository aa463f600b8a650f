"""Serving checkpoints that are not ONNX, in torch. Imported only when such a checkpoint is served."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qlx.checkpoint import Checkpoint
from qlx.inputs import ImagePreprocessor, TextCodec
from qlx.models import TorchPredictor, load_model
from qlx.runtime import ImageModel, TextModel, class_labels, generation_limits
from qlx.serving.engine import LoadedEngine
from qlx.verification import base_of

__all__ = ["TorchDecoder", "torch_engine"]

Array = NDArray[Any]


class TorchDecoder:
    """One sequence being decoded by a transformers model; the cache stays in torch."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._cache: Any = None

    def feed(self, tokens: Array) -> Array:
        """Append tokens int64 [1, T]; logits float32 [1, T, vocabulary] of those positions."""
        with torch.inference_mode():
            ids = torch.from_numpy(np.ascontiguousarray(tokens, np.int64))
            result = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True)
        self._cache = result.past_key_values
        logits: Array = result.logits.float().cpu().numpy()
        return logits


def torch_engine(checkpoint: Checkpoint, name: str, base: Any, threads: int | None) -> LoadedEngine:
    """Load a run, adapter, merged or packed checkpoint.

    Raises:
        Mismatch: the base is not the one the adapter was trained on.
        InputRefused: the base is missing.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    manifest, path = checkpoint.manifest, checkpoint.path
    model: Any = load_model(checkpoint, base_of(checkpoint, base)).eval()
    if manifest.task == "image-classification":
        predictor = TorchPredictor(model, manifest.task)
        prepare = ImagePreprocessor.from_directory(path)
        return LoadedEngine(name, manifest, ImageModel(prepare, predictor, class_labels(path)))
    length, ends = generation_limits(model.config, model.generation_config)
    text = TextModel(TextCodec.from_directory(path), length, ends, lambda: TorchDecoder(model))
    return LoadedEngine(name, manifest, text=text)
