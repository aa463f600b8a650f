"""An adapter checkpoint whose factors are stored in 8 bits, checked against the one it was made of."""

from dataclasses import replace
from pathlib import Path

from qlx.adapters import EXACT_FILE, to_int8
from qlx.checkpoint import Checkpoint, Manifest, ProbeResult, read_probe, write_probe
from qlx.errors import CheckFailed, InputRefused, Unsupported
from qlx.models import TorchPredictor, load_model

__all__ = ["MAX_DIVERGENCE", "MIN_SAME", "store_in_int8"]

MAX_DIVERGENCE, MIN_SAME = 1e-4, 0.995
"""The largest mean KL to the outputs before, in nats, and the least share of equal arg maxima.

One that differs, a near tie, is allowed however few there are.
"""

_REFERENCE = "the adapter stored in int8, unmerged, in fp32"


def store_in_int8(staging: Path, manifest: Manifest, base: str | None) -> Manifest:
    """Store a staged adapter's factors in int8; its manifest then.

    The model that this adapter makes is the one that every later step is held against: its outputs
    become the probe's reference, and how far they are from those before is recorded.

    Raises:
        CheckFailed: they are further than `MAX_DIVERGENCE` and `MIN_SAME` allow.
        InputRefused: the base is not to be had, or there is no probe to compare on.
        Unsupported: a packed-exact adapter, or one without factors of linear layers.
    """
    from qlx.verification import base_of, compare

    if manifest.adapter is None or manifest.probe is None:
        raise InputRefused(f"{staging}: no adapter with a probe to compare on; leave out --dtype")
    if EXACT_FILE in manifest.files:
        raise Unsupported(
            "a packed-exact adapter decides on codes, which 8 bits would change; leave out --dtype"
        )
    patterns = to_int8(staging)
    fields = {"adapter": manifest.adapter.model_copy(update={"alpha_pattern": patterns})}
    staged = Checkpoint(staging, manifest.model_copy(update={**fields, "kind": "adapter"}), "")
    probe = read_probe(staging / manifest.probe.file)
    model = load_model(staged, base_of(staged, base))
    outputs = TorchPredictor(model, manifest.task).predict(probe.inputs)
    found = compare(probe.reference, outputs, probe.mask, probe.base)
    allowed = max(1.5, (1 - MIN_SAME) * found.positions)
    if found.kl_mean > MAX_DIVERGENCE or (1 - found.top1) * found.positions > allowed:
        raise CheckFailed(
            f"save-adapter: in int8 the outputs are {found.kl_mean:.3g} nats away (limit {MAX_DIVERGENCE:g}) with "
            f"{found.top1:.2%} of the answers equal (limit {MIN_SAME:.1%}); leave out --dtype"
        )
    write_probe(staging / manifest.probe.file, replace(probe, reference=outputs))
    result = ProbeResult(
        step="save-adapter",
        against=f"before int8: {manifest.probe.reference}",
        metrics=found.metrics(),
        passed=True,
    )
    record = manifest.probe.model_copy(
        update={"reference": _REFERENCE, "results": (*manifest.probe.results, result)}
    )
    return staged.manifest.model_copy(update={"probe": record})
