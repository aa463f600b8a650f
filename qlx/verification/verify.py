"""`verify`: integrity, then lineage, then a replay of the probe, then the comparison.

What is corrupt or does not belong together raises (nothing can be concluded from it); what is
merely different comes back as a report that did not pass.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qlx.checkpoint import Checkpoint, Manifest, Probe, ProbeResult, Source, open_checkpoint
from qlx.errors import CheckFailed, Mismatch
from qlx.verification.base import base_of, needs_base
from qlx.verification.metrics import Array, Comparison, compare
from qlx.verification.replay import probe_of, replay
from qlx.verification.report import Report
from qlx.verification.thresholds import (
    Check,
    Thresholds,
    against_thresholds,
    check_comparison,
    lossy_steps,
    own_thresholds,
    reference_thresholds,
    tightened,
)

__all__ = ["judge", "noise_floor", "probe_result", "verify", "verify_outputs"]


def verify(
    path: Path,
    *,
    against: Path | None = None,
    base: Source | str | Path | None = None,
    tighten: Mapping[str, float] | None = None,
) -> Report:
    """Check that a checkpoint is whole, belongs where it says, and still computes what it should.

    Its outputs are compared with the stored reference (the unmerged model as trained) and, where
    the checkpoint is lossy by nature, tightly with the outputs recorded when it was made. With
    `against`, both checkpoints are run on the same probe and compared with each other too.

    Raises:
        CorruptCheckpoint: a byte of either checkpoint is not what its manifest recorded.
        Mismatch: the base, the quantization or the probes do not belong together.
        InputRefused: there is no probe to compare on, or no base to run the adapter on.
        UsageError: a limit in `tighten` is unknown or looser than the step's own.
    """
    checkpoint = open_checkpoint(Path(path))
    if against is not None:
        return _verify_against(checkpoint, open_checkpoint(Path(against)), base, tighten)
    checks, source = _identity(checkpoint, base)
    probe = probe_of(checkpoint)
    outputs = replay(checkpoint, source, probe)
    checks += _quantization(checkpoint.manifest)
    comparisons, judged = verify_outputs(checkpoint.manifest, probe, outputs, tighten)
    return Report(
        subject=checkpoint.path.name or str(checkpoint.path),
        kind=checkpoint.manifest.kind,
        task=checkpoint.manifest.task,
        digest=checkpoint.digest,
        against=_reference_name(checkpoint.manifest),
        checks=(*checks, *judged),
        comparisons=comparisons,
        notes=_notes(checkpoint.manifest, probe, comparisons),
    )


def _reference_name(manifest: Manifest) -> str:
    return manifest.probe.reference if manifest.probe is not None else ""


def _identity(
    checkpoint: Checkpoint, base: Source | str | Path | None
) -> tuple[list[Check], Source | None]:
    manifest = checkpoint.manifest
    checks = [Check("integrity", True, f"{len(manifest.files)} files match their digests")]
    source = base_of(checkpoint, base)
    if source is not None:
        checks.append(Check("base", True, f"{source.name} holds the recorded weights"))
    results = () if manifest.probe is None else manifest.probe.results
    failed = [f"{result.step} against {result.against}" for result in results if not result.passed]
    checks.append(Check("lineage", not failed, _history(manifest, failed)))
    return checks, source


def _quantization(manifest: Manifest) -> list[Check]:
    """What running an adapter has shown: loading refuses a base that quantizes to other codes."""
    if not needs_base(manifest) or manifest.quantization.fingerprint is None:
        return []
    count = len(manifest.quantization.tensors)
    return [Check("quantization", True, f"{count} tensors of the base give the recorded codes")]


def _history(manifest: Manifest, failed: list[str]) -> str:
    if failed:
        return f"recorded as failed: {', '.join(failed)}"
    return " → ".join(step.command for step in manifest.lineage) or "no steps recorded"


def verify_outputs(
    manifest: Manifest, probe: Probe, outputs: Array, tighten: Mapping[str, float] | None = None
) -> tuple[dict[str, Comparison], list[Check]]:
    """Judge a replay's outputs by the limits that the checkpoint's history allows.

    Returns:
        The measured comparisons by name, and a check for every limit.
    """
    limits = reference_thresholds(manifest, noise_floor(probe), probe.base is not None)
    if not lossy_steps(manifest):
        return judge("reference", probe, probe.reference, outputs, tightened(limits, tighten))
    if probe.own is None:
        raise Mismatch(
            f"checkpoint {manifest.tag!r} went through a lossy step but records no outputs of its own; make it again"
        )
    comparisons, checks = judge("own", probe, probe.own, outputs, own_thresholds(manifest.kind))
    more, judged = judge("reference", probe, probe.reference, outputs, tightened(limits, tighten))
    return {**comparisons, **more}, [*checks, *judged]


def judge(
    name: str, probe: Probe, reference: Array, outputs: Array, limits: Thresholds
) -> tuple[dict[str, Comparison], list[Check]]:
    """Compare outputs with one reference on a probe's real positions and check them by `limits`.

    Outputs that are not finite give no comparison and one failed check.
    """
    try:
        comparison = compare(reference, outputs, probe.mask, probe.base, limits.relative or 0.0)
    except CheckFailed as error:
        return {}, [Check(f"{name}: finite", False, str(error))]
    return {name: comparison}, check_comparison(name, comparison, limits)


def noise_floor(probe: Probe) -> float | None:
    """The relative error of the unmerged model in training's own compute dtype, None if unknown."""
    if probe.native is None:
        return None
    return compare(probe.reference, probe.native, probe.mask).relative


def _notes(
    manifest: Manifest, probe: Probe, comparisons: Mapping[str, Comparison]
) -> tuple[str, ...]:
    notes = [
        f"limits: {reference_thresholds(manifest, noise_floor(probe), probe.base is not None).reason}"
    ]
    floor, measured = noise_floor(probe), comparisons.get("reference")
    if floor and measured is not None:
        notes.append(
            f"training's own precision is {floor:.3g} off; this checkpoint is at {measured.relative / floor:.3g} × that"
        )
    return tuple(notes)


@dataclass(frozen=True)
class _Side:
    checkpoint: Checkpoint
    checks: list[Check]
    source: Source | None


def _verify_against(
    checkpoint: Checkpoint,
    other: Checkpoint,
    base: Source | str | Path | None,
    tighten: Mapping[str, float] | None,
) -> Report:
    if checkpoint.manifest.task != other.manifest.task:
        raise Mismatch(
            f"{other.path}: a model for {other.manifest.task}; {checkpoint.path} is for {checkpoint.manifest.task}"
        )
    probe = _common_probe(checkpoint, other)
    sides = [_Side(each, *_identity(each, _base_for(each, base))) for each in (checkpoint, other)]
    candidate, reference = (replay(side.checkpoint, side.source, probe) for side in sides)
    limits = tightened(
        against_thresholds(checkpoint.manifest, other.manifest, probe.base is not None), tighten
    )
    comparisons, judged = judge("against", probe, reference, candidate, limits)
    first, second = (
        [
            Check(f"{side.checkpoint.path.name}: {check.name}", check.passed, check.detail)
            for check in side.checks
        ]
        for side in sides
    )
    return Report(
        subject=checkpoint.path.name or str(checkpoint.path),
        kind=checkpoint.manifest.kind,
        task=checkpoint.manifest.task,
        digest=checkpoint.digest,
        against=f"{other.path.name} ({other.manifest.kind})",
        checks=(*first, *second, *judged),
        comparisons=comparisons,
        notes=(f"limits: {limits.reason}",),
    )


def _base_for(
    checkpoint: Checkpoint, base: Source | str | Path | None
) -> Source | str | Path | None:
    return base if needs_base(checkpoint.manifest) else None


def _common_probe(checkpoint: Checkpoint, other: Checkpoint) -> Probe:
    if other.manifest.probe is None:
        return probe_of(checkpoint)
    theirs = probe_of(other)
    if checkpoint.manifest.probe is None:
        return theirs
    ours = probe_of(checkpoint)
    same = set(ours.inputs) == set(theirs.inputs) and all(
        np.array_equal(ours.inputs[name], theirs.inputs[name]) for name in ours.inputs
    )
    if not same:
        raise Mismatch(
            f"{checkpoint.path} and {other.path} carry probes of different inputs: not from one training run"
        )
    return ours


def probe_result(
    step: str, against: str, comparison: Comparison, checks: list[Check]
) -> ProbeResult:
    """One comparison as a manifest records it; without checks the distance is stated, not gated."""
    passed = all(check.passed for check in checks)
    return ProbeResult(step=step, against=against, metrics=comparison.metrics(), passed=passed)
