"""Running a checkpoint of any kind on its own probe.

The one place that knows which engine runs which kind: onnxruntime for `onnx`, torch for the rest.
Both engines are imported when they are needed and not before.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from qlx.checkpoint import Checkpoint, Probe, Source, read_probe
from qlx.errors import InputRefused, Mismatch, Unsupported, require
from qlx.verification.metrics import Array

__all__ = ["Predictor", "predictor_of", "probe_of", "replay"]


class Predictor(Protocol):
    """Whatever gives logits: `predict` takes a probe's inputs, returns f32 `[n, C]` or `[n, T, V]`."""

    def predict(self, inputs: Mapping[str, Array]) -> Array:
        """Logits of all inputs."""
        ...


def predictor_of(
    checkpoint: Checkpoint, base: Source | None = None, *, folder: Path | None = None
) -> Predictor:
    """The engine that runs `checkpoint` in fp32 (packed weights in their own codec).

    With `folder` torch leaves the weights on disk, those that it has to quantize in that folder.

    Raises:
        MissingExtra: the engine is not installed.
        Unsupported: an ONNX checkpoint with `folder`.
    """
    if checkpoint.manifest.kind == "onnx":
        if folder is not None:
            raise Unsupported(
                f"{checkpoint.path}: onnxruntime holds its model in memory; leave out --offload"
            )
        require("onnxruntime", "serve")
        from qlx.runtime import OnnxPredictor

        onnx: Predictor = OnnxPredictor(checkpoint.path, adapter=checkpoint.adapter)
        return onnx
    require("torch", "train")
    from qlx.models import TorchPredictor, load_model

    model = load_model(checkpoint, base, folder=folder)
    torch: Predictor = TorchPredictor(model, checkpoint.manifest.task)
    return torch


def probe_of(checkpoint: Checkpoint) -> Probe:
    """The probe a checkpoint carries.

    Raises:
        InputRefused: it carries none.
        Mismatch: the probe belongs to another task.
    """
    record = checkpoint.manifest.probe
    if record is None:
        raise InputRefused(
            f"{checkpoint.path}: carries no probe, so its outputs cannot be checked; compare it with --against"
        )
    probe = read_probe(checkpoint.path / record.file)
    if probe.task != checkpoint.manifest.task:
        raise Mismatch(
            f"{checkpoint.path / record.file}: a probe for {probe.task}, the model is for {checkpoint.manifest.task}"
        )
    return probe


def replay(checkpoint: Checkpoint, base: Source | None = None, probe: Probe | None = None) -> Array:
    """The outputs of `checkpoint` now, f32, on its own probe's inputs (or on those of `probe`)."""
    probe = probe or probe_of(checkpoint)
    return np.asarray(predictor_of(checkpoint, base).predict(probe.inputs), dtype=np.float32)
