"""A replay's outputs measured and held against their limits; the same for every step and command."""

from collections.abc import Mapping

from qlx.checkpoint import Manifest, Probe, ProbeResult
from qlx.errors import CheckFailed, Mismatch
from qlx.inputs import Score
from qlx.verification.metrics import Array, Comparison, compare
from qlx.verification.thresholds import (
    Check,
    Thresholds,
    check_comparison,
    lossy_steps,
    own_thresholds,
    reference_thresholds,
    tightened,
)

__all__ = [
    "judge",
    "noise_floor",
    "probe_result",
    "probe_scores",
    "score_changes",
    "verify_outputs",
]

_ACCURACIES = ("accuracy", "token_accuracy", "f1")


def verify_outputs(
    manifest: Manifest, probe: Probe, outputs: Array, tighten: Mapping[str, float] | None = None
) -> tuple[dict[str, Comparison], list[Check]]:
    """Judge a replay's outputs by the limits that the checkpoint's history allows.

    Returns:
        The measured comparisons by name, and a check for every limit.
    """
    limits = reference_thresholds(manifest, noise_floor(probe), probe.base is not None)
    limits = tightened(limits, tighten)
    lossy = lossy_steps(manifest)
    never_run = probe.own is None and any("checked_rows" in step.options for step in lossy)
    if not lossy or never_run:
        return judge("reference", probe, probe.reference, outputs, limits)
    if probe.own is None:
        raise Mismatch(
            f"checkpoint {manifest.tag!r} went through a lossy step but records no outputs of its own; make it again"
        )
    comparisons, checks = judge("own", probe, probe.own, outputs, own_thresholds(manifest.kind))
    more, judged = judge("reference", probe, probe.reference, outputs, limits)
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
    changes = score_changes(probe_scores(probe, reference), probe_scores(probe, outputs))
    return {name: comparison}, check_comparison(name, comparison, limits, changes)


def probe_scores(probe: Probe, outputs: Array) -> dict[str, float]:
    """The task's metrics of some outputs on a probe's own labels; empty where it has none."""
    score = Score(probe.task)
    if probe.labels is not None:
        score.add(outputs, probe.labels)
    return score.metrics() if score.count else {}


def score_changes(
    reference: Mapping[str, float], candidate: Mapping[str, float]
) -> dict[str, float]:
    """`score_drop` (of accuracy, accuracy per token, or F1) and `loss_rise` (nats); empty if unknown."""
    changes = {}
    for name in _ACCURACIES:
        if name in reference and name in candidate:
            changes["score_drop"] = reference[name] - candidate[name]
    if "loss" in reference and "loss" in candidate:
        changes["loss_rise"] = candidate["loss"] - reference["loss"]
    return changes


def noise_floor(probe: Probe) -> float | None:
    """The relative error of the unmerged model in training's own compute dtype, None if unknown."""
    if probe.native is None:
        return None
    return compare(probe.reference, probe.native, probe.mask).relative


def probe_result(
    step: str, against: str, comparison: Comparison, checks: list[Check]
) -> ProbeResult:
    """One comparison as a manifest records it; without checks the distance is stated, not gated."""
    passed = all(check.passed for check in checks)
    return ProbeResult(step=step, against=against, metrics=comparison.metrics(), passed=passed)
