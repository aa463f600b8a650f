"""`merge`: plan, stream, prove. No model is instantiated until the merged files are replayed."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from qlx.adapters import read_peft_type, read_recorded, require_exact_codes
from qlx.checkpoint import (
    Checkpoint,
    FileEntry,
    Manifest,
    Probe,
    QuantSpec,
    Source,
    check_output,
    is_checkpoint,
    naming,
    new_checkpoint,
    next_step,
    open_checkpoint,
    require_base,
)
from qlx.errors import CheckFailed, InputRefused, Unsupported, UsageError
from qlx.merging.budget import Estimate, estimate, threads_within
from qlx.merging.coded import open_base
from qlx.merging.combine import Combination, combine
from qlx.merging.companions import (
    carry_probe,
    copy_companions,
    main_dtype,
    raw_config,
    write_config,
)
from qlx.merging.engine import Written, write_merge
from qlx.merging.plan import MergePlan, Onto, choose_onto, plan_merge
from qlx.merging.proof import Proof, proof_bytes, proofs_within, prove_merge
from qlx.merging.record import merge_options, untouched_tensors, untouched_text
from qlx.merging.values import MAX_ERASED, check_codes, require_codes
from qlx.models import STORED_DTYPE, TorchPredictor, load_model, torch_float
from qlx.quant import GRID_FILE
from qlx.verification import base_of, needs_base, replay
from qlx.verification.base import find_base
from qlx.verification.metrics import Array
from qlx.verification.prove import record_noise
from qlx.weights import write_tensors

__all__ = ["Outline", "adapter_checkpoint", "merge", "outline", "plan_of"]

Dtypes = tuple[str | None, str | None]
"""What all floats are written in, and a language model's head alone; None keeps each tensor's own."""


def merge(
    base: str | Path | None,
    adapter_dirs: Sequence[Path],
    output: Path,
    *,
    onto: Onto | None = None,
    dtype: str | None = None,
    head_dtype: str | None = None,
    force: bool = False,
    max_erased: float = MAX_ERASED,
    combination: Combination | None = None,
    max_ram: int | None = None,
    report: Callable[[str], None] | None = None,
) -> Checkpoint:
    """Fold one adapter or several into their base's weights and prove on the probe that nothing changed.

    `base` may be None where the recorded name resolves. `onto` is `as-trained` (the default where
    the record says how the base was quantized: exactly the tensors quantized in training go
    through their codec first) or `original`. `dtype` is float32, bfloat16, float16 or None to keep
    each tensor's own, `head_dtype` the same for a language model's head alone. Several adapters are
    combined first, exactly (`cat`, weights 1) unless `combination` says otherwise. `max_ram` limits
    the memory of the whole process, in bytes: fewer threads work, and the check is one that fits
    (see `qlx.merging.proof`).

    Raises:
        Mismatch: adapter, base and records do not belong together.
        Unsupported: the adapter uses a feature that cannot be merged.
        CheckFailed: the adapter has no effect, rounding erases more than `max_erased` of it, or
            the merged model's outputs differ from the unmerged one's.
        NoRoom: the disk or `max_ram` is too small; the message says what is needed.
    """
    check_output(Path(output), (base, *adapter_dirs), force=force)
    tell = report or (lambda line: None)
    _check_use(adapter_dirs, combination)
    if not 0 <= max_erased <= 1:
        raise UsageError(f"--allow-erased {max_erased:g} is no share between 0 and 1")
    foreign = _other_kind(adapter_dirs, combination)
    if foreign is not None and max_ram is not None:
        raise UsageError(
            f"--max-ram cannot be kept with a {foreign} adapter, which PEFT merges with the whole "
            "model in memory; leave it out"
        )
    if foreign is not None and head_dtype is not None:
        raise UsageError(f"--head-dtype is not for a {foreign} adapter, which PEFT merges whole")
    if foreign is not None and base is not None:
        from qlx.merging.through_peft import merge_through_peft

        choose_onto(QuantSpec(), onto, False)
        return merge_through_peft(
            base,
            Path(adapter_dirs[0]),
            foreign,
            output,
            dtype=dtype,
            force=force,
            max_erased=max_erased,
            report=tell,
        )
    with _one_adapter(adapter_dirs, base, combination) as (adapter, recorded):
        source, plan = _planned(adapter, base, onto, (dtype, head_dtype), recorded)
        threads = threads_within(plan, max_ram)
        tell(
            f"merging {len(plan.changes)} of {len(plan.weights)} tensors onto the {plan.onto} base"
        )
        with new_checkpoint(output, force=force) as staging:
            written = write_merge(plan, staging, workers=threads)
            source = replace(source, known=written.fingerprint)
            require_base(adapter.manifest, source)
            check_codes(plan, written.codes)
            _keep_grid(staging, adapter.manifest, written)
            options = merge_options(plan, written.roundings, max_erased)
            untouched = untouched_tensors(plan, written.roundings)
            if untouched:
                tell(untouched_text(untouched))
            copy_companions(staging, source.path, adapter.path)
            write_config(staging, {**raw_config(adapter.path), **plan.config}, main_dtype(plan))
            carry_probe(adapter, staging)
            manifest = _manifest(adapter, source, options)
            proofs = proofs_within(plan, max_ram)
            tell(f"checking the merged files: {proofs[0]}")
            done = _finish(staging, manifest, adapter, source, plan, written.files, proofs)
    return Checkpoint(Path(output), done.manifest, done.digest)


def _check_use(paths: Sequence[Path], combination: Combination | None) -> None:
    """Check what can be known before anything is read."""
    if not paths:
        raise UsageError("merge needs an adapter; give --adapter DIR")
    (combination or Combination()).weights_for(len(paths))


def _other_kind(paths: Sequence[Path], combination: Combination | None) -> str | None:
    """What kind of adapter a plain PEFT directory holds, if it is not LoRA.

    Raises:
        Unsupported: it is to be combined with others, or weighted.
    """
    plain = [Path(path) for path in paths if not is_checkpoint(path)]
    for path, kind in ((path, read_peft_type(path)) for path in plain):
        if kind != "LORA" and (len(paths) > 1 or combination is not None):
            raise Unsupported(
                f"{path}: only LoRA adapters can be combined or weighted, this is a {kind} one; merge "
                "it alone, without --weight and --combine"
            )
        if kind != "LORA":
            return kind
    return None


@dataclass(frozen=True)
class Outline:
    """A merge that is not made: what it would do and take, and how it would be proven."""

    onto: Onto
    dtype: str
    in_place: bool
    figures: Estimate
    proof: Proof
    proof_bytes: int


def outline(
    base: str | Path | None,
    adapter_dirs: Sequence[Path],
    *,
    onto: Onto | None = None,
    dtype: str | None = None,
    head_dtype: str | None = None,
    combination: Combination | None = None,
    max_ram: int | None = None,
) -> Outline:
    """Plan `merge` with the same arguments and stop there: nothing is written.

    The weights of the base are not read, so that it is the recorded one, and quantizes to the
    recorded codes, is left to the merge.

    Raises:
        Mismatch, Unsupported, NoRoom: as `merge`, as far as headers and records tell.
    """
    _check_use(adapter_dirs, combination)
    foreign = _other_kind(adapter_dirs, combination)
    if foreign is not None:
        raise UsageError(
            f"--dry-run cannot tell what PEFT will do with a {foreign} adapter; merge it without"
        )
    with _one_adapter(adapter_dirs, base, combination) as (adapter, recorded):
        _, plan = _planned(adapter, base, onto, (dtype, head_dtype), recorded)
        proof = proofs_within(plan, max_ram)[0]
        return Outline(
            onto=plan.onto,
            dtype=main_dtype(plan),
            in_place=plan.in_place,
            figures=estimate(plan, max_ram),
            proof=proof,
            proof_bytes=proof_bytes(plan, proof),
        )


@contextmanager
def _one_adapter(
    paths: Sequence[Path], base: str | Path | None, combination: Combination | None
) -> Iterator[tuple[Checkpoint, bool]]:
    """The adapter to merge: the only one given, or what several are combined to."""
    with ExitStack() as stack:
        opened = [stack.enter_context(adapter_checkpoint(Path(path), base)) for path in paths]
        if len(opened) == 1 and combination is None:
            yield opened[0]
            return
        adapters = [adapter for adapter, _ in opened]
        _require_deltas(adapters)
        source = base_of(adapters[0], base)
        assert source is not None
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qlx-combine-")))
        stack.enter_context(naming(scratch / "adapter", "the combined adapter"))
        made = combine(adapters, source, combination or Combination(), scratch / "adapter")
        yield made, all(recorded for _, recorded in opened)


def _require_deltas(adapters: Sequence[Checkpoint]) -> None:
    """Check that adapters can be added up, which those that move codes cannot."""
    for adapter in adapters:
        if adapter.manifest.adapter is not None and adapter.manifest.adapter.type == "exact":
            raise Unsupported(
                f"{adapter.path}: an exact adapter moves codes and cannot be combined or weighted; merge it alone, "
                "without --weight and --combine"
            )


@contextmanager
def adapter_checkpoint(path: Path, base: str | Path | None) -> Iterator[tuple[Checkpoint, bool]]:
    """An adapter directory as a checkpoint, and whether it records how its base was quantized.

    A plain PEFT directory is imported for the time being; its probe then comes from the unmerged
    model on `base`.

    Raises:
        InputRefused: the directory holds no adapter.
    """
    if is_checkpoint(path):
        checkpoint = open_checkpoint(path)
        if not needs_base(checkpoint.manifest):
            raise InputRefused(
                f"{path}: a checkpoint of kind {checkpoint.manifest.kind!r} holds no adapter to merge"
            )
        yield checkpoint, _records_base_values(checkpoint.manifest)
        return
    if base is None:
        raise UsageError(
            f"{path}: a plain PEFT directory does not name its base by content; give --base"
        )
    from qlx.training import save_adapter

    with tempfile.TemporaryDirectory(prefix="qlx-import-") as scratch:
        imported = Path(scratch) / "adapter"
        with naming(imported, str(path)):
            yield save_adapter(path, imported, base=str(base)), False


def _records_base_values(manifest: Manifest) -> bool:
    """Whether training left a note of how it loaded the base; an imported adapter has none."""
    spec = manifest.quantization
    imported = any(step.options.get("imported") for step in manifest.lineage)
    return not imported and (spec.quantized or STORED_DTYPE in spec.extras)


def _planned(
    adapter: Checkpoint,
    base: str | Path | None,
    onto: Onto | None,
    dtypes: Dtypes,
    recorded: bool,
) -> tuple[Source, MergePlan]:
    """The base and a plan that holds if the base turns out to be the recorded one.

    Whether it is takes reading all of it, which the merge does anyway. Where no plan can be made,
    that the base is the wrong one is the better explanation.
    """
    source = find_base(adapter, base)
    assert source is not None
    try:
        return source, _plan(adapter, source, onto, dtypes, recorded)
    except InputRefused:
        require_base(adapter.manifest, source)
        raise


def plan_of(
    adapter: Checkpoint,
    source: Source,
    onto: Onto | None,
    dtype: str | None,
    recorded: bool,
    *,
    check_codes: bool = True,
    to_pack: bool = False,
) -> MergePlan:
    """The checked plan for merging `adapter` into `source`; see `merge` for the options.

    Without `check_codes` the base is not quantized now: `write_merge` finds its codes on the way, and
    whoever calls it compares them with the record.

    Raises:
        Mismatch: they do not belong together, or quantizing the base gives other codes.
        Unsupported: the adapter uses a feature that cannot be merged.
    """
    plan = _plan(adapter, source, onto, (dtype, None), recorded, to_pack=to_pack)
    if check_codes:
        require_codes(plan)
    return plan


def _plan(
    adapter: Checkpoint,
    source: Source,
    onto: Onto | None,
    dtypes: Dtypes,
    recorded: bool,
    *,
    to_pack: bool = False,
) -> MergePlan:
    manifest = adapter.manifest
    assert manifest.adapter is not None
    return plan_merge(
        open_base(source.path),
        manifest,
        read_recorded(adapter.path, manifest.adapter),
        onto=choose_onto(manifest.quantization, onto, recorded),
        dtype=dtypes[0],
        head_dtype=dtypes[1],
        config=raw_config(source.path),
        to_pack=to_pack,
    )


def _keep_grid(staging: Path, manifest: Manifest, written: Written) -> None:
    """Keep the scales that an exact adapter's values are multiples of, for whoever packs them.

    Raises:
        Mismatch: its codes are not those that training ended with.
    """
    if written.moved is None:
        return
    assert manifest.adapter is not None
    require_exact_codes(manifest.adapter, written.moved, manifest.tag)
    write_tensors(staging / GRID_FILE, dict(sorted(written.grids.items())))


def _manifest(adapter: Checkpoint, source: Source, options: dict[str, object]) -> Manifest:
    step = next_step("merge", parents=(adapter.digest, source.fingerprint), options=options)
    manifest = adapter.manifest
    return manifest.with_step(step, kind="merged", tag=f"{manifest.tag}_merged", files={})


def _finish(
    staging: Path,
    manifest: Manifest,
    adapter: Checkpoint,
    source: Source,
    plan: MergePlan,
    known: Mapping[str, FileEntry],
    proofs: Sequence[Proof],
) -> Checkpoint:
    """Prove the merged files; those on the original base must agree with the adapter run on it.

    That run needs the base in memory; where it does not fit, the merged files' own outputs are kept.
    What a merge in 16 bits may differ by is, in the end, a matter of what that dtype does to the
    unmerged model; that is measured only where the general limit is not met, and the model fits.
    """
    unmerged = None
    if plan.onto == "original" and plan.spec.quantized and proofs[0] == "replay":
        unquantized = adapter.manifest.model_copy(update={"quantization": QuantSpec()})
        unmerged = replay(Checkpoint(adapter.path, unquantized, adapter.digest), source)
    dtype = main_dtype(plan)

    def proven() -> Checkpoint:
        return prove_merge(staging, manifest, plan, known, proofs=proofs, unmerged=unmerged)

    def coarse(probe: Probe) -> Array:
        model = load_model(adapter, source, compute_dtype=torch_float(dtype))
        return TorchPredictor(model, manifest.task).predict(probe.inputs)

    try:
        return proven()
    except CheckFailed:
        if not plan.rounds or "replay" not in proofs:
            raise
        if not record_noise(staging, manifest, dtype, coarse):
            raise
    return proven()
