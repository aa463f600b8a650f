"""The check that a step makes of its own output before the directory appears.

Every step that writes a checkpoint ends here: the staged files are run on the probe they carry,
the distances are judged by the limits of `thresholds` and recorded in the manifest, and a failure
leaves no directory behind.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from qlx.checkpoint import (
    Checkpoint,
    FileEntry,
    Manifest,
    Probe,
    bytes_digest,
    seal,
    write_probe,
)
from qlx.errors import CheckFailed
from qlx.verification.judge import judge, noise_floor, probe_result, verify_outputs
from qlx.verification.metrics import Array, Comparison
from qlx.verification.replay import probe_of, replay
from qlx.verification.thresholds import UNIT_ROUNDOFF, Check, lossy_steps, rounded_thresholds

__all__ = ["failure_text", "judged", "prove", "record_noise", "sealed"]


def prove(
    staging: Path,
    manifest: Manifest,
    *,
    own: Array | None = None,
    beside: tuple[str, Array] | None = None,
    advice: str = "",
    known: Mapping[str, FileEntry] | None = None,
    run: Callable[[Checkpoint, Probe], Array] | None = None,
) -> Checkpoint:
    """Run a staged checkpoint on its probe, record the distances, and seal it.

    A lossy checkpoint gets its own outputs into the probe, for a tight replay later: `own`, where
    they are known from elsewhere (then the staged files must agree with them), else what the
    staged files give now. `beside` names outputs, where they are not the reference, that they may
    differ from by no more than this step's rounding; the distance is stated.

    `advice` ends the message of a failure: what the user can do. `known`
    holds entries of files that are hashed already. `run` gives the outputs of the staged files on
    a probe where they are not loaded and replayed.

    Raises:
        CheckFailed: a limit is not met; the message names each one.
        InputRefused: the manifest has no probe.
    """
    staged = Checkpoint(staging, manifest, "")
    replayed = run or (lambda checkpoint, probe: replay(checkpoint, None, probe))
    return sealed(staging, judged(staged, replayed, own=own, beside=beside, advice=advice), known)


def judged(
    staged: Checkpoint,
    run: Callable[[Checkpoint, Probe], Array],
    *,
    own: Array | None = None,
    beside: tuple[str, Array] | None = None,
    advice: str = "",
) -> Manifest:
    """`prove` of staged files, or of one of their adapters, up to the manifest with its results.

    Nothing is sealed; of a lossy checkpoint the probe file is new.

    Raises:
        CheckFailed, InputRefused: as `prove`.
    """
    manifest, probe = staged.manifest, probe_of(staged)
    outputs = run(staged, probe)
    if lossy_steps(manifest):
        probe = replace(probe, own=outputs if own is None else own)
        assert manifest.probe is not None
        write_probe(staged.path / manifest.probe.file, probe)
    comparisons, checks = verify_outputs(manifest, probe, outputs)
    if beside is not None:
        name, expected = beside
        limits = rounded_thresholds(manifest, noise_floor(probe))
        found, more = judge(name, replace(probe, base=None), expected, outputs, limits)
        comparisons, checks = comparisons | found, [*checks, *more]
    failed = [check for check in checks if not check.passed]
    if failed:
        which = staged.adapter and f"adapter {staged.adapter!r}"
        raise CheckFailed("; ".join(filter(None, (which, failure_text(manifest, failed), advice))))
    if own is None:
        comparisons.pop("own", None)  # they would be compared with themselves
    return _with_results(manifest, manifest.lineage[-1].command, comparisons, checks)


def record_noise(
    staging: Path, manifest: Manifest, dtype: str, run: Callable[[Probe], Array]
) -> bool:
    """Put the unmerged model's outputs in a 16-bit dtype into a staged probe, as its noise floor.

    For a merge that was rounded to `dtype` from a training in another. `run` gives the outputs of
    the unmerged model computing in `dtype`, and is called only where they are of use.

    Returns:
        Whether they were put there; not where the probe has a noise floor already.
    """
    probe = probe_of(Checkpoint(staging, manifest, ""))
    if probe.native is not None or manifest.probe is None or dtype not in UNIT_ROUNDOFF:
        return False
    native = run(probe)
    if not np.isfinite(native[probe.mask] if probe.mask is not None else native).all():
        return False
    write_probe(staging / manifest.probe.file, replace(probe, native=native))
    return True


def _with_results(
    manifest: Manifest, step: str, comparisons: dict[str, Comparison], checks: list[Check]
) -> Manifest:
    for name, comparison in comparisons.items():
        own = [check for check in checks if check.name.startswith(f"{name}:")]
        manifest = manifest.with_result(probe_result(step, name, comparison, own))
    return manifest


def sealed(
    staging: Path, manifest: Manifest, known: Mapping[str, FileEntry] | None = None
) -> Checkpoint:
    """Seal a staged directory; the checkpoint as it will be opened later."""
    written = seal(staging, manifest, known)
    return Checkpoint(staging, written, bytes_digest(written.to_bytes()))


def failure_text(manifest: Manifest, failed: list[Check]) -> str:
    """One sentence that names every limit a step did not meet."""
    told = ", ".join(
        f"{check.name}: {check.detail}"
        if texts is None
        else f"{check.name} {texts[0]} (limit {texts[1]})"
        for check, texts in ((check, check.texts()) for check in failed)
    )
    return (
        f"{manifest.lineage[-1].command}: the result differs from the model it was made of: {told}"
    )
