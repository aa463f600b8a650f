"""`verify`: integrity, then lineage, then a replay of the probe, then the comparison.

What is corrupt or does not belong together raises (nothing can be concluded from it); what is
merely different comes back as a report that did not pass.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from qlx.checkpoint import Checkpoint, Probe, Source, open_checkpoint
from qlx.errors import UsageError
from qlx.recipe import DataSection
from qlx.verification.identity import identity_checks, quantization_checks
from qlx.verification.judge import noise_floor, probe_scores, verify_outputs
from qlx.verification.metrics import Array, Comparison
from qlx.verification.pair import verify_pair
from qlx.verification.replay import Predictor, predictor_of, probe_of
from qlx.verification.report import (
    Report,
    decided_note,
    display_name,
    failure_notes,
    noise_note,
)
from qlx.verification.thresholds import (
    Check,
    Thresholds,
    reference_thresholds,
    require_sensible,
    tightened,
)

__all__ = ["verify"]


def verify(
    path: Path,
    *,
    against: Path | None = None,
    base: Source | str | Path | None = None,
    tighten: Mapping[str, float] | None = None,
    data: DataSection | Path | None = None,
    layers: bool | None = None,
    adapter: str | None = None,
) -> Report:
    """Check that a checkpoint is whole, belongs where it says, and still computes what it should.

    Its outputs are compared with the stored reference (the unmerged model as trained) and, where
    the checkpoint is lossy by nature, tightly with the outputs recorded when it was made. With
    `against`, both checkpoints are run on the same inputs and compared with each other: on the
    probe they have in common and, with `data` (a data section, or a recipe that has one), on what
    it holds out. `layers` looks inside both, at every layer and weight; None does so when the
    outputs differ too much. Of a graph with swappable adapters the base and every adapter are checked,
    or with `adapter` that one alone.

    Raises:
        CorruptCheckpoint: a byte of either checkpoint is not what its manifest recorded.
        Mismatch: the base, the quantization or the probes do not belong together.
        InputRefused: there is no probe to compare on, or no base to run the adapter on.
        UsageError: a limit in `tighten` is unknown or looser than the step's own, `data` or
            `layers` without `against`, or there is no such adapter.
    """
    require_sensible(tighten or {})
    checkpoint = open_checkpoint(Path(path)).with_adapter(adapter)
    if against is not None:
        other = open_checkpoint(Path(against))
        return verify_pair(checkpoint, other, base, tighten or {}, data=data, layers=layers)
    if data is not None or layers:
        raise UsageError(
            "the probe holds the reference's outputs for its own inputs only; "
            "to compare on other data or layer by layer, name the other checkpoint with --against"
        )
    return _verify_alone(checkpoint, base, tighten or {})


def _verify_alone(
    checkpoint: Checkpoint, base: Source | str | Path | None, tighten: Mapping[str, float]
) -> Report:
    manifest = checkpoint.manifest
    checks, source = identity_checks(checkpoint, base)
    probe = probe_of(checkpoint)
    limits = reference_thresholds(manifest, noise_floor(probe), probe.base is not None)
    limits = tightened(limits, tighten)  # refuses before the model is loaded
    predictor = predictor_of(checkpoint, source)
    outputs = np.asarray(predictor.predict(probe.inputs), np.float32)
    checks += quantization_checks(manifest)
    comparisons, judged = verify_outputs(manifest, probe, outputs, tighten)
    scores = _scores(probe, outputs) if comparisons else {}
    for name in manifest.adapters:
        found, more = _verify_adapter(checkpoint.with_adapter(name), predictor, tighten)
        comparisons, judged = comparisons | found, [*judged, *more]
    failed = [check for check in judged if not check.passed]
    return Report(
        subject=display_name(checkpoint),
        kind=manifest.kind,
        task=manifest.task,
        digest=checkpoint.digest,
        against=manifest.probe.reference if manifest.probe is not None else "",
        inputs=f"the stored probe{'s' if manifest.adapters else ''}, {probe.count} inputs",
        checks=(*checks, *judged),
        comparisons=comparisons,
        scores=scores,
        noise_floor=noise_floor(probe),
        notes=(*_notes(probe, comparisons, limits), *failure_notes(failed, compared=False)),
    )


def _verify_adapter(
    checkpoint: Checkpoint, predictor: Predictor, tighten: Mapping[str, float]
) -> tuple[dict[str, Comparison], list[Check]]:
    """`verify_outputs` of one swappable adapter, under its name, by the model that runs already."""
    from qlx.runtime import OnnxPredictor

    assert isinstance(predictor, OnnxPredictor)
    probe, chosen = probe_of(checkpoint), predictor.with_adapter(checkpoint.adapter)
    found, checks = verify_outputs(
        checkpoint.manifest, probe, chosen.predict(probe.inputs), tighten
    )
    of = f" of {checkpoint.adapter}"
    named = [replace(check, name=check.name.replace(":", f"{of}:", 1)) for check in checks]
    return {f"{name}{of}": each for name, each in found.items()}, named


def _scores(probe: Probe, outputs: Array) -> dict[str, dict[str, float]]:
    scores = {
        "this checkpoint": probe_scores(probe, outputs),
        "reference": probe_scores(probe, probe.reference),
    }
    return scores if all(scores.values()) else {}


def _notes(
    probe: Probe, comparisons: Mapping[str, Comparison], limits: Thresholds
) -> tuple[str, ...]:
    measured = comparisons.get("reference")
    notes = [f"limits: {limits.reason}"]
    notes += decided_note(measured, limits)
    notes += noise_note(measured, noise_floor(probe), "training's own precision")
    return tuple(notes)
