"""Task metrics from logits and labels: accuracy of a classifier; loss, perplexity and accuracy per token.

Those of heatmaps are counted in `keypoint_scores`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlx.errors import InputRefused
from qlx.inputs.keypoint_scores import KeypointScore
from qlx.inputs.text import IGNORED

__all__ = ["Score", "log_softmax", "negative_log_likelihood"]

_ROWS = 256


def log_softmax(rows: NDArray[Any]) -> NDArray[np.float64]:
    """The logarithm of softmax over the last axis, in float64, shifted by the maximum."""
    shifted = rows.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def negative_log_likelihood(logits: NDArray[Any], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """-log softmax(logits)[label] in float64; logits [rows, classes], labels [rows]."""
    losses = np.empty(len(labels))
    for start in range(0, len(labels), _ROWS):
        block = log_softmax(logits[start : start + _ROWS])
        chosen = np.take_along_axis(block, labels[start : start + _ROWS, None], axis=-1)[:, 0]
        losses[start : start + _ROWS] = -chosen
    return losses


@dataclass
class Score:
    """Adds up a task's metrics over batches, as float64 sums."""

    task: str
    count: int = 0
    loss: float = 0.0
    correct: int = 0
    keypoints: KeypointScore = field(default_factory=KeypointScore)

    def add(self, logits: NDArray[Any], labels: NDArray[Any]) -> None:
        """Count a batch: logits [n, classes] with labels [n], [n, T, V] with [n, T], [n, K, h, w] with [n, K, 5].

        Labels of a language model stand at their own token's place, as transformers takes them; the
        logits at t are scored against the label at t + 1.
        """
        if self.task == "heatmap":
            self.keypoints.add(logits, labels)
            self.count = self.keypoints.count
            return
        if self.task == "causal-lm":
            logits, labels = logits[:, :-1], labels[:, 1:]
        kept = labels != IGNORED
        rows, targets = logits[kept], labels[kept]
        if not len(targets):
            return
        self.count += len(targets)
        self.loss += float(negative_log_likelihood(rows, targets).sum())
        self.correct += int((rows.argmax(axis=-1) == targets).sum())

    def content(self) -> dict[str, Any]:
        """The sums as JSON values, for `add_content` in another process."""
        own = {"count": self.count, "loss": self.loss, "correct": self.correct}
        return own | {"keypoints": self.keypoints.content()}

    def add_content(self, content: Mapping[str, Any]) -> None:
        """Add the sums of other batches."""
        self.count += content["count"]
        self.loss += content["loss"]
        self.correct += content["correct"]
        self.keypoints.add_content(content["keypoints"])

    def metrics(self) -> dict[str, float]:
        """`accuracy` and `loss`, or `loss`, `perplexity` and `token_accuracy` (losses in nats), or those of keypoints.

        Raises:
            InputRefused: nothing was counted.
        """
        if not self.count:
            raise InputRefused("the evaluation data hold nothing to predict")
        if self.task == "heatmap":
            return self.keypoints.metrics()
        loss, accuracy = self.loss / self.count, self.correct / self.count
        if self.task == "causal-lm":
            return {
                "loss": loss,
                "perplexity": math.exp(min(loss, 700.0)),
                "token_accuracy": accuracy,
            }
        return {"accuracy": accuracy, "loss": loss}
