"""`export_onnx`: a checkpoint of any torch kind as a verified ONNX directory."""

from collections.abc import Callable
from pathlib import Path

from qlx.checkpoint import (
    PROBE_FILE,
    Checkpoint,
    Manifest,
    Source,
    check_output,
    new_checkpoint,
    next_step,
    open_checkpoint,
    seal,
    write_probe,
)
from qlx.errors import InputRefused, Unsupported, UsageError
from qlx.exporting.genai import write_generation_config
from qlx.exporting.graph import build_graph, write_graph
from qlx.exporting.quiet import quiet
from qlx.exporting.separate import separate_adapter
from qlx.merging.companions import copy_companions
from qlx.verification import base_of, needs_base, probe_of
from qlx.verification.prove import prove

__all__ = ["PRECISIONS", "export_onnx"]

PRECISIONS = ("fp32", "fp16", "nf4", "fp4")

COMMAND = "export-onnx"

_ADVICE = {
    True: "export it in fp32, without --precision fp16",
    False: "run `qlx verify` on the checkpoint: where that fails too, it is no longer the model it was; "
    "where it passes, this model's export is at fault, so report it",
}
"""What to do where the graph gives other outputs, by whether it was rounded to fp16."""


def export_onnx(
    checkpoint: Path | str | Checkpoint,
    output: Path | str,
    *,
    base: Source | str | Path | None = None,
    precision: str | None = None,
    force: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Checkpoint:
    """Export a checkpoint and replay its probe under onnxruntime before the directory appears.

    A merged checkpoint becomes an fp32 graph (or fp16: half the bytes, fp32 arithmetic). A packed one
    keeps its codes and scales byte for byte. A run or an adapter keeps the adapter apart from its
    base, which stays quantized as it was trained on.

    Args:
        checkpoint: a run, adapter, merged or packed checkpoint.
        output: the directory to create; refused if it exists, unless `force`.
        base: the base model of a run or adapter; by default the one it records.
        precision: None keeps the checkpoint's own; `fp16` is possible for unquantized weights.
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
    chosen = _precision(source.manifest, precision)
    probe = probe_of(source)
    own_base = base_of(source, base)
    with new_checkpoint(Path(output), force=force) as staging:
        report(f"tracing the model ({chosen})")
        _write_model(source, own_base, chosen, staging)
        write_probe(staging / PROBE_FILE, probe)
        manifest = seal(staging, _manifest(source, own_base, chosen))
        report("replaying the probe under onnxruntime")
        own = None if chosen == "fp16" else probe.own
        prove(staging, manifest, own=own, advice=_ADVICE[chosen == "fp16"])
    return open_checkpoint(Path(output))


def _require_exportable(source: Checkpoint) -> None:
    """Check what can be known without loading anything."""
    if source.manifest.kind == "onnx":
        raise InputRefused(
            f"{source.path}: is ONNX already; export the checkpoint that it was made from"
        )


def _precision(manifest: Manifest, wanted: str | None) -> str:
    scheme = manifest.quantization.scheme if manifest.kind != "merged" else None
    own = scheme or "fp32"
    if own not in PRECISIONS:
        raise Unsupported(
            f"{own} weights cannot be exported as they are yet; export the merged form of this checkpoint"
        )
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


def _write_model(source: Checkpoint, base: Source | None, precision: str, staging: Path) -> None:
    """The graph, its weights and the small files a runtime reads."""
    from qlx.models import load_model
    from qlx.quant import packed_linears

    task = source.manifest.task
    with quiet():
        loaded = load_model(source, base)
    model, prefixes = separate_adapter(loaded.eval())
    packed_linears(model)
    graph = build_graph(model, task, half=precision == "fp16", prefixes=prefixes)
    write_graph(graph, staging, task)
    copy_companions(staging, source.path)
    if task == "causal-lm":
        write_generation_config(staging, model)


def _manifest(source: Checkpoint, base: Source | None, precision: str) -> Manifest:
    separate = needs_base(source.manifest)
    layout = "separate" if separate else source.manifest.kind
    parents = [source.digest] if base is None else [source.digest, base.fingerprint]
    step = next_step(COMMAND, parents=parents, options={"precision": precision, "layout": layout})
    suffix = "onnx" if precision != "fp16" else "onnx_fp16"
    return source.manifest.with_step(
        step, kind="onnx", tag=f"{source.manifest.tag}_{suffix}", files={}
    )
