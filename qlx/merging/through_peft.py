"""Merging what is not LoRA (LoHa, LoKr, VeRA, IA³, OFT and other kinds of PEFT) by PEFT itself.

The base is loaded in fp32, PEFT attaches the adapter and folds it in, and whatever weight came out
different is written over the base's; every other byte stays. The probe is made from the unmerged
model just before, so the result is proven as with LoRA. This module is imported for such adapters
alone: it takes a whole model in memory, PEFT and transformers, where LoRA's path takes none of them.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qlx.checkpoint import (
    PROBE_FILE,
    Checkpoint,
    Manifest,
    Probe,
    ProbeRecord,
    QuantSpec,
    Source,
    Task,
    fingerprint_directory,
    new_checkpoint,
    next_step,
    resolve_source,
    write_probe,
)
from qlx.errors import CheckFailed, CorruptCheckpoint, Mismatch, UnsafeInput, Unsupported, require
from qlx.merging.change import Change
from qlx.merging.companions import copy_companions, main_dtype, raw_config, write_config
from qlx.merging.engine import write_merge
from qlx.merging.plan import FLOATS, MergePlan
from qlx.merging.proof import advice_for
from qlx.merging.record import merge_options, untouched_tensors, untouched_text
from qlx.merging.stream import load_tensor
from qlx.merging.tied import HEAD, tied_embedding
from qlx.models import (
    TorchPredictor,
    computing_in,
    load_base,
    make_probe,
    stored_codes,
    synthetic_inputs,
    task_of,
    tensor_names,
    torch_float,
)
from qlx.verification import prove
from qlx.verification.metrics import Array
from qlx.verification.prove import record_noise
from qlx.weights import WeightSet, open_weights, read_tensors

__all__ = ["KINDS", "NOT_MERGEABLE", "merge_through_peft"]

KINDS = (
    "ADALORA", "ADAMSS", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA",
    "GRALORA", "HIRA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "OSF", "PEANUT",
    "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS",
    "UNILORA", "VBLORA", "VERA", "WAVEFT",
)  # fmt: skip
"""Kinds of adapter, by PEFT's names, that have been tested to merge exactly."""

_VIRTUAL = "it puts learned vectors before the input or into attention, which no weight can hold"
NOT_MERGEABLE: Mapping[str, str] = dict.fromkeys(
    (
        "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT",
        "CPT", "CARTRIDGE",
    ),
    _VIRTUAL,
) | {
    "LILY": "its layers share parts, and PEFT itself cannot merge it",
    "POLY": "it mixes its parts anew for each task",
    "SHADOW": "it runs a second model beside the first",
    "XLORA": "it weights its adapters anew for each token",
}  # fmt: skip
"""Kinds that cannot become weights, and why."""

_REFERENCE = "the unmerged model in PEFT on its base, in fp32, on synthetic inputs"


def merge_through_peft(
    base: str | Path,
    directory: Path,
    kind: str,
    output: Path,
    *,
    dtype: str | None = None,
    force: bool = False,
    max_erased: float,
    report: Callable[[str], None],
) -> Checkpoint:
    """Merge a plain PEFT directory of another kind than LoRA; see `merge` for the options.

    Raises:
        Unsupported: a kind that cannot be merged, with the reason, or that is not known.
        Mismatch: the adapter does not fit the base.
        CheckFailed: it has no effect, rounding erases too much, or the outputs differ.
    """
    _require_mergeable(directory, kind)
    source = resolve_source(str(base))
    task = task_of(source)
    if stored_codes(source.path) is not None:
        raise Unsupported(
            f"{source.name}: its weights are codes, which PEFT cannot fold a {kind} adapter into; give the "
            "plain model that they were made from"
        )
    weights = open_weights(source.path)
    model = load_base(source.path, task)
    names = tensor_names(model, source.path)
    adapted = _attached(model, directory)
    targets = _separate(adapted, names, weights, raw_config(source.path))
    report(f"merging {kind} through PEFT in fp32")
    probe = make_probe(adapted, task, synthetic_inputs(task, adapted.config), None, True)
    merged = adapted.merge_and_unload(safe_merge=True)
    plan = _plan(weights, _changed(merged, names, weights), targets, dtype)
    with new_checkpoint(output, force=force) as staging:
        written = write_merge(plan, staging)
        options = merge_options(plan, written.roundings, max_erased)
        untouched = untouched_tensors(plan, written.roundings)
        if untouched:
            report(untouched_text(untouched))
        copy_companions(staging, source.path, directory)
        write_config(staging, raw_config(source.path), main_dtype(plan))
        write_probe(staging / PROBE_FILE, probe)
        options |= {"through": "peft", "peft_type": kind}
        manifest = _manifest(directory, source, task, kind, options)
        report("replaying the probe on the merged files")
        done = _proven(
            staging, manifest, plan, lambda: _attached(load_base(source.path, task), directory)
        )
    return Checkpoint(Path(output), done.manifest, done.digest)


def _proven(
    staging: Path, manifest: Manifest, plan: MergePlan, unmerged: Callable[[], Any]
) -> Checkpoint:
    """Prove the merged files; in 16 bits, in the end, by what the dtype does to the unmerged model."""
    dtype = main_dtype(plan)

    def coarse(probe: Probe) -> Array:
        model = computing_in(unmerged(), torch_float(dtype))
        return TorchPredictor(model, manifest.task).predict(probe.inputs)

    try:
        return prove(staging, manifest, advice=advice_for(plan))
    except CheckFailed:
        if not plan.rounds or not record_noise(staging, manifest, dtype, coarse):
            raise
    return prove(staging, manifest, advice=advice_for(plan))


def _require_mergeable(directory: Path, kind: str) -> None:
    if kind in NOT_MERGEABLE:
        raise Unsupported(f"{directory}: a {kind} adapter cannot be merged: {NOT_MERGEABLE[kind]}")
    if kind not in KINDS:
        raise Unsupported(f"{directory}: peft_type {kind!r} is not one that qlx merges")
    if not (directory / "adapter_model.safetensors").is_file():
        if (directory / "adapter_model.bin").exists():
            raise UnsafeInput(f"{directory}: adapter_model.bin is a pickle; save it as safetensors")
        raise CorruptCheckpoint(f"{directory}: adapter_model.safetensors is missing")


def _attached(model: Any, directory: Path) -> Any:
    """The model with the adapter, every tensor of which must have found its place."""
    peft = require("peft", "train")
    try:
        adapted = peft.PeftModel.from_pretrained(
            model, str(directory), autocast_adapter_dtype=False
        ).eval()
    except (ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise Mismatch(
            f"{directory}: the adapter does not fit this base model: {reason}"
        ) from error
    stored = read_tensors(directory / "adapter_model.safetensors")
    held = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    for name in sorted({*stored, *held}):
        if name not in stored or name not in held:
            what = "has no place in" if name in stored else "is missing for"
            raise Mismatch(f"{directory}: tensor {name!r} {what} this base model")
        if not torch.equal(stored[name], held[name].to(stored[name].dtype)):
            raise Mismatch(f"{directory}: tensor {name!r} was not loaded as it is stored")
    return adapted


def _separate(
    adapted: Any, names: Mapping[str, str], weights: WeightSet, config: Mapping[str, object]
) -> list[str]:
    """The weights of all adapted modules, none of which may be shared or lie in pieces on disk."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    tied = tied_embedding(weights, config)
    wrapped, found = (BaseTunerLayer, AuxiliaryTrainingWrapper), []
    for name, module in adapted.get_base_model().named_modules():
        if not isinstance(module, wrapped):
            continue
        stored = names.get(f"{name.removesuffix('.token_adapter')}.weight")
        if stored is None or (tied is not None and stored in (tied, HEAD)):
            why = "its weight is tied to another" if stored or tied else "it lies in pieces on disk"
            raise Unsupported(f"module {name!r} cannot be merged through PEFT: {why}")
        found.append(stored)
    return found


def _changed(merged: Any, names: Mapping[str, str], weights: WeightSet) -> dict[str, torch.Tensor]:
    """The parameters that merging made different from the base's, by their names on disk."""
    changed = {}
    for name, value in merged.state_dict().items():
        stored = names.get(name)
        if stored is None or stored not in weights or not value.is_floating_point():
            continue
        value = value.detach().contiguous()
        if not torch.equal(value, load_tensor(weights, stored).float()):
            changed[stored] = value
    return changed


def _plan(
    weights: WeightSet,
    changed: Mapping[str, torch.Tensor],
    targets: Sequence[str],
    dtype: str | None,
) -> MergePlan:
    """Every changed parameter as trained whole; `targets` are the weights of adapted modules."""
    if dtype is not None and dtype not in FLOATS:
        raise Unsupported(f"dtype {dtype!r} is not one of {', '.join(FLOATS)}")
    cast = None if dtype is None else FLOATS[dtype]
    changes = {
        name: Change(name, cast or weights[name].dtype, tuple(value.shape), value=value)
        for name, value in sorted(changed.items())
    }
    moved = {name.rpartition(".")[0] for name in changes}
    untouched = sorted(name for name in targets if name.rpartition(".")[0] not in moved)
    return MergePlan(weights, QuantSpec(), "original", changes, cast, untouched=tuple(untouched))


def _manifest(
    directory: Path, source: Source, task: Task, kind: str, options: dict[str, object]
) -> Manifest:
    step = next_step(
        "merge", parents=(fingerprint_directory(directory), source.fingerprint), options=options
    )
    base = source.reference()
    return Manifest(
        kind="merged",
        task=task,
        tag=f"{base.name.rstrip('/').rpartition('/')[2]}_{kind}_merged"[:200],
        base=base,
        lineage=(step,),
        probe=ProbeRecord(reference=_REFERENCE),
    )
