"""`eval`: the task's own score of a checkpoint of any kind, on the data that its recipe held out."""

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qlx.checkpoint import Checkpoint, Manifest, Source, Step, open_checkpoint
from qlx.errors import CheckFailed, InputRefused, Mismatch
from qlx.inputs import Batch, Score, eval_batches
from qlx.recipe import DataSection, load_recipe
from qlx.verification.base import base_of
from qlx.verification.replay import predictor_of
from qlx.verification.report import display_name

__all__ = ["EvalResult", "data_of", "evaluate", "examples", "recorded_data"]

_BATCH = 32


@dataclass(frozen=True)
class EvalResult:
    """Metrics of one evaluation and what they were measured on.

    `metrics` holds accuracy and loss of a classifier, or loss, perplexity and token_accuracy of a
    language model (losses in nats); `count` is the number of scored images or tokens.
    """

    subject: str
    kind: str
    task: str
    source: str
    count: int
    metrics: dict[str, float]


def evaluate(
    path: Path,
    *,
    base: Source | str | Path | None = None,
    data: DataSection | Path | None = None,
    batch_size: int = _BATCH,
    offload: bool = False,
    adapter: str | None = None,
) -> EvalResult:
    """Score a checkpoint on held-out examples of `data`, or of what its training step recorded.

    `data` is a data section, or a recipe file whose data section is meant. With `offload` weights are
    read from disk as each layer runs, instead of being in memory; the scores are the same. `adapter` is
    one of the checkpoint's swappable ones; without it, the base is scored.

    Raises:
        UsageError: there is no adapter of that name.
        CorruptCheckpoint: a byte of the checkpoint is not what its manifest recorded.
        InputRefused: no data is recorded or found, or an adapter's base is not.
        CheckFailed: the loss is not finite.
    """
    checkpoint = open_checkpoint(Path(path)).with_adapter(adapter)
    source = base_of(checkpoint, base)
    chosen = recorded_data(checkpoint) if data is None else data_of(data)
    batches = examples(checkpoint, chosen, batch_size)
    score = Score(checkpoint.manifest.task)
    with tempfile.TemporaryDirectory(prefix="qlx-offloaded-") as folder:
        predictor = predictor_of(checkpoint, source, folder=Path(folder) if offload else None)
        for batch in batches:
            score.add(predictor.predict(batch.inputs), batch.labels)
        del predictor
    return _result(checkpoint, chosen, score)


def data_of(data: DataSection | Path) -> DataSection:
    """A data section as it is, or that of a recipe file."""
    return load_recipe(data).data if isinstance(data, Path) else data


def examples(checkpoint: Checkpoint, data: DataSection, size: int) -> Iterator[Batch]:
    """What `data` holds out, prepared as in the checkpoint's training, `size` at a time.

    Raises:
        InputRefused: the data or the checkpoint's preprocessing files are missing.
        Mismatch: the data are for another task.
    """
    if data.task != checkpoint.manifest.task:
        raise Mismatch(
            f"{checkpoint.path}: a checkpoint for {checkpoint.manifest.task}, and the data ({data.source}) are for "
            f"{data.task}; give a recipe with data for that task"
        )
    train = _training_step(checkpoint.manifest)
    completion_only = train is None or train.options.get("completion_only") is not False
    return eval_batches(data, checkpoint.path, size=size, completion_only=completion_only)


def _result(checkpoint: Checkpoint, data: DataSection, score: Score) -> EvalResult:
    metrics = score.metrics()
    if not all(math.isfinite(value) for value in metrics.values()):
        raise CheckFailed(
            f"{checkpoint.path}: the loss on {data.source} is not finite; the model is broken"
        )
    manifest = checkpoint.manifest
    return EvalResult(
        display_name(checkpoint), manifest.kind, manifest.task, data.source, score.count, metrics
    )


def recorded_data(checkpoint: Checkpoint) -> DataSection:
    """The data section of the recipe that the checkpoint was trained by, from its lineage.

    Raises:
        InputRefused: its lineage does not begin with a training step of qlx.
    """
    step = _training_step(checkpoint.manifest)
    fields = None if step is None else step.options.get("data")
    if not isinstance(fields, dict):
        raise InputRefused(f"{checkpoint.path}: records no evaluation data; name some with --data")
    return DataSection.model_validate(fields)


def _training_step(manifest: Manifest) -> Step | None:
    return next((step for step in reversed(manifest.lineage) if step.command == "train"), None)
