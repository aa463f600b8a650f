"""`qlx train`: from a recipe to a run directory, with evaluation before and after, a probe and a report."""

import gc
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlx.adapters import adapter_spec, exact_spec, join_halves, parameter_counts, save_adapter
from qlx.checkpoint import (
    PROBE_FILE,
    AdapterSpec,
    Checkpoint,
    Manifest,
    Probe,
    ProbeRecord,
    ProbeResult,
    canonical_json,
    is_checkpoint,
    load_json,
    new_checkpoint,
    next_step,
    open_checkpoint,
    seal,
    write_probe,
)
from qlx.errors import CheckFailed, UsageError, require
from qlx.models import CONFIG_FILE, forward_logits, load_model, make_probe
from qlx.recipe import Recipe
from qlx.training.distributed import Process, join_processes
from qlx.training.evaluation import HeldOut, measure
from qlx.training.job import Job, prepare
from qlx.training.loop import Ended, Loop
from qlx.training.material import ImageMaterial, KeypointMaterial
from qlx.training.progress import (
    METRICS_FILE,
    Reporter,
    check_reporting,
    metrics_callback,
    progress_callback,
    read_metrics,
    reporting_callbacks,
)
from qlx.training.report import RunSummary, Sample, write_report
from qlx.training.samples import image_samples, keypoint_samples, text_samples
from qlx.training.state import TRAINER_STATE_FILE, require_recipe, write_optimizer
from qlx.training.tags import tag_of
from qlx.training.trainable import parameter_table
from qlx.training.trainers import check_optimizer
from qlx.training.work import STATE, check_places, work_directory, working
from qlx.weights import SINGLE_FILE, write_tensors

__all__ = ["RECIPE_FILE", "train"]

RECIPE_FILE = "recipe.yaml"
REFERENCE = "the model as trained, unmerged, in fp32"

_REPLAY_LIMIT = 1e-5
"""Largest relative distance between the model in memory and the same model read back, in fp32."""


def train(
    recipe: Recipe,
    output: Path,
    *,
    resume: bool = False,
    force: bool = False,
    shard: bool = False,
    report: Reporter = lambda line: None,
) -> Checkpoint:
    """Train what a recipe describes and write the run to `output`.

    While it trains, its state lies in `<output>.partial`; with `resume` an interrupted training goes
    on from there, on CPU in fp32 to the same adapter bytes as if it had not been interrupted. In one
    of several processes (see `qlx.training.distributed`) all take part and the first one writes.

    Args:
        recipe: a validated recipe.
        output: the run directory to make.
        resume: go on with an interrupted training of the same recipe and base.
        force: replace an existing run and, without `resume`, forget an interrupted training.
        shard: let each of several processes hold a part of every weight (see `qlx.training.sharding`).
        report: receives lines of progress.

    Raises:
        UsageError: `output` exists, there is one process to share among, nothing is there to resume,
            or something else lies where the state would.
        InputRefused: the base or the data cannot be used.
        CheckFailed: the loss is no number, or what was written does not replay.
    """
    packed = recipe.quantization.backend if recipe.quantization else "qlx"
    for module in (
        "transformers",
        "accelerate",
        "matplotlib",  # the report's; better missed now than after the training
        "peft" if recipe.adapter else "torch",
        "torch" if packed == "qlx" else packed,
    ):
        require(module, "train")
    check_optimizer(recipe.training, sharded=shard)
    check_reporting(recipe.training)
    output, process = Path(output), join_processes()
    if shard and process.count == 1:
        raise UsageError("--shard divides the model among processes; give --nproc 2 or more")
    if not process.first:
        return _take_part(recipe, output, process, shard=shard)
    check_places(recipe, output, force=force)
    with working(output, resume=resume, force=force) as work:
        if is_checkpoint(work / STATE):
            require_recipe(work / STATE, recipe.digest)
        process.wait()
        job = prepare(recipe, work, report)
        loop = Loop(job, process, work, work / STATE, shard=shard)
        for callback in reporting_callbacks(recipe.training, output):
            loop.trainer.add_callback(callback)
        before = _train(loop, report)
        ended = loop.end()
        with new_checkpoint(output, force=force) as staging:
            _write_run(job, ended, before, work, staging, report)
    report(f"wrote {output}")
    process.wait()
    return open_checkpoint(output)


def _take_part(recipe: Recipe, output: Path, process: Process, *, shard: bool) -> Checkpoint:
    """Train beside the first process, from the state that it has checked, and write nothing."""
    try:
        process.wait()
        with tempfile.TemporaryDirectory(prefix="qlx-training-") as scratch:
            job = prepare(recipe, Path(scratch), lambda line: None)
            state_at = work_directory(output) / STATE
            loop = Loop(job, process, Path(scratch), state_at, shard=shard)
            loop.measure()
            loop.run()
            loop.end()
        process.wait()
    except Exception:
        process.speak_last()
        raise
    return open_checkpoint(output)


def _train(loop: Loop, report: Reporter) -> dict[str, float]:
    """The loop, reported and measured; returns the held-out scores from before it."""
    trainer, training = loop.trainer, loop.job.recipe.training
    for line in parameter_table(loop.job.model).lines():
        report(line)
    if training.packing:
        report(f"packed into {len(trainer.train_dataset):,} rows")
    before = loop.measure()
    report(f"held out, before: {_shown(before.metrics)}")
    step = None
    if loop.state is not None:
        step = int(load_json(loop.state / TRAINER_STATE_FILE)["global_step"])
        report(f"resuming at step {step}")
    start = before.row if training.eval_every else None
    metrics = Path(trainer.args.output_dir) / METRICS_FILE
    trainer.add_callback(metrics_callback(metrics, resumed_at=step, start=start))
    trainer.add_callback(progress_callback(report))
    loop.run()
    held_out: HeldOut = trainer.held_out
    if held_out.weights:
        report(
            f"kept the weights of step {held_out.best_step}: held-out loss {held_out.best_loss:.4f}"
        )
    return before.metrics


def _shown(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def _write_run(
    job: Job, ended: Ended, before: dict[str, float], work: Path, staging: Path, report: Reporter
) -> None:
    """Fill the staging directory, replay it, and seal it."""
    after, table = measure(job, Process()).metrics, parameter_table(job.model)
    report(f"held out, after:  {_shown(after)}")
    _leave_gpu(job)
    steps = int(ended.trainer_state.global_step)
    scores = {"before": before, "after": after, "held_out": ended.held_out.outcome(steps)}
    manifest = _manifest(job, steps, {name: found for name, found in scores.items() if found})
    probe = _probe(job)
    _write_files(job, ended, work, staging)
    write_probe(staging / PROBE_FILE, probe)
    job.release()
    gc.collect()
    result, samples = _read_back(Checkpoint(staging, manifest, ""), job, probe)
    manifest = manifest.with_result(result)
    metrics = read_metrics(work / METRICS_FILE)
    write_report(staging, RunSummary(manifest, metrics, table, before, after, samples))
    seal(staging, manifest)


def _leave_gpu(job: Job) -> None:
    """Bring the model to where it is read back and replayed for ever after: GPUs round convolutions to 10 bits."""
    if any(value.is_cuda for value in job.model.parameters()):
        job.model.to("cpu")
        torch.cuda.empty_cache()


def _write_files(job: Job, ended: Ended, work: Path, staging: Path) -> None:
    _write_weights(job, staging)
    for name, content in {**job.material.files, CONFIG_FILE: job.config}.items():
        (staging / name).write_bytes(content)
    (staging / RECIPE_FILE).write_bytes(canonical_json(job.recipe.content()))  # JSON is YAML
    write_optimizer(staging, ended.state)
    ended.trainer_state.save_to_json(str(staging / TRAINER_STATE_FILE))
    shutil.copyfile(work / METRICS_FILE, staging / METRICS_FILE)


def _write_weights(job: Job, staging: Path) -> None:
    if job.recipe.adapter is not None:
        name = None if job.source is None else job.source.reference().name
        save_adapter(job.model, staging, base_name=name)
        return
    state = job.model.state_dict()
    write_tensors(
        staging / SINGLE_FILE, {stored: state[name] for name, stored in job.names.items()}
    )


def _probe(job: Job) -> Probe:
    batch = job.material.probe(job.recipe)
    if job.recipe.adapter is not None and not job.recipe.adapter.exact:
        join_halves(job.model)  # what is stored of PiSSA
    return make_probe(
        job.model, job.recipe.task, batch.inputs, batch.labels, job.recipe.adapter is not None
    )


def _read_back(staged: Checkpoint, job: Job, probe: Probe) -> tuple[ProbeResult, list[Sample]]:
    """Load what was written and compare its outputs with those of the model that was trained.

    Raises:
        CheckFailed: they differ, so something was lost in writing.
    """
    folder = None if job.folder is None else job.folder / "read-back"
    model = load_model(staged, job.source, folder=folder)
    outputs = forward_logits(model, job.recipe.task, probe.inputs)
    difference = float(np.abs(outputs - probe.reference).max())
    relative = difference / max(float(np.abs(probe.reference).max()), 1e-30)
    if not relative <= _REPLAY_LIMIT:
        raise CheckFailed(
            f"the run read back from disk differs from the model that was trained by {relative:.2g} "
            f"(allowed {_REPLAY_LIMIT:g}); nothing was written, please report this"
        )
    metrics = {"max_abs": difference, "relative_max": relative}
    result = ProbeResult(step="train", against="reference", metrics=metrics, passed=True)
    return result, _samples(model, job, probe)


def _samples(model: Any, job: Job, probe: Probe) -> list[Sample]:
    material = job.material
    if isinstance(material, ImageMaterial):
        return image_samples(material.evaluation, probe)
    if isinstance(material, KeypointMaterial):
        return keypoint_samples(
            material.evaluation, material.probe_items(job.recipe.probe.count), probe
        )
    longest = job.recipe.data.max_length
    return text_samples(model, material.codec, material.examples, longest)


def _manifest(job: Job, steps: int, found: dict[str, Any]) -> Manifest:
    """The manifest of a run; `found` are scores, and what became of the held-out curve."""
    recipe, source = job.recipe, job.source
    options = {
        "data": _portable(recipe),
        "data_digest": job.material.digests.train,
        "held_out_digest": job.material.digests.held_out,
        "completion_only": recipe.training.completion_only,
        "steps": steps,
        **found,
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
        tag=tag_of(recipe, None if source is None else source.name, job.quantization),
        base=None if source is None else source.reference(),
        quantization=job.quantization,
        adapter=_adapter_spec(job),
        lineage=(
            *(() if source is None or source.manifest is None else source.manifest.lineage),
            step,
        ),
        probe=ProbeRecord(reference=REFERENCE),
    )


def _portable(recipe: Recipe) -> dict[str, Any]:
    """The data section, absolute paths shortened to their last component."""
    data = recipe.data.model_dump(mode="json")
    for name in ("path", "chat_template"):
        if data[name] is not None and Path(data[name]).is_absolute():
            data[name] = Path(data[name]).name
    return data


def _adapter_spec(job: Job) -> AdapterSpec:
    if job.recipe.adapter is not None:
        section, started = job.recipe.adapter, job.recipe.adapter.initialisation
        if section.exact:
            return exact_spec(job.model, section, job.names, parameter_counts(job.model))
        return adapter_spec(
            job.model,
            job.names,
            initialized=None if started == "default" else started,
            new_tokens=section.new_tokens,
        )
    table = parameter_table(job.model)
    return AdapterSpec(type="full", trained_parameters=table.trained, total_parameters=table.total)
