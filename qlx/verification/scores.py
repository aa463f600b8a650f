"""Task scores of logits against labels: accuracy for images; loss, perplexity, accuracy for tokens.

Scores are sums until the end (`Tally`), so that batches of any size add up to the same result.
"""

import math
from dataclasses import dataclass

import numpy as np

from qlx.errors import CheckFailed, Mismatch
from qlx.verification.metrics import Array, log_softmax

__all__ = ["IGNORED", "Tally", "tally_images", "tally_tokens"]

IGNORED = -100
"""The label of a position where there is nothing to predict."""


@dataclass(frozen=True)
class Tally:
    """Sums over labelled positions: how many, how many were right, total loss in nats."""

    count: int = 0
    right: int = 0
    loss: float = 0.0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.count + other.count, self.right + other.right, self.loss + other.loss)

    def metrics(self, task: str) -> dict[str, float]:
        """The task's metrics by name.

        Raises:
            Mismatch: nothing was labelled.
            CheckFailed: the loss is not finite.
        """
        if not self.count:
            raise Mismatch("the evaluation data holds nothing to predict")
        loss, accuracy = self.loss / self.count, self.right / self.count
        if not math.isfinite(loss):
            raise CheckFailed("the loss on the evaluation data is not finite; the model is broken")
        if task == "image-classification":
            return {"accuracy": accuracy, "loss": loss}
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "token_accuracy": accuracy}


def tally_images(logits: Array, labels: Array) -> Tally:
    """Score logits `[n, classes]` against labels i64 `[n]`."""
    return _tally(logits, labels)


def tally_tokens(logits: Array, labels: Array) -> Tally:
    """Score logits `[n, T, V]` against labels i64 `[n, T]`: position t predicts label t + 1."""
    return _tally(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))


def _tally(rows: Array, labels: Array) -> Tally:
    wanted = labels != IGNORED
    rows, labels = rows[wanted], labels[wanted]
    if not len(labels):
        return Tally()
    loss = -log_softmax(rows)[np.arange(len(labels)), labels].sum()
    return Tally(len(labels), int((rows.argmax(axis=1) == labels).sum()), float(loss))
