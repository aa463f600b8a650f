"""`qlx train`: from a recipe to a run directory, with evaluation before and after, a probe and a report."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlx.adapters import adapter_spec, save_adapter
from qlx.checkpoint import (
    AdapterSpec,
    Checkpoint,
    Manifest,
    Probe,
    ProbeRecord,
    canonical_json,
    is_checkpoint,
    new_checkpoint,
    next_step,
    open_checkpoint,
    seal,
    write_probe,
)
from qlx.errors import QlxError, UsageError, require
from qlx.inputs import Score
from qlx.models import CONFIG_FILE, forward_logits, make_probe
from qlx.recipe import Recipe
from qlx.training.job import Job, prepare
from qlx.training.material import ImageMaterial
from qlx.training.progress import METRICS_FILE, Reporter, metrics_callback, progress_callback, read_metrics
from qlx.training.report import RunSummary, write_report
from qlx.training.state import TRAINER_STATE_FILE, open_state, save_optimizer
from qlx.training.tags import tag_of
from qlx.training.trainable import ParameterTable, parameter_table
from qlx.training.trainers import ImageDataset, image_trainer, text_trainer
from qlx.weights import write_tensors

__all__ = ["train"]

_STATE = "state"
_RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True)
class _Outcome:
    """What came out of the loop, and the scores around it."""

    trainer: Any
    table: ParameterTable
    before: dict[str, float]
    after: dict[str, float]


def train(
    recipe: Recipe,
    output: Path,
    *,
    resume: bool = False,
    force: bool = False,
    report: Reporter = lambda line: None,
) -> Checkpoint:
    """Train what a recipe describes and write the run to `output`.

    While it trains, its state lies in `<output>.partial`; with `resume` an interrupted training goes
    on from there, on CPU in fp32 to the same adapter bytes as if it had not been interrupted.

    Args:
        recipe: a validated recipe.
        output: the run directory to make.
        resume: go on with an interrupted training of the same recipe and base.
        force: replace an existing run, and forget an interrupted training.
        report: receives lines of progress.

    Raises:
        UsageError: `output` exists, or nothing is there to resume.
        InputRefused: the base or the data cannot be used.
        CheckFailed: the loss is no number, or what was written does not replay.
    """
    require("transformers", "train")
    output = Path(output)
    if output.exists() and not force:
        raise UsageError(f"{output}: exists already; choose another --output, or replace it with --force")
    with _work(output, resume=resume, force=force) as work:
        job = prepare(recipe, work, report)
        outcome = _train(job, work, report)
        return _write_run(job, outcome, work, output, force, report)


@contextmanager
def _work(output: Path, *, resume: bool, force: bool) -> Iterator[Path]:
    """`<output>.partial`: kept when interrupted, removed on success and on an error of ours."""
    work = output.with_name(output.name + ".partial")
    if resume and not work.is_dir():
        raise UsageError(f"{work}: there is no interrupted training to resume; start it without --resume")
    if work.exists() and not resume:
        if is_checkpoint(work / _STATE) and not force:
            raise UsageError(f"{work}: holds an interrupted training; go on with --resume, or start anew with --force")
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    try:
        yield work
    except QlxError:
        if not resume:
            shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(work, ignore_errors=True)


def _train(job: Job, work: Path, report: Reporter) -> _Outcome:
    table = parameter_table(job.model)
    report(f"parameters trained: {table.trained:,} of {table.total:,} ({table.share:.2%})")
    before = _score(job)
    report(f"held out, before: {_shown(before)}")
    state = open_state(work / _STATE, job.belongs_to) if is_checkpoint(work / _STATE) else None
    trainer = _trainer(job, work)
    step = None if state is None else int(state_step(state))
    trainer.add_callback(metrics_callback(work / METRICS_FILE, resumed_at=step))
    trainer.add_callback(progress_callback(report))
    if state is not None:
        report(f"resuming at step {step}")
    trainer.train(resume_from_checkpoint=None if state is None else str(state))
    after = _score(job)
    report(f"held out, after:  {_shown(after)}")
    return _Outcome(trainer, table, before, after)


def state_step(state: Path) -> int:
    """The step at which a saved state was written."""
    from qlx.checkpoint import load_json

    return int(load_json(state / TRAINER_STATE_FILE)["global_step"])


def _trainer(job: Job, work: Path) -> Any:
    section, material = job.recipe.training, job.material
    if isinstance(material, ImageMaterial):
        dataset = ImageDataset(material.train, material.preprocessor)
        trainer = image_trainer(job.model, dataset, section, work)
    else:
        tokenizer = material.fast_tokenizer(work)
        trainer = text_trainer(job.model, material.train, tokenizer, section, work, job.recipe.data.max_length)
    trainer.state_directory, trainer.belongs_to, trainer.task = work / _STATE, job.belongs_to, job.recipe.task
    return trainer


def _score(job: Job) -> dict[str, float]:
    score = Score(job.recipe.task)
    for batch in job.material.batches():
        score.add(forward_logits(job.model, job.recipe.task, batch.inputs), batch.labels)
    return score.metrics()


def _shown(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def _write_run(job: Job, outcome: _Outcome, work: Path, output: Path, force: bool, report: Reporter) -> Checkpoint:
    recipe = job.recipe
    probe = _probe(job)
    with new_checkpoint(output, force=force) as staging:
        _write_weights(job, staging)
        for name, content in {**job.material.files, CONFIG_FILE: job.config}.items():
            (staging / name).write_bytes(content)
        (staging / _RECIPE_FILE).write_bytes(_recipe_bytes(recipe))
        save_optimizer(staging, outcome.trainer.optimizer, outcome.trainer.lr_scheduler)
        outcome.trainer.state.save_to_json(str(staging / TRAINER_STATE_FILE))
        shutil.copyfile(work / METRICS_FILE, staging / METRICS_FILE)
        write_probe(staging / "probe.safetensors", probe)
        manifest = _manifest(job, outcome)
        write_report(staging, RunSummary.of(job, manifest, outcome, read_metrics(work / METRICS_FILE), probe))
        seal(staging, manifest)
    report(f"wrote {output}")
    return open_checkpoint(output)


def _write_weights(job: Job, staging: Path) -> None:
    if job.recipe.adapter is not None:
        name = None if job.source is None else job.source.reference().name
        save_adapter(job.model, staging, base_name=name)
        return
    state = job.model.state_dict()
    write_tensors(staging / "model.safetensors", {stored: state[name] for name, stored in job.names.items()})


def _probe(job: Job) -> Probe:
    batch = job.material.probe(job.recipe)
    return make_probe(job.model, job.recipe.task, batch.inputs, batch.labels, job.recipe.adapter is not None)


def _recipe_bytes(recipe: Recipe) -> bytes:
    """The recipe with defaults filled in; JSON is YAML."""
    return canonical_json(recipe.content())


def _manifest(job: Job, outcome: _Outcome) -> Manifest:
    recipe, source = job.recipe, job.source
    options = {
        "data": recipe.data.model_dump(mode="json"),
        "data_digest": job.material.digest,
        "completion_only": recipe.training.completion_only,
        "steps": outcome.trainer.state.global_step,
        "before": outcome.before,
        "after": outcome.after,
    }
    step = next_step(
        "train",
        parents=() if source is None else (source.fingerprint,),
        recipe_digest=recipe.digest,
        seed=recipe.training.seed,
        options=options,
    )
    return Manifest(
        kind="run",
        task=recipe.task,
        tag=tag_of(recipe, None if source is None else source.name),
        base=None if source is None else source.reference(),
        quantization=job.quantization,
        adapter=_adapter_spec(job, outcome),
        lineage=(*(() if source is None or source.manifest is None else source.manifest.lineage), step),
        probe=ProbeRecord(reference="the model as trained, unmerged, in fp32"),
    )


def _adapter_spec(job: Job, outcome: _Outcome) -> AdapterSpec:
    if job.recipe.adapter is not None:
        return adapter_spec(job.model, job.names)
    return AdapterSpec(type="full", trained_parameters=outcome.table.trained, total_parameters=outcome.table.total)
