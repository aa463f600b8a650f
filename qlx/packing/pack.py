"""`pack`: low-bit weights in the layout of the library that loads them, gated by what survives."""

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from torch import Tensor

from qlx.adapters import require_exact_codes
from qlx.checkpoint import (
    Checkpoint,
    Manifest,
    QuantSpec,
    check_output,
    new_checkpoint,
    next_step,
    open_checkpoint,
)
from qlx.errors import Unsupported, UsageError
from qlx.merging.companions import carry_probe, copy_companions, raw_config, write_config
from qlx.packing.exact import exact_spec_for, packs_exactly, trained_group, trained_zeros
from qlx.packing.gguf import GGUF_TYPE, gguf_spec, write_gguf
from qlx.packing.healing import Healed, Healing, heal
from qlx.packing.healing.paged import release, tensors_of
from qlx.packing.layouts import (
    WHOLE,
    GroupSize,
    fitted_to,
    section_of,
    spec_for,
    stored_entries,
)
from qlx.packing.picture import draw_retention
from qlx.packing.retention import LayerRetention, layer_retention, overall
from qlx.packing.select import Selection, select_modules
from qlx.packing.source import Weights, weights_to_pack
from qlx.packing.writer import ShardWriter
from qlx.quant import (
    PackedIntegers,
    PackedTensor,
    dequantize_tensor,
    fitted_ternary,
    packed_fingerprint,
    quantize_tensor,
)
from qlx.verification import DEFAULT_MIN_RETENTION, check_picture, prove

__all__ = ["TARGETS", "Target", "pack"]

Target = Literal["nf4", "fp4", "int8", "int4", "int2", "ternary", "gguf"]
TARGETS: tuple[Target, ...] = ("nf4", "fp4", "int8", "int4", "int2", "ternary", "gguf")
"""The formats that can be packed to."""

Known = Callable[[str], PackedTensor | None]
"""The codes of a tensor where they are known already: those an exact adapter left, or healed ones."""

_NOT_HEALED = ("gguf", "int2")
_ADVICE = (
    "keep the adapter separate or merge it without packing, {heal}choose more bits or smaller groups, "
    "train it longer or with a larger rank"
)
_HEAL = "heal it with --heal, "
_ACCEPT = ", or accept the loss with a lower --min-retention"


def pack(
    checkpoint: Path,
    output: Path,
    *,
    to: Target,
    base: str | Path | None = None,
    group_size: GroupSize = None,
    double_quant: bool | None = None,
    gguf_type: str | None = None,
    min_retention: float = DEFAULT_MIN_RETENTION,
    healing: Healing | None = None,
    picture: Path | None = None,
    force: bool = False,
    report: Callable[[str], None] | None = None,
) -> Checkpoint:
    """Round a model's linear weights to few bits and measure what is left of the fine-tuning.

    `checkpoint` is a merged one, a full run, or an adapter (merged on the fly onto `base`).
    `group_size` input values share a scale, with `whole` those of a row (int8, int4, int2) or the tensor
    (ternary); by default 64, and a row for int8. `double_quant` defaults to what training used,
    `gguf_type` to Q8_0.
    `min_retention` gates 1 - KL(unmerged ‖ packed) / KL(unmerged ‖ base) on the probe. `healing` brings
    the packed model back to the unmerged one's outputs on calibration data. `picture` is a .png or .svg
    file that shows what survives in each layer, drawn also where the gate refuses the result.

    Raises:
        UsageError: an unknown target, options it does not take, or a gate outside [0, 1].
        CheckFailed: less than `min_retention` of the adapter's effect survives.
        Mismatch: `base` is not the recorded one.
    """
    if to not in TARGETS or not 0 <= min_retention <= 1:
        raise UsageError(
            f"pack --to takes one of {', '.join(TARGETS)} and --min-retention a number from 0 to 1"
        )
    if to in _NOT_HEALED and healing is not None:
        raise UsageError(f"--heal: for --to nf4, fp4, int8, int4 or ternary, not for {to}")
    if picture is not None:
        check_picture(picture)
    check_output(output, (checkpoint, base), force=force)
    tell = report or (lambda line: None)
    opened = open_checkpoint(Path(checkpoint))
    spec = _spec(opened.manifest, to, group_size, double_quant, gguf_type)
    with ExitStack() as stack:
        weights, companions = stack.enter_context(weights_to_pack(opened, base))
        staging = stack.enter_context(new_checkpoint(output, force=force))
        dtype = _dtype_of(companions)
        smaller = "another --gguf-type" if to == "gguf" else "a smaller --group-size"
        selection = select_modules(weights, companions, opened.manifest, spec.group_size, smaller)
        exact = packs_exactly(opened, spec, to_heal=healing is not None)
        causal = opened.manifest.task == "causal-lm"
        spec = fitted_to(spec, dtype=dtype, causal=causal, biased=selection.biased)
        if exact:
            spec = exact_spec_for(opened, spec, selection)
        tell(f"packing {len(selection.tensors)} of {len(weights.names())} tensors to {to}")
        spec = _complete(spec, selection)
        healed = None
        if healing is not None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="qlx-healing-"))
            healed = heal(
                opened, weights, companions, selection, spec, healing,
                min_retention=min_retention, folder=Path(folder), tell=tell,
            )  # fmt: skip
        known = weights.codes if exact else healed.packed.get if healed else _unknown
        spec, layers = _write(
            staging, weights, companions, selection, spec, opened.manifest.tag, known
        )
        if exact and opened.manifest.adapter is not None:
            require_exact_codes(opened.manifest.adapter, spec.fingerprint or "", str(opened.path))
        for line in _layer_lines(layers):
            tell(line)
        if picture is not None:
            draw_retention(layers, healed.retention if healed else {}, min_retention, picture)
        copy_companions(staging, companions)
        promoted = healed.promoted if healed else {}
        write_config(staging, raw_config(companions), dtype, section_of(spec, promoted))
        carry_probe(opened, staging)
        tell("replaying the probe on the packed files")
        done = prove(
            staging,
            _manifest(opened, spec, layers, min_retention, healed),
            advice=_advice(
                layers, min_retention, can_heal=healed is None and to not in _NOT_HEALED
            ),
        )
    return Checkpoint(Path(output), done.manifest, done.digest)


def _unknown(name: str) -> PackedTensor | None:
    return None


def _dtype_of(companions: Path) -> str:
    """The dtype of a model's weights, as its configuration calls it."""
    config = raw_config(companions)
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def _spec(
    manifest: Manifest,
    to: Target,
    group_size: GroupSize,
    double_quant: bool | None,
    gguf_type: str | None,
) -> QuantSpec:
    """How weights are packed, by the options given."""
    if to != "gguf":
        if gguf_type is not None:
            raise UsageError("--gguf-type belongs to --to gguf; leave it out")
        if group_size is None:
            group_size = trained_group(manifest, to)
        zeros = trained_zeros(manifest, to)
        return spec_for(to, manifest.quantization, group_size, double_quant, zeros)
    if group_size is not None or double_quant is not None:
        raise UsageError(
            "--to gguf takes groups and scales as --gguf-type has them; leave out the rest"
        )
    if manifest.task != "causal-lm":
        raise Unsupported("--to gguf takes language models; for others choose int8, int4 or nf4")
    return gguf_spec(gguf_type, manifest.quantization)


def _write(
    staging: Path,
    weights: Weights,
    companions: Path,
    selection: Selection,
    spec: QuantSpec,
    tag: str,
    known: Known,
) -> tuple[QuantSpec, list[LayerRetention]]:
    """Write the weights in the layout of `spec`; that with the fingerprint of the codes, and what survives."""
    if spec.backend == "gguf":
        return spec, write_gguf(staging, weights, companions, selection, spec, tag)
    layers: list[LayerRetention] = []
    fingerprint = _write_codes(staging, weights, selection, spec, layers, known)
    return spec.model_copy(update={"fingerprint": fingerprint}), layers


def _write_codes(
    staging: Path,
    weights: Weights,
    selection: Selection,
    spec: QuantSpec,
    layers: list[LayerRetention],
    known: Known,
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
            result = known(name) or _packed(merged, spec)
            before = weights.before(name)
            if before is not None:
                layers.append(layer_retention(name, before, merged, dequantize_tensor(result)))
            writer.add(stored_entries(result, name, spec))
            yield name, result
            release(tensors_of(result))  # healed codes are read from files, once

    fingerprint = packed_fingerprint(packed())
    writer.close()
    return fingerprint


def _packed(weight: Tensor, spec: QuantSpec) -> PackedTensor:
    """Codes as training makes them; ternary scales are those that fit the codes best."""
    packed = quantize_tensor(weight, spec)
    if isinstance(packed, PackedIntegers) and packed.scheme == "ternary":
        return fitted_ternary(packed, weight)
    return packed


def _beside(step_share: float) -> str:
    return "nothing is rounded" if math.isinf(step_share) else f"{step_share:.2g} × the rounding"


def _layer_lines(layers: list[LayerRetention]) -> list[str]:
    return [
        f"{layer.name}: {layer.retention:.1%} of the weight change survives ({_beside(layer.step_share)})"
        for layer in layers
        if layer.retention is not None
    ]


def _advice(layers: list[LayerRetention], min_retention: float, *, can_heal: bool) -> str:
    """What to do where too little is kept, and where the least is."""
    advice = _ADVICE.format(heal=_HEAL if can_heal else "") + (_ACCEPT if min_retention else "")
    known = {layer.name: layer.retention for layer in layers if layer.retention is not None}
    if not known:
        return advice
    worst = min(known, key=lambda name: known[name])
    return f"{worst} keeps least of its weight change ({known[worst]:.1%}); {advice}"


def _complete(spec: QuantSpec, selection: Selection) -> QuantSpec:
    modules, tensors = zip(*sorted(selection.tensors.items()), strict=True)
    return spec.model_copy(
        update={
            "modules": modules,
            "tensors": tensors,
            "skip_modules": selection.skipped,
        }
    )


def _manifest(
    checkpoint: Checkpoint,
    spec: QuantSpec,
    layers: list[LayerRetention],
    min_retention: float,
    healed: Healed | None,
) -> Manifest:
    kind = spec.extras.get(GGUF_TYPE)
    options: dict[str, object] = {
        "to": spec.scheme or spec.backend,
        "group_size": spec.group_size or WHOLE,
        "double_quant": spec.double_quant,
        "min_retention": min_retention,
        **({} if kind is None else {GGUF_TYPE: kind}),
        **({} if healed is None else {"healing": dict(healed.record)}),
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
    seed = None if healed is None else healed.record["seed"]
    step = next_step("pack", parents=(checkpoint.digest,), options=options, seed=seed)
    tag = f"{checkpoint.manifest.tag}_{spec.scheme or kind}"
    return checkpoint.manifest.with_step(step, kind="packed", tag=tag, quantization=spec, files={})
