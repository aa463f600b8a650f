"""One of two checkpoints that are compared: opened, identified, and run when asked."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np

from qlx.checkpoint import Checkpoint, Source
from qlx.verification.base import needs_base
from qlx.verification.identity import identity_checks, quantization_checks
from qlx.verification.metrics import Array
from qlx.verification.replay import Predictor, predictor_of
from qlx.verification.report import display_name
from qlx.verification.thresholds import Check

__all__ = ["Side"]


class Side:
    """A checkpoint, what was checked of it, the base it runs on, and the engine that runs it.

    Args:
        checkpoint: opened, so its files are whole.
        base: used by an adapter only; see `base_of`.
    """

    def __init__(self, checkpoint: Checkpoint, base: Source | str | Path | None) -> None:
        self.checkpoint = checkpoint
        self.manifest = checkpoint.manifest
        self.name = display_name(checkpoint)
        own = base if needs_base(checkpoint.manifest) else None
        self.identity, self.source = identity_checks(checkpoint, own)

    @property
    def in_torch(self) -> bool:
        """Whether torch runs it, so that its layers can be looked at."""
        return self.manifest.kind != "onnx"

    @cached_property
    def predictor(self) -> Predictor:
        """Its engine, loaded when first asked for."""
        return predictor_of(self.checkpoint, self.source)

    def release(self) -> None:
        """Let go of the engine; it is loaded again when asked for."""
        self.__dict__.pop("predictor", None)

    def outputs(self, inputs: Mapping[str, Array]) -> Array:
        """Its logits, f32."""
        return np.asarray(self.predictor.predict(inputs), dtype=np.float32)

    def checks(self) -> list[Check]:
        """Everything that opening and running it has shown, under its name."""
        found = [*self.identity, *quantization_checks(self.manifest)]
        return [Check(f"{self.name}: {check.name}", check.passed, check.detail) for check in found]
