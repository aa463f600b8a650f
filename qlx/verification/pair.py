"""Two checkpoints of any kinds compared with each other: on their probe, on more data, and inside."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from qlx.checkpoint import Checkpoint, Probe, Source
from qlx.errors import CheckFailed, Mismatch
from qlx.inputs import Batch, Score
from qlx.recipe import DataSection
from qlx.verification.base import base_of
from qlx.verification.drift import Drift
from qlx.verification.evaluate import data_of, examples
from qlx.verification.inside import BaseModel, base_model, look_inside, measured_noise
from qlx.verification.judge import judge, noise_floor, probe_scores, score_changes
from qlx.verification.metrics import Array, Comparison, Tally
from qlx.verification.replay import probe_of
from qlx.verification.report import Report, decided_note, failure_notes, noise_note
from qlx.verification.side import Side
from qlx.verification.thresholds import (
    Check,
    Thresholds,
    against_thresholds,
    check_comparison,
    layer_checks,
    tightened,
)

__all__ = ["verify_pair"]

ROWS = 16  # inputs that are run together
LOOKED_AT = 4  # batches of data that are followed through the layers where there is no probe


def verify_pair(
    checkpoint: Checkpoint,
    other: Checkpoint,
    base: Source | str | Path | None,
    tighten: Mapping[str, float],
    *,
    data: DataSection | Path | None,
    layers: bool | None,
) -> Report:
    """The report on `checkpoint` with `other` as its reference; see `verify` for the arguments.

    Raises:
        Mismatch: they are for different tasks, or carry probes of different inputs.
        InputRefused: neither carries a probe, and no data are given.
    """
    if checkpoint.manifest.task != other.manifest.task:
        raise Mismatch(
            f"{other.path}: a model for {other.manifest.task}; {checkpoint.path} is for {checkpoint.manifest.task}"
        )
    probe = _common_probe(checkpoint, other, required=data is None)
    pair = _Pair(*_sides(checkpoint, other, base), base, tighten, probe)
    more = data is not None or bool(layers)
    if probe is not None:
        pair.compare_on_probe(probe, keep=more)
    if data is not None:
        pair.compare_on_data(data_of(data))
    if layers or (layers is None and not pair.passed) or "layer_drift" in tighten:
        pair.look_inside(None if data is None else data_of(data))
    return pair.report()


@dataclass
class _Pair:
    """The two sides and what comparing them has shown so far."""

    candidate: Side
    reference: Side
    base: Source | str | Path | None
    tighten: Mapping[str, float]
    probe: Probe | None
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    drift: Drift | None = None
    noise: float | None = None

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @cached_property
    def off(self) -> BaseModel | None:
        return base_model((self.reference, self.candidate), self.base)

    def limits(self, has_base: bool) -> Thresholds:
        manifests = self.candidate.manifest, self.reference.manifest
        floor = None if self.probe is None else noise_floor(self.probe)
        return tightened(against_thresholds(*manifests, has_base, floor), self.tighten)

    def compare_on_probe(self, probe: Probe, *, keep: bool) -> None:
        """Without `keep` only one of the two models is in memory at a time."""
        limits = self.limits(probe.base is not None)
        outputs = []
        for side in (self.reference, self.candidate):
            outputs.append(side.outputs(probe.inputs))
            if not keep:
                side.release()
        wanted, given = outputs
        found, checks = judge("against", probe, wanted, given, limits)
        self.comparisons |= found
        self.checks += checks
        self.inputs.append(f"the stored probe, {probe.count} inputs")
        self.noise = noise_floor(probe)
        if found:
            self._score(probe_scores(probe, given), probe_scores(probe, wanted))

    def compare_on_data(self, data: DataSection) -> None:
        limits = self.limits(self.off is not None)
        tally = Tally(limits.relative or 0.0)
        scores = [Score(self.candidate.manifest.task) for _ in range(2)]
        count = 0
        for batch in examples(self.candidate.checkpoint, data, ROWS):
            count += len(batch)
            try:
                self._add(batch, tally, scores)
            except CheckFailed as error:
                self.checks.append(Check("data: finite", False, str(error)))
                return
        given, wanted = (score.metrics() for score in scores)
        self.comparisons["data"] = tally.comparison()
        changes = score_changes(wanted, given)
        self.checks += check_comparison("data", self.comparisons["data"], limits, changes)
        self.inputs.append(f"{data.source}, {count} held-out inputs")
        self._score(given, wanted)

    def _add(self, batch: Batch, tally: Tally, scores: Sequence[Score]) -> None:
        wanted, given = (s.outputs(batch.inputs) for s in (self.reference, self.candidate))
        task = self.candidate.manifest.task
        before = None if self.off is None else self.off.outputs(task, batch.inputs)
        mask = batch.inputs.get("attention_mask")
        tally.add(wanted, given, None if mask is None else mask.astype(bool), before)
        for score, outputs in zip(scores, (given, wanted), strict=True):
            score.add(outputs, batch.labels)

    def _score(self, given: Mapping[str, float], wanted: Mapping[str, float]) -> None:
        if given and wanted:
            self.scores = {"this checkpoint": dict(given), "reference": dict(wanted)}

    def look_inside(self, data: DataSection | None) -> None:
        batches = list(self._batches(data))
        self.drift = look_inside(self.reference, self.candidate, self.off, batches)
        self.checks += layer_checks(self.drift, self.limits(self.off is not None))
        if self.noise is None and self.comparisons:
            first = batches[0].inputs
            mask = first.get("attention_mask")
            self.noise = measured_noise(
                self.reference, self.candidate, first, None if mask is None else mask.astype(bool)
            )

    def _batches(self, data: DataSection | None) -> Iterator[Batch]:
        """What is followed through the layers: the probe, or the first of the data."""
        if self.probe is None:
            assert data is not None
            yield from islice(examples(self.candidate.checkpoint, data, ROWS), LOOKED_AT)
            return
        for start in range(0, self.probe.count, ROWS):
            rows = slice(start, start + ROWS)
            inputs = {name: np.asarray(array[rows]) for name, array in self.probe.inputs.items()}
            yield Batch(inputs, np.empty(0, np.int64))

    def report(self) -> Report:
        limits = self.limits(self.probe is not None and self.probe.base is not None)
        measured = self.comparisons.get("data") or self.comparisons.get("against")
        notes = [f"limits: {limits.reason}", *decided_note(measured, limits)]
        notes += noise_note(measured, self.noise, "the precision itself")
        failed = [check for check in self.checks if not check.passed]
        notes += failure_notes(failed, compared=True)
        manifest = self.candidate.manifest
        return Report(
            subject=self.candidate.name,
            kind=manifest.kind,
            task=manifest.task,
            digest=self.candidate.checkpoint.digest,
            against=f"{self.reference.name} ({self.reference.manifest.kind})",
            inputs=" and ".join(self.inputs),
            checks=(*self.candidate.checks(), *self.reference.checks(), *self.checks),
            comparisons=self.comparisons,
            scores=self.scores,
            noise_floor=self.noise,
            drift=self.drift,
            notes=tuple(notes),
        )


def _sides(
    checkpoint: Checkpoint, other: Checkpoint, base: Source | str | Path | None
) -> tuple[Side, Side]:
    candidate, reference = Side(checkpoint, base), Side(other, base)
    known = [each for each in (checkpoint, other) if each.manifest.base is not None]
    if base is not None and known and candidate.source is None and reference.source is None:
        base_of(known[0], base)  # only to measure the adapter's effect by; still the right one
    if candidate.name == reference.name:
        reference.name += " (reference)"
    return candidate, reference


def _common_probe(checkpoint: Checkpoint, other: Checkpoint, *, required: bool) -> Probe | None:
    if not required and checkpoint.manifest.probe is None and other.manifest.probe is None:
        return None
    if other.manifest.probe is None:
        return probe_of(checkpoint)
    theirs = probe_of(other)
    if checkpoint.manifest.probe is None:
        return theirs
    ours = probe_of(checkpoint)
    if _same(ours.inputs, theirs.inputs):
        return ours
    if not required:
        return None
    raise Mismatch(
        f"{checkpoint.path} and {other.path} carry probes of different inputs: not from one training run"
    )


def _same(ours: Mapping[str, Array], theirs: Mapping[str, Array]) -> bool:
    return set(ours) == set(theirs) and all(
        np.array_equal(ours[name], theirs[name]) for name in ours
    )
