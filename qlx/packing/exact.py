"""Packing what an adapter inside the rounding was trained to: the codes are there, nothing is rounded again."""

from qlx.checkpoint import Checkpoint, Manifest, QuantSpec
from qlx.errors import Unsupported, UsageError
from qlx.packing.layouts import WHOLE, GroupSize
from qlx.packing.select import Selection
from qlx.quant import SCALE_DTYPE, ZERO_POINTS

__all__ = ["exact_spec_for", "packs_exactly", "trained_group", "trained_zeros"]


def trained_group(manifest: Manifest, scheme: str) -> GroupSize:
    """The group size that an exact adapter was trained with, where it was trained on `scheme`; else None."""
    trained, adapter = manifest.quantization, manifest.adapter
    if adapter is None or adapter.type != "exact" or trained.scheme != scheme:
        return None
    return trained.group_size or WHOLE


def trained_zeros(manifest: Manifest, scheme: str) -> bool:
    """Whether an exact adapter was trained on codes of `scheme` with zero points."""
    trained, adapter = manifest.quantization, manifest.adapter
    exact = adapter is not None and adapter.type == "exact" and trained.scheme == scheme
    return exact and trained.symmetric is False


def packs_exactly(checkpoint: Checkpoint, wanted: QuantSpec, *, to_heal: bool) -> bool:
    """Whether `wanted` is the grid that an exact adapter was trained on.

    Raises:
        UsageError: it is, and is to be healed.
    """
    trained, adapter = checkpoint.manifest.quantization, checkpoint.manifest.adapter
    asked = (wanted.scheme, wanted.group_size, wanted.double_quant, wanted.symmetric is False)
    if adapter is None or adapter.type != "exact":
        return False
    zeros = trained.symmetric is False
    same = (trained.scheme, trained.group_size, trained.double_quant, zeros) == asked
    if same and to_heal:
        raise UsageError(
            f"{checkpoint.path}: its codes are what the adapter was trained to, so there is nothing to heal; "
            "leave --heal out"
        )
    return same


def exact_spec_for(checkpoint: Checkpoint, wanted: QuantSpec, selection: Selection) -> QuantSpec:
    """`wanted` for codes and scales that stay as training left them.

    Raises:
        Unsupported: the layout holds scales in another dtype, or a layer that was quantized would not be packed.
    """
    trained, adapter = checkpoint.manifest.quantization, checkpoint.manifest.adapter
    folded = adapter is not None and adapter.folded
    kept, held = _scales(trained), _scales(wanted)
    if folded and held != "float32":
        raise Unsupported(
            f"{checkpoint.path}: its zero points are no whole numbers, and a file of {held} weights would round them; "
            "merge with --dtype float32 and pack that"
        )
    if wanted.backend != "bitsandbytes" and held not in ("float32", kept):
        raise Unsupported(
            f"{checkpoint.path}: its scales were trained in {kept}, and a file of {held} weights holds them in {held}; "
            f"train with quantization.scale_dtype: {held}, or merge with --dtype {kept} and pack that"
        )
    left = sorted(set(trained.tensors) - set(selection.tensors.values()))
    if left:
        raise Unsupported(
            f"{checkpoint.path}: {left[0]!r} was quantized in training and cannot be packed"
        )
    extras: dict[str, str] = {} if kept == "float32" else {SCALE_DTYPE: kept}
    extras |= {ZERO_POINTS: "float32"} if folded else {}
    rounds: dict[str, object] = {"activation_bits": trained.activation_bits}
    rounds |= {"extras": {**wanted.extras, **extras}}
    if wanted.backend == "bitnet" and trained.activation_bits is None:
        rounds |= {"backend": "compressed-tensors"}  # BitNet's layers would round their inputs
    return wanted.model_copy(update=rounds)


def _scales(spec: QuantSpec) -> str:
    return str(spec.extras.get(SCALE_DTYPE, "float32"))
