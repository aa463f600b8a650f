"""Held-out examples while a model trains: their scores, the weights that did best, and when to stop."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlx.checkpoint import canonical_json, load_json
from qlx.inputs import Batch, Score
from qlx.models import forward_logits, heatmap_grid
from qlx.recipe import TrainingSection
from qlx.training.distributed import Process
from qlx.training.heatmaps import drawn_target, focal_loss
from qlx.training.job import Job
from qlx.training.material import KeypointMaterial
from qlx.training.state import put_trained, trained_tensors
from qlx.weights import read_tensors, write_tensors

__all__ = ["HeldOut", "Measured", "measure"]

_BEST_FILE, _SEEN_FILE = "best.safetensors", "held_out.json"


@dataclass(frozen=True)
class Measured:
    """Scores of the held-out examples: the task's metrics, and the loss that training lowers."""

    metrics: dict[str, float]
    loss: float

    @property
    def row(self) -> dict[str, float]:
        """As it is logged: every name begins with `eval_`."""
        named = {**self.metrics, "loss": self.loss}
        return {f"eval_{name}": value for name, value in named.items()}


def measure(job: Job, process: Process, *, sharded: bool = False) -> Measured:
    """Score a job's model on the held-out examples, which its processes share among them.

    Processes that hold a shard of the model each must all compute the same, so each sees every example.
    """
    score, losses = Score(job.recipe.task), _HeatmapLoss()
    for batch in _own_batches(job, Process() if sharded else process):
        logits = forward_logits(job.model, job.recipe.task, batch.inputs)
        score.add(logits, batch.labels)
        if isinstance(job.material, KeypointMaterial):
            losses.add(job, logits, batch)
    parts = process.gather([score.content(), losses.total])
    whole, total = Score(job.recipe.task), 0.0
    for content, loss in parts[:1] if sharded else parts:
        whole.add_content(content)
        total += loss
    metrics = whole.metrics()
    return Measured(metrics, metrics.get("loss", total / whole.count))


def _own_batches(job: Job, process: Process) -> Iterator[Batch]:
    return islice(job.material.batches(), process.rank, None, process.count)


@dataclass
class _HeatmapLoss:
    """Adds up the loss of heatmaps, which no metric of theirs is."""

    total: float = 0.0

    def add(self, job: Job, logits: Any, batch: Batch) -> None:
        config: Any = job.model.config
        grid, sigma = heatmap_grid(config), job.recipe.data.sigma
        for row, labels in zip(logits, batch.labels, strict=True):
            target = torch.from_numpy(drawn_target(labels, grid, sigma))
            loss = focal_loss(torch.from_numpy(row), target)
            self.total += float(loss) * len(labels)


@dataclass
class HeldOut:
    """The held-out losses of a training so far, and the weights that had the lowest.

    It is part of the state that a training goes on from. Step 0 is no candidate: an adapter that was not
    trained does nothing.

    Attributes:
        score: measures the model; all processes take part.
        section: says how often, how patiently and what is kept.
        best_step: the step with the lowest loss, None before the first evaluation.
        since: evaluations after that one.
        weights: what training changes, as it was at that step, in main memory; held by the first process.
    """

    score: Callable[[], Measured]
    section: TrainingSection
    process: Process
    best_step: int | None = None
    best_loss: float = float("inf")
    since: int = 0
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def due(self, step: int, last_step: int) -> bool:
        """Whether to look at the held-out examples after this step."""
        every = self.section.eval_every
        return every is not None and (step % every == 0 or step >= last_step)

    def look(self, step: int, model: nn.Module) -> Measured:
        """Measure the model, and remember its weights if it never did better."""
        found = self.score()
        self.since += 1
        if found.loss < self.best_loss:
            self.best_step, self.best_loss, self.since = step, found.loss, 0
            if self.section.keep_best:
                self._keep(trained_tensors(model))
        return found

    def _keep(self, tensors: dict[str, torch.Tensor]) -> None:
        if self.process.first:
            self.weights = {name: value.to("cpu", copy=True) for name, value in tensors.items()}

    @property
    def enough(self) -> bool:
        """Whether the held-out loss has not been lower for as many evaluations as patience allows."""
        patience = self.section.early_stopping_patience
        return patience is not None and self.since >= patience

    def restore(self, model: nn.Module) -> None:
        """Put the best weights back, if any were kept."""
        if self.weights:
            put_trained(self.weights, model, f"the weights of step {self.best_step}")

    def outcome(self, steps: int) -> dict[str, Any]:
        """For the manifest of a run that took so many steps: what was kept, and why it ended."""
        if self.section.eval_every is None:
            return {}
        kept = self.best_step if self.weights else steps
        early = f"no lower held-out loss in {self.since} evaluations"
        return {
            "kept_step": kept,
            "best_step": self.best_step,
            "best_loss": self.best_loss,
            "ended": early if self.enough else "all steps were taken",
        }

    def save(self, directory: Path) -> None:
        """Write what is remembered beside a state."""
        if self.section.eval_every is None:
            return
        seen = {"best_step": self.best_step, "since": self.since}
        loss = None if self.best_step is None else self.best_loss
        (directory / _SEEN_FILE).write_bytes(canonical_json({**seen, "best_loss": loss}))
        write_tensors(directory / _BEST_FILE, self.weights)

    def load(self, directory: Path) -> None:
        """Remember what was written beside a state."""
        if self.section.eval_every is None:
            return
        seen = load_json(directory / _SEEN_FILE)
        self.best_step, self.since = seen["best_step"], seen["since"]
        self.best_loss = float("inf") if seen["best_loss"] is None else seen["best_loss"]
        if self.process.first:
            self.weights = read_tensors(directory / _BEST_FILE)
