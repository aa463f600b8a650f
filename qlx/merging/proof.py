"""How a merge is proven when memory is short: never not at all, and never without saying how.

In this order: the merged model is loaded and run on the probe; it is run layer by layer from its
files; rows of every tensor are computed again in fp64. The first two are one check with the same
limits. The last is weaker, and is taken only where neither fits or the model cannot be run by layers.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from qlx.checkpoint import Checkpoint, FileEntry, Manifest, Probe
from qlx.errors import InputRefused, Unsupported
from qlx.merging.budget import memory_available, memory_held
from qlx.merging.plan import MergePlan
from qlx.merging.sampled import check_sample
from qlx.models import TorchPredictor, streamed_bytes, streamed_model
from qlx.verification import prove, replay, sealed
from qlx.verification.metrics import Array
from qlx.weights import open_weights

__all__ = ["Proof", "advice_for", "proof_bytes", "proofs_within", "prove_merge"]

Proof = Literal["replay", "replay by layers", "sampled rows"]

_LOADED = 2 * 2**30  # fp32 weights up to this size are loaded, larger ones are run by layers
_LIBRARIES = 224 * 2**20  # what importing transformers takes
_SPARE = 64 * 2**20


def proof_bytes(plan: MergePlan, how: Proof) -> int:
    """What a proof takes beyond what the process holds, in bytes, rather more than less.

    Loading holds all weights in fp32 and, while it reads them, a file's pages as well.
    """
    imports = 0 if "transformers" in sys.modules else _LIBRARIES
    if how == "sampled rows":
        return _SPARE
    if how == "replay by layers":
        return imports + _SPARE + streamed_bytes(plan.weights)
    stored = sum(path.stat().st_size for path in plan.weights.files)
    return imports + _SPARE + _parameters(plan) * 4 + stored


def _parameters(plan: MergePlan) -> int:
    return sum(info.count for info in plan.weights.values())


def proofs_within(plan: MergePlan, max_ram: int | None) -> list[Proof]:
    """The proofs that memory allows, the preferred one first; there is always one."""
    free = memory_available() if max_ram is None else max_ram - memory_held()
    order: list[Proof] = ["replay", "replay by layers"]
    if _parameters(plan) * 4 > _LOADED:
        order.reverse()
    return [*(how for how in order if proof_bytes(plan, how) <= free), "sampled rows"]


_UNMERGED = "unmerged on the original base"


def prove_merge(
    staging: Path,
    manifest: Manifest,
    plan: MergePlan,
    known: Mapping[str, FileEntry],
    *,
    proofs: Sequence[Proof],
    unmerged: Array | None,
) -> Checkpoint:
    """Prove the merged files in `staging` by the first of `proofs` that is possible, and seal them.

    The manifest says which one it was. `unmerged` are the outputs of the adapter on the base that
    it was merged onto, where training saw another: rounding aside, those of the merged files.

    Raises:
        CheckFailed: they are not what the adapter and its base make.
        InputRefused: there is no probe.
    """
    if manifest.probe is None:
        raise InputRefused(
            f"{manifest.tag}: carries no probe, so the merge could not be checked; make one with save-adapter"
        )
    for how in proofs:
        said = _said(manifest, proof=how)
        if how == "sampled rows":
            rows = check_sample(plan, open_weights(staging))
            return sealed(staging, _said(said, checked_rows=rows), known)
        try:
            run = _by_layers if how == "replay by layers" else _loaded
            beside = None if unmerged is None or not plan.rounds else (_UNMERGED, unmerged)
            own = None if plan.rounds else unmerged
            return prove(
                staging, said, own=own, beside=beside, advice=advice_for(plan), known=known, run=run
            )
        except Unsupported:
            if how == "replay":
                raise
    raise AssertionError("sampled rows are always possible")


def advice_for(plan: MergePlan) -> str:
    """What to do where a merge gives other outputs than the unmerged model."""
    check = (
        "run `qlx verify ADAPTER --base BASE`: where that fails too, adapter and base no longer give "
        "what training saw; where it passes, the merge is at fault, so report it"
    )
    return f"merge with --dtype float32; if that fails too, {check}" if plan.rounds else check


def _said(manifest: Manifest, **options: object) -> Manifest:
    """The manifest with more options recorded for its last step."""
    *steps, last = manifest.lineage
    last = last.model_copy(update={"options": {**last.options, **options}})
    return manifest.model_copy(update={"lineage": (*steps, last)})


def _loaded(staged: Checkpoint, probe: Probe) -> Array:
    return replay(staged, None, probe)


def _by_layers(staged: Checkpoint, probe: Probe) -> Array:
    task = staged.manifest.task
    model = streamed_model(staged.path, task)
    return np.asarray(TorchPredictor(model, task).predict(probe.inputs))
