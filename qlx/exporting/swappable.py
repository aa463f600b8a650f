"""`export_adapters`: a base once, and beside it any number of adapters that are chosen when it runs.

The graph is the base as the adapters were trained on it, with inputs for their updates; each adapter is
a file in onnxruntime's own format, with a probe of its own.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn

from qlx.checkpoint import (
    PROBE_FILE,
    AdapterEntry,
    Checkpoint,
    Manifest,
    Probe,
    ProbeRecord,
    Source,
    Step,
    check_adapter_name,
    check_output,
    new_checkpoint,
    next_step,
    open_checkpoint,
    resolve_source,
    seal,
    write_probe,
)
from qlx.errors import CheckFailed, InputRefused, Mismatch, Unsupported, UsageError
from qlx.exporting.export import (
    COMMAND,
    Arithmetic,
    arithmetic_of,
    report_rounding,
    write_language,
)
from qlx.exporting.fused import can_fuse
from qlx.exporting.graph import build_graph, write_graph
from qlx.exporting.quiet import quiet
from qlx.exporting.separate import make_swappable
from qlx.exporting.updates import Update, adapter_updates, write_adapter_file
from qlx.merging.companions import COMPANION_FILES, copy_companions
from qlx.models import STORED_DTYPE, computing_in, forward_logits, load_as_trained
from qlx.runtime import ADAPTER_SUFFIX, OnnxModel, OnnxPredictor, class_labels, open_model
from qlx.runtime.session import runtime_errors
from qlx.verification import compare, judged, needs_base, probe_of, sealed

__all__ = ["export_adapters", "named_adapters"]

MIXED_TOLERANCE = 1e-5
"""Relative distance of a row in a mixed batch from the same row in a batch of its adapter alone."""

_OWN_FILES = ("config.json", "generation_config.json")
_REFERENCE = "the base as the adapters were trained on it, in fp32"


def named_adapters(given: Iterable[str]) -> list[tuple[str, Path]]:
    """(name, directory) of `NAME=DIR`, or of `DIR`, whose name is then the adapter's.

    Raises:
        UsageError: no such directory, a name that cannot be one, or one that is given twice.
    """
    named: list[tuple[str, Path]] = []
    for text in given:
        name, equals, rest = text.partition("=")
        whole = Path(text)
        if whole.is_dir() or not equals:
            name, directory = whole.resolve().name, whole
        else:
            directory = Path(rest)
        if equals and not rest:
            raise UsageError(f"--adapter {text!r}: names no directory after the equals sign")
        if not directory.is_dir():
            raise UsageError(f"--adapter {text!r}: there is no directory {directory}")
        try:
            check_adapter_name(name)
        except ValueError as error:
            raise UsageError(f"--adapter {text!r}: {error}; write NAME=DIR") from error
        if name.lower() in {other.lower() for other, _ in named}:
            raise UsageError(
                f"--adapter {text!r}: there are two adapters {name!r}; name them, as in first=DIR"
            )
        named.append((name, directory))
    return named


def export_adapters(
    base: Source | str | Path,
    adapters: Sequence[str | tuple[str, Path | str]],
    output: Path | str,
    *,
    precision: str | None = None,
    accuracy_level: int | None = None,
    head: str | None = None,
    force: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Checkpoint:
    """Export a base with swappable adapters; the probes of all of them are replayed before it appears.

    Args:
        base: what the adapters were trained on: a directory or a hub name.
        adapters: runs or adapter checkpoints, as directories or as (name, directory).
        output, precision, accuracy_level, head, force, report: as for `export_onnx`.

    Raises:
        UsageError: a name is wrong or given twice, or no adapter is given.
        Mismatch: an adapter is for another base, quantization, tokenizer or other classes.
        Unsupported: an adapter changes what cannot be an input, or the base cannot be exported.
        CheckFailed: outputs are outside the tolerance; nothing is left behind.
    """
    texts = (each if isinstance(each, str) else f"{each[0]}={each[1]}" for each in adapters)
    named = named_adapters(texts)
    if not named:
        raise UsageError("no adapter is given")
    given = base.path if isinstance(base, Source) else base
    check_output(Path(output), (given, *(path for _, path in named)), force=force)
    source = base if isinstance(base, Source) else resolve_source(str(base))
    opened = {name: open_checkpoint(path) for name, path in named}
    first = _require_together(source, list(opened.values()))
    scheme = first.manifest.quantization.scheme
    arithmetic = arithmetic_of(first.manifest.task, scheme, precision, accuracy_level, head)
    job = _Job(source, opened, arithmetic)
    with new_checkpoint(Path(output), force=force) as staging:
        report(f"tracing the base ({job.arithmetic.precision}) with room for {len(named)} adapters")
        job, attention = job.written(staging)
        report_rounding(job.arithmetic, report)
        report("replaying the probes under onnxruntime")
        sealed(staging, job.proven(staging, seal(staging, job.manifest(attention))))
    return open_checkpoint(Path(output))


def _require_together(source: Source, adapters: Sequence[Checkpoint]) -> Checkpoint:
    """Check what the records say of all adapters before anything is loaded; returns the first."""
    first = adapters[0]
    for each in adapters:
        manifest = each.manifest
        if not needs_base(manifest) or manifest.base is None:
            raise InputRefused(
                f"{each.path}: a checkpoint of kind {manifest.kind!r} is no adapter to swap; give adapters with "
                "--adapter, and their base in place of the checkpoint"
            )
        if manifest.adapter is not None and manifest.adapter.type == "exact":
            raise Unsupported(
                f"{each.path}: an exact adapter moves the codes of its base, which cannot be swapped; export it "
                "alone: without --adapter"
            )
        if manifest.base.fingerprint != source.fingerprint:
            raise Mismatch(
                f"{each.path}: was trained on {manifest.base.name} ({manifest.base.fingerprint[7:19]}…), and the base "
                f"given is {source.name} ({source.fingerprint[7:19]}…); export it with its own base"
            )
        for what, mine, theirs in zip(_FACTS, _facts(each), _facts(first), strict=True):
            if mine != theirs:
                raise Mismatch(
                    f"{each.path}: {what} is another ({mine or 'none'}) than that of {first.path} "
                    f"({theirs or 'none'}), so that one base cannot serve both; export them apart"
                )
        _require_same_files(source, each, first)
    return first


_FACTS = ("the task", "the quantization of its base", "its codes' fingerprint", "the base's dtype")


def _facts(adapter: Checkpoint) -> tuple[object, ...]:
    spec = adapter.manifest.quantization
    scheme = (spec.scheme, spec.activation_bits) if spec.quantized else None
    dtype = spec.extras.get(STORED_DTYPE, "float32")
    return adapter.manifest.task, scheme, spec.fingerprint, dtype


def _require_same_files(source: Source, adapter: Checkpoint, first: Checkpoint) -> None:
    """Check that inputs are prepared, and outputs named, in one way for all."""
    for name in sorted(set(COMPANION_FILES) - set(_OWN_FILES)):
        pair = [each.path / name for each in (adapter, first)]
        contents = [path.read_bytes() if path.is_file() else None for path in pair]
        if contents[0] != contents[1]:
            raise Mismatch(
                f"{pair[0]}: is not that of {first.path}, and adapters of one graph share tokenizer and "
                "preprocessing; export them apart"
            )
    if adapter.manifest.task != "causal-lm" and class_labels(adapter.path) != class_labels(
        source.path
    ):
        raise Mismatch(
            f"{adapter.path}: has other classes than its base {source.name}, whose head it does not use; "
            "export it alone, without --adapter"
        )


@dataclass(frozen=True)
class _Job:
    """An export whose inputs fit together."""

    source: Source
    adapters: Mapping[str, Checkpoint]
    arithmetic: Arithmetic

    @property
    def first(self) -> Checkpoint:
        return next(iter(self.adapters.values()))

    @property
    def task(self) -> str:
        return self.first.manifest.task

    def written(self, staging: Path) -> tuple["_Job", dict[str, object]]:
        """Write everything but the manifest.

        Returns:
            The job with what was rounded; what the manifest says of the graph's attention.
        """
        with quiet():
            model = load_as_trained(self.first, self.source)
            computing_in(model, torch.float32).eval()
            write_probe(staging / PROBE_FILE, self._base_probe(model))
            updates = {n: adapter_updates(model, each.path) for n, each in self.adapters.items()}
        prefixes = make_swappable(model, _places(updates.values()))
        arithmetic = self.arithmetic.applied(model)
        half = self.arithmetic.precision == "fp16"
        fuse = can_fuse(model, self.task)
        graph = build_graph(
            model, self.task, half=half, prefixes=prefixes, swappable=True, fuse=fuse
        )
        write_graph(graph, staging, self.task)
        copy_companions(staging, self.first.path)
        for name, each in updates.items():
            write_adapter_file(staging / _file(name), each)
            write_probe(
                staging / _probe_file(name), replace(probe_of(self.adapters[name]), own=None)
            )
        job = replace(self, arithmetic=arithmetic)
        return job, write_language(model, self.task, staging, fused=fuse)

    def _base_probe(self, model: nn.Module) -> Probe:
        """The first adapter's inputs, with what the base computes of them.

        Not the outputs that its training recorded with the adapter off: PEFT leaves trained biases on.
        """
        probe = probe_of(self.first)
        reference = forward_logits(model, self.first.manifest.task, probe.inputs)
        return Probe(probe.task, probe.inputs, reference=reference, labels=probe.labels)

    def manifest(self, attention: dict[str, object]) -> Manifest:
        """The manifest before any replay."""
        recorded = self.first.manifest
        name = self.source.reference().name.rstrip("/").rpartition("/")[2]
        return Manifest(
            kind="onnx",
            task=recorded.task,
            tag=f"{name}_{self.arithmetic.suffix}"[:200],
            base=self.source.reference(),
            quantization=recorded.quantization,
            lineage=(self._step([each.digest for each in self.adapters.values()], attention),),
            probe=ProbeRecord(reference=_REFERENCE),
            adapters={n: self._entry(n, each, attention) for n, each in self.adapters.items()},
        )

    def _step(self, digests: Sequence[str], attention: dict[str, object]) -> Step:
        options = {**self.arithmetic.options(), **attention, "layout": "swappable"}
        return next_step(COMMAND, parents=[*digests, self.source.fingerprint], options=options)

    def _entry(self, name: str, adapter: Checkpoint, attention: dict[str, object]) -> AdapterEntry:
        recorded = adapter.manifest
        assert recorded.adapter is not None
        assert recorded.probe is not None
        return AdapterEntry(
            file=_file(name),
            digest=adapter.digest,
            tag=f"{recorded.tag}_{self.arithmetic.suffix}"[:200],
            adapter=recorded.adapter,
            lineage=(*recorded.lineage, self._step([adapter.digest], attention)),
            probe=recorded.probe.model_copy(update={"file": _probe_file(name)}),
        )

    def proven(self, staging: Path, manifest: Manifest) -> Manifest:
        """The manifest with the results of all replays: of the base, of each adapter, of both in one batch."""
        staged = Checkpoint(staging, manifest, "")
        model = open_model(staging)
        base = self._judged(staged, model)
        entries = {
            name: entry.model_copy(
                update={"probe": self._judged(staged.with_adapter(name), model).probe}
            )
            for name, entry in manifest.adapters.items()
        }
        _check_mixed(model, probe_of(staged), self.arithmetic.advice)
        return manifest.model_copy(update={"probe": base.probe, "adapters": entries})

    def _judged(self, staged: Checkpoint, model: OnnxModel) -> Manifest:
        reference, arithmetic = probe_of(staged).reference, self.arithmetic
        return judged(
            staged,
            lambda each, probe: OnnxPredictor(model, adapter=each.adapter).predict(probe.inputs),
            beside=("the exported checkpoint", reference) if arithmetic.rounds_products else None,
            advice=arithmetic.advice,
        )


def _places(adapters: Iterable[Mapping[str, Update]]) -> dict[str, frozenset[str]]:
    """By module, the parameters that any adapter has there."""
    places: dict[str, frozenset[str]] = {}
    for updates in adapters:
        for module, update in updates.items():
            parts = {name.rpartition(".")[2] for name in update.inputs(module)}
            places[module] = places.get(module, frozenset()) | parts
    return dict(sorted(places.items()))


def _file(name: str) -> str:
    return f"{name}{ADAPTER_SUFFIX}"


def _probe_file(name: str) -> str:
    return f"{name}.probe.safetensors"


def _check_mixed(model: OnnxModel, probe: Probe, advice: str) -> None:
    """Check that rows with adapters of their own get what each adapter alone gives them.

    `advice` ends the message where they do not.

    Raises:
        CheckFailed: they do not.
        Unsupported: an adapted layer's inputs do not have the batch's rows at their first axis.
    """
    names = [None, *islice(model.adapters.names, 3)]
    choice = [names[row % len(names)] for row in range(probe.count)]
    try:
        mixed = OnnxPredictor(model, adapter=choice).predict(probe.inputs)
    except runtime_errors() as error:
        raise Unsupported(
            f"{COMMAND}: in this architecture the rows of a batch cannot have adapters of their own "
            f"({str(error).splitlines()[0]}); export each adapter alone, without --adapter"
        ) from error
    alone = np.empty_like(mixed)
    for name in dict.fromkeys(choice):
        rows = [row for row, chosen in enumerate(choice) if chosen == name]
        outputs = OnnxPredictor(model, adapter=name).predict(probe.inputs)
        alone[rows] = outputs[rows]
    found = compare(alone, mixed, probe.mask).relative
    if found > MIXED_TOLERANCE:
        raise CheckFailed(
            f"{COMMAND}: rows of one batch with adapters of their own differ by {found:.3g} from each adapter alone "
            f"(limit {MIXED_TOLERANCE:g}); {advice}"
        )
