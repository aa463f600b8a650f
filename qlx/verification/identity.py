"""What can be said of a checkpoint before it runs: its bytes, its base, its history."""

from collections import Counter
from pathlib import Path

from qlx.checkpoint import Checkpoint, Manifest, Source, load_object
from qlx.verification.base import base_of, needs_base
from qlx.verification.thresholds import Check
from qlx.weights import open_weights

__all__ = ["identity_checks", "quantization_checks"]

_FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def identity_checks(
    checkpoint: Checkpoint, base: Source | str | Path | None
) -> tuple[list[Check], Source | None]:
    """Checks of an opened checkpoint's files, base and recorded replays, and the base it runs on.

    Raises:
        Mismatch: the base is another one than recorded.
        InputRefused: a base is needed and not found.
    """
    manifest = checkpoint.manifest
    checks = [Check("integrity", True, f"{len(manifest.files)} files match their digests")]
    source = base_of(checkpoint, base)
    if source is not None:
        checks.append(Check("base", True, f"{source.name} holds the recorded weights"))
    probes = [manifest.probe, *(entry.probe for entry in manifest.adapters.values())]
    results = [result for probe in probes if probe is not None for result in probe.results]
    failed = [f"{result.step} against {result.against}" for result in results if not result.passed]
    checks.append(Check("lineage", not failed, _history(manifest, failed)))
    return [*checks, *_dtype_checks(checkpoint)], source


def _dtype_checks(checkpoint: Checkpoint) -> list[Check]:
    """Whether merged weights are loaded as they are stored: transformers rounds to what `config.json` says."""
    if checkpoint.manifest.kind != "merged":
        return []
    counts: Counter[str] = Counter()
    for info in open_weights(checkpoint.path).values():
        counts[info.dtype] += info.count
    stored = _FLOATS.get(counts.most_common(1)[0][0])
    config = load_object(checkpoint.path / "config.json")
    said = config.get("dtype") or config.get("torch_dtype") or stored
    detail = f"weights of {stored}, which config.json calls {said}"
    return [Check("dtype", said == stored, detail)] if stored else []


def quantization_checks(manifest: Manifest) -> list[Check]:
    """What running an adapter has shown: loading refuses a base that quantizes to other codes."""
    if not needs_base(manifest) or manifest.quantization.fingerprint is None:
        return []
    count = len(manifest.quantization.tensors)
    return [Check("quantization", True, f"{count} tensors of the base give the recorded codes")]


def _history(manifest: Manifest, failed: list[str]) -> str:
    if failed:
        return f"recorded as failed: {', '.join(failed)}"
    return " → ".join(step.command for step in manifest.lineage) or "no steps recorded"
