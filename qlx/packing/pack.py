"""`pack`: 4-bit weights that plain transformers with bitsandbytes loads, gated by what survives."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from qlx.checkpoint import (
    Checkpoint,
    Manifest,
    QuantSpec,
    check_output,
    new_checkpoint,
    next_step,
    open_checkpoint,
)
from qlx.errors import UsageError
from qlx.merging.companions import carry_probe, copy_companions, read_config, write_config
from qlx.packing.retention import LayerRetention, layer_retention, overall
from qlx.packing.select import Selection, select_modules
from qlx.packing.source import Weights, weights_to_pack
from qlx.packing.writer import ShardWriter
from qlx.quant import (
    PackedTensor,
    dequantize_tensor,
    packed_entries,
    packed_fingerprint,
    quantize_tensor,
)
from qlx.verification import DEFAULT_MIN_RETENTION, prove

__all__ = ["TARGETS", "pack"]

Target = Literal["nf4", "fp4"]
TARGETS: tuple[Target, ...] = ("nf4", "fp4")
"""The formats that can be packed to."""

_ADVICE = (
    "keep the adapter separate or merge it without packing, train it longer or with a larger rank, "
    "or accept the loss with a lower --min-retention"
)


def pack(
    checkpoint: Path,
    output: Path,
    *,
    to: Target,
    base: str | Path | None = None,
    group_size: int = 64,
    double_quant: bool | None = None,
    min_retention: float = DEFAULT_MIN_RETENTION,
    force: bool = False,
    report: Callable[[str], None] | None = None,
) -> Checkpoint:
    """Round a model's linear weights to 4 bits and measure what is left of the fine-tuning.

    `checkpoint` is a merged one, a full run, or an adapter (merged on the fly onto `base`).
    `group_size` input values share a scale; `double_quant` defaults to what training used.
    `min_retention` gates 1 - KL(unmerged ‖ packed) / KL(unmerged ‖ base) on the probe.

    Raises:
        UsageError: an unknown target or a gate outside [0, 1].
        CheckFailed: less than `min_retention` of the adapter's effect survives.
        Mismatch: `base` is not the recorded one.
    """
    if to not in TARGETS or not 0 <= min_retention <= 1:
        raise UsageError(
            f"pack --to takes one of {', '.join(TARGETS)} and --min-retention a number from 0 to 1"
        )
    check_output(output, (checkpoint, base), force=force)
    tell = report or (lambda line: None)
    opened = open_checkpoint(Path(checkpoint))
    spec = _spec(opened.manifest, to, group_size, double_quant)
    with (
        weights_to_pack(opened, base) as (weights, companions),
        new_checkpoint(output, force=force) as staging,
    ):
        selection = select_modules(weights, companions, opened.manifest, group_size)
        tell(f"packing {len(selection.tensors)} of {len(weights.names())} tensors to {to}")
        layers: list[LayerRetention] = []
        fingerprint = _write(staging, weights, selection, spec, layers)
        for line in _layer_lines(layers):
            tell(line)
        copy_companions(staging, companions)
        spec = _complete(spec, selection, fingerprint)
        _configure(staging, companions, spec)
        carry_probe(opened, staging)
        tell("replaying the probe on the packed files")
        done = prove(staging, _manifest(opened, spec, layers, min_retention), advice=_ADVICE)
    return Checkpoint(Path(output), done.manifest, done.digest)


def _spec(manifest: Manifest, to: Target, group_size: int, double_quant: bool | None) -> QuantSpec:
    before = manifest.quantization
    trained = before.double_quant if before.quantized else True
    return QuantSpec(
        method="post-training",
        weight_bits=4,
        scheme=to,
        group_size=group_size,
        double_quant=trained if double_quant is None else double_quant,
        compute_dtype=before.compute_dtype,
        backend="bitsandbytes",
    )


def _write(
    staging: Path,
    weights: Weights,
    selection: Selection,
    spec: QuantSpec,
    layers: list[LayerRetention],
) -> str:
    """Write all tensors, packed ones packed; fills `layers`, returns the fingerprint of the codes."""
    writer = ShardWriter(staging)
    chosen = set(selection.tensors.values())

    def packed() -> Iterator[tuple[str, PackedTensor]]:
        for name in weights.names():
            if name not in chosen:
                writer.add({name: weights.value(name, full=False)})
                continue
            merged = weights.value(name, full=True)
            result = quantize_tensor(merged, spec)
            before = weights.before(name)
            if before is not None:
                layers.append(layer_retention(name, before, merged, dequantize_tensor(result)))
            writer.add(packed_entries(result, name))
            yield name, result

    fingerprint = packed_fingerprint(packed())
    writer.close()
    return fingerprint


def _layer_lines(layers: list[LayerRetention]) -> list[str]:
    return [
        f"{layer.name}: {layer.retention:.1%} of the weight change survives ({layer.step_share:.2g} × the rounding)"
        for layer in layers
        if layer.retention is not None
    ]


def _complete(spec: QuantSpec, selection: Selection, fingerprint: str) -> QuantSpec:
    modules, tensors = zip(*sorted(selection.tensors.items()), strict=True)
    return spec.model_copy(
        update={
            "modules": modules,
            "tensors": tensors,
            "skip_modules": selection.skipped,
            "fingerprint": fingerprint,
        }
    )


def _configure(staging: Path, companions: Path, spec: QuantSpec) -> None:
    """Write `config.json` so that transformers builds 4-bit layers exactly where there are codes."""
    config = read_config(companions)
    quantization: dict[str, object] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": spec.scheme,
        "bnb_4bit_use_double_quant": spec.double_quant,
        "bnb_4bit_compute_dtype": spec.compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(spec.skip_modules),
    }
    write_config(staging, config, str(config.get("dtype", "float32")), quantization)


def _manifest(
    checkpoint: Checkpoint, spec: QuantSpec, layers: list[LayerRetention], min_retention: float
) -> Manifest:
    options: dict[str, object] = {
        "to": spec.scheme,
        "group_size": spec.group_size,
        "double_quant": spec.double_quant,
        "min_retention": min_retention,
    }
    kept = overall(layers)
    if kept is not None:
        worst = min(
            layers, key=lambda layer: layer.retention if layer.retention is not None else 1.0
        )
        options |= {
            "weight_retention": float(f"{kept:.4g}"),
            "worst_tensor": worst.name,
            "worst_weight_retention": float(f"{worst.retention or 0.0:.4g}"),
        }
    step = next_step("pack", parents=(checkpoint.digest,), options=options)
    tag = f"{checkpoint.manifest.tag}_{spec.scheme}"
    return checkpoint.manifest.with_step(step, kind="packed", tag=tag, quantization=spec, files={})
