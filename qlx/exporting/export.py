"""`export_onnx`: a checkpoint of any torch kind as a verified ONNX directory."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from qlx.checkpoint import (
    PROBE_FILE,
    Checkpoint,
    Manifest,
    Probe,
    Source,
    check_output,
    new_checkpoint,
    next_step,
    open_checkpoint,
    seal,
    write_probe,
)
from qlx.errors import InputRefused, Unsupported, UsageError
from qlx.exporting.fused import can_fuse
from qlx.exporting.genai import write_generation_config
from qlx.exporting.graph import build_graph, write_graph
from qlx.exporting.quiet import quiet
from qlx.exporting.separate import separate_adapter
from qlx.merging.companions import copy_companions
from qlx.verification import base_of, needs_base, probe_of
from qlx.verification.prove import prove

__all__ = [
    "ACCURACY_LEVELS",
    "COMMAND",
    "HEADS",
    "PRECISIONS",
    "Arithmetic",
    "arithmetic_of",
    "export_onnx",
    "report_rounding",
    "write_language",
]

PACKED = ("nf4", "fp4", "int8", "int4", "int2", "ternary")
PRECISIONS = ("fp32", "fp16", *PACKED)
ACCURACY_LEVELS = (0, 4)
"""Of products with packed weights: float32, or inputs (and the levels of nf4 and fp4) rounded to 8 bits."""

COMMAND = "export-onnx"

HEADS = ("int8",)
"""What a language model's head can be packed to; otherwise it stays as the checkpoint has it."""

_ADVICE = (
    "run `qlx verify` on the checkpoint: where that fails too, it is no longer the model it was; where it passes, "
    "this model's export is at fault, so report it"
)
"""What to do where a graph that rounds nothing gives other outputs."""


def export_onnx(
    checkpoint: Path | str | Checkpoint,
    output: Path | str,
    *,
    base: Source | str | Path | None = None,
    precision: str | None = None,
    accuracy_level: int | None = None,
    head: str | None = None,
    force: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Checkpoint:
    """Export a checkpoint and replay its probe under onnxruntime before the directory appears.

    A merged checkpoint becomes an fp32 graph (or fp16: half the bytes, fp32 arithmetic). A packed one
    keeps its codes and scales: those of nf4 and fp4 byte for byte, integers in the layout of
    onnxruntime's kernel. A run or an adapter keeps the adapter apart from its base, which stays
    quantized as it was trained on.

    Args:
        checkpoint: a run, adapter, merged or packed checkpoint.
        output: the directory to create; refused if it exists, unless `force`.
        base: the base model of a run or adapter; by default the one it records.
        precision: None keeps the checkpoint's own; `fp16` is possible for unquantized weights.
        accuracy_level: of products with packed weights: 0 (the default) multiplies in float32, 4 rounds
            each run of inputs to 8 bits and says the codes of nf4 and fp4 in 8-bit integers, which is faster
            and lossy; the price is measured and recorded.
        head: `int8` stores a language model's head in 8 bits, a fourth of the bytes that each token reads of it, and
            rounds its inputs to 8 bits; the price is measured and recorded.
        report: called with one line per stage.

    Raises:
        InputRefused: the checkpoint is ONNX already, or its base is not to be had.
        Unsupported: the precision does not fit the checkpoint, or the architecture cannot be traced.
        Mismatch: the base is not the one the adapter was trained on.
        CheckFailed: the exported model's outputs are outside the tolerance; nothing is left behind.
    """
    given = checkpoint.path if isinstance(checkpoint, Checkpoint) else Path(checkpoint)
    check_output(
        Path(output), (given, base.path if isinstance(base, Source) else base), force=force
    )
    source = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(given)
    _require_exportable(source)
    scheme = source.manifest.quantization.scheme if source.manifest.kind != "merged" else None
    arithmetic = arithmetic_of(source.manifest.task, scheme, precision, accuracy_level, head)
    probe = probe_of(source)
    own_base = base_of(source, base)
    with new_checkpoint(Path(output), force=force) as staging:
        report(f"tracing the model ({arithmetic.precision})")
        arithmetic, attention = _write_model(source, own_base, arithmetic, staging)
        report_rounding(arithmetic, report)
        write_probe(staging / PROBE_FILE, probe)
        manifest = seal(staging, _manifest(source, own_base, arithmetic, attention))
        report("replaying the probe under onnxruntime")
        _prove(staging, manifest, probe, arithmetic)
    return open_checkpoint(Path(output))


@dataclass(frozen=True)
class Arithmetic:
    """What the weights are stored in, and the accuracy level of products with packed ones.

    `head`: what the head of a language model is packed to. How far rounding moved weights, relative, is known once
    they are rounded: `levels_rounded` those of nf4 or fp4, `head_rounded` those of the head.
    """

    precision: str
    accuracy_level: int | None
    head: str | None = None
    levels_rounded: float | None = None
    head_rounded: float | None = None

    @property
    def rounds_products(self) -> bool:
        """Whether inputs or weights of products are rounded, other than to 16 bits."""
        return bool(self.accuracy_level or self.head)

    @property
    def exact(self) -> bool:
        """Whether the graph computes what the checkpoint computes."""
        return not self.rounds_products and self.precision != "fp16"

    @property
    def advice(self) -> str:
        """What to do where the graph gives other outputs, by what was rounded in it."""
        if self.exact:
            return _ADVICE
        options = {
            "--precision fp16": self.precision == "fp16",
            "--accuracy-level 4": bool(self.accuracy_level),
            "--head int8": self.head is not None,
        }
        return f"export it without {' and '.join(name for name, used in options.items() if used)}"

    @property
    def suffix(self) -> str:
        """What the step adds to a checkpoint's tag."""
        half = "_fp16" if self.precision == "fp16" else ""
        return f"onnx{half}_head{self.head}" if self.head else f"onnx{half}"

    def options(self) -> dict[str, object]:
        """What the manifest records."""
        said = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in said.items() if value is not None}

    def applied(self, model: nn.Module) -> "Arithmetic":
        """Make every packed layer one that is exported so, and the head, in place; with what that rounded."""
        from qlx.exporting.head import pack_head
        from qlx.quant import packed_linears, rounding_of_levels

        moved = rounding_of_levels(model) if self.accuracy_level else None
        packed_linears(model, accuracy_level=self.accuracy_level or 0)
        head = pack_head(model) if self.head else None
        return replace(self, levels_rounded=moved, head_rounded=head)


def report_rounding(arithmetic: Arithmetic, report: Callable[[str], None]) -> None:
    """Say how far the weights were moved, where they were."""
    moved = {
        f"{arithmetic.precision} codes as 8-bit integers: weights": arithmetic.levels_rounded,
        "the head in 8 bits: its weights": arithmetic.head_rounded,
    }
    for what, share in moved.items():
        if share is not None:
            report(f"{what} moved by {100 * share:.2f} %")


def _prove(staging: Path, manifest: Manifest, probe: Probe, arithmetic: Arithmetic) -> None:
    """Replay; a graph that rounds is compared with the checkpoint it was made of, too."""
    exported = probe.reference if probe.own is None else probe.own
    beside = ("the exported checkpoint", exported) if arithmetic.rounds_products else None
    own = probe.own if arithmetic.exact else None
    prove(staging, manifest, own=own, beside=beside, advice=arithmetic.advice)


def _require_exportable(source: Checkpoint) -> None:
    """Check what can be known without loading anything."""
    if source.manifest.kind == "onnx":
        raise InputRefused(
            f"{source.path}: is ONNX already; export the checkpoint that it was made from"
        )


def arithmetic_of(
    task: str, scheme: str | None, precision: str | None, level: int | None, head: str | None = None
) -> Arithmetic:
    """What the weights become, from the scheme they have (None: plain) and what was asked for.

    Raises:
        Unsupported: the precision does not fit the weights.
        UsageError: there is no such precision, level or head, or it has no meaning here.
    """
    chosen = _precision(scheme, precision)
    if level not in (None, *ACCURACY_LEVELS):
        raise UsageError(f"accuracy level {level} is not one of {ACCURACY_LEVELS}")
    if level and chosen not in PACKED:
        raise UsageError(
            f"--accuracy-level {level} is for {', '.join(PACKED)} weights; these are {chosen}"
        )
    if head not in (None, *HEADS):
        raise UsageError(f"head {head!r} is not one of {', '.join(HEADS)}")
    if head and task != "causal-lm":
        raise UsageError(f"--head {head} is for language models; this is one for {task}")
    return Arithmetic(chosen, (level or 0) if chosen in PACKED else None, head)


def _precision(scheme: str | None, wanted: str | None) -> str:
    own = scheme or "fp32"
    if wanted not in (None, *PRECISIONS):
        raise UsageError(f"precision {wanted!r} is not one of {', '.join(PRECISIONS)}")
    if wanted is None or wanted == own:
        return own
    if wanted == "fp16" and scheme is None:
        return "fp16"
    if scheme is not None:
        raise Unsupported(
            f"this checkpoint's weights are {scheme} and are exported as they are; "
            f"for {wanted} export its merged form"
        )
    raise Unsupported(
        f"precision {wanted} needs packed weights; run qlx pack --to {wanted} and export the result"
    )


def _write_model(
    source: Checkpoint, base: Source | None, arithmetic: Arithmetic, staging: Path
) -> tuple[Arithmetic, dict[str, object]]:
    """The graph, its weights and the small files a runtime reads.

    Returns:
        The arithmetic, with what it rounded; what `write_language` says of the graph.
    """
    from qlx.models import load_model

    task = source.manifest.task
    with quiet():
        loaded = load_model(source, base)
    model, prefixes = separate_adapter(loaded.eval())
    arithmetic = arithmetic.applied(model)
    fuse = can_fuse(model, task)
    half = arithmetic.precision == "fp16"
    graph = build_graph(model, task, half=half, prefixes=prefixes, fuse=fuse)
    write_graph(graph, staging, task)
    copy_companions(staging, source.path)
    return arithmetic, write_language(model, task, staging, fused=fuse)


def write_language(model: Any, task: str, staging: Path, *, fused: bool) -> dict[str, object]:
    """What generation needs beside a language model's graph; what the manifest says of its attention."""
    if task != "causal-lm":
        return {}
    write_generation_config(staging, model, fused=fused)
    return {"attention": "fused" if fused else "generic"}


def _manifest(
    source: Checkpoint, base: Source | None, arithmetic: Arithmetic, attention: dict[str, object]
) -> Manifest:
    separate = needs_base(source.manifest)
    layout = "separate" if separate else source.manifest.kind
    parents = [source.digest] if base is None else [source.digest, base.fingerprint]
    options = {**arithmetic.options(), **attention, "layout": layout}
    step = next_step(COMMAND, parents=parents, options=options)
    return source.manifest.with_step(
        step, kind="onnx", tag=f"{source.manifest.tag}_{arithmetic.suffix}", files={}
    )
