"""Healing: a packed model brought back to the unmerged one's outputs, layer by layer and then as a whole.

Each layer is compensated on the inputs that the layers before it, packed already, give it
(`compensate`, `passes`); then scales and rounding are tuned on the outputs (`tune`). Layers that lose
most may be given more bits (`promote`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlx.checkpoint import Checkpoint, QuantSpec
from qlx.errors import CheckFailed
from qlx.models import model_config
from qlx.packing.healing.blocks import LayeredModel
from qlx.packing.healing.compensate import output_retention
from qlx.packing.healing.data import Calibration, calibration_data
from qlx.packing.healing.passes import Seen, Stream, compensate_stack
from qlx.packing.healing.promote import Need, need_of, promote, require_budget
from qlx.packing.healing.tune import PackedLayer, Rows, tune
from qlx.packing.select import Selection
from qlx.packing.source import Weights
from qlx.quant import PackedTensor
from qlx.verification import Comparison, Tally, shown

__all__ = ["Healed", "Healing", "heal"]

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Healing:
    """How to heal: by which data (None: the probe's), and what is tuned after compensation.

    `steps` of 0 leave it at that, a `rank` of 0 leaves out the correction inside the rounding.
    `max_bytes_per_weight` allows layers more bits, up to so many bytes a packed weight on average.
    """

    calibration: Path | None = None
    steps: int = 200
    rank: int = 32
    seed: int = 0
    max_bytes_per_weight: float | None = None


@dataclass(frozen=True)
class Healed:
    """The packed weights by tensor name.

    `retention` is that of each adapted layer's outputs before tuning, by tensor name; `promoted` maps
    modules to the scheme they were given instead; `record` is what a manifest keeps of it all.
    """

    packed: Mapping[str, PackedTensor]
    retention: Mapping[str, float]
    promoted: Mapping[str, str]
    record: Mapping[str, Any]


def heal(
    checkpoint: Checkpoint,
    weights: Weights,
    companions: Path,
    selection: Selection,
    spec: QuantSpec,
    healing: Healing,
    *,
    min_retention: float,
    folder: Path,
    tell: Tell,
) -> Healed:
    """Heal what `selection` names of a model; codes are kept in `folder`, which is to outlive the result.

    Raises:
        CheckFailed: calibrated by the probe, less than `min_retention` survives on the rows held out of it.
        InputRefused: the data cannot be used for it, or the model.
        UsageError: more bytes are allowed where no scheme takes more bits, or too few.
    """
    budget = healing.max_bytes_per_weight
    if budget is not None:
        require_budget((weights.shape(name) for name in selection.tensors.values()), spec, budget)
    task = checkpoint.manifest.task
    classes = int(getattr(model_config(companions, task), "vocab_size", None) or 1)
    data = calibration_data(checkpoint, companions, healing.calibration, healing.seed, classes)
    mixed = f" and {data.mixed} mixed of them" if data.mixed else ""
    tell(f"healing by {data.counts[0]} rows of {data.name}{mixed}, {data.counts[1]} held out")
    model = LayeredModel(weights, companions, task, folder)
    schemes: dict[str, str] = {}
    if budget is not None:
        needs: list[Need] = []
        compensate_stack(
            model, weights, selection, lambda name: spec, data,
            lambda seen: needs.append(need_of(seen, spec)), tell, store=False,
        )  # fmt: skip
        schemes = promote(needs, spec, min_retention, budget, tell)
    retention: dict[str, float] = {}

    def look(seen: Seen) -> None:
        share = _share(seen)
        if share is not None:
            retention[selection.tensors[seen.name]] = share

    def spec_of(name: str) -> QuantSpec:
        return spec.model_copy(update={"scheme": schemes.get(name, spec.scheme)})

    stream = compensate_stack(model, weights, selection, spec_of, data, look, tell)
    layers = _assembled(model, stream, spec.activation_bits)
    options = {"steps": healing.steps, "rank": healing.rank, "seed": healing.seed}
    kept_stage = tune(model, layers, stream.rows, stream.held_out, **options)
    compared = _compared(model, stream.held_out, data)
    tell(f"healed by {kept_stage}: KL {compared.kl_mean:.4g} on the rows held out")
    _require(compared, min_retention)
    packed = _packed(model, layers, selection)
    record = {
        "calibration": data.name,
        "digest": data.digest,
        "rows": data.counts[0],
        "held_out_rows": data.counts[1],
        **({"mixed_rows": data.mixed} if data.mixed else {}),
        **options,
        "kept": kept_stage,
        "held_out": {name: float(f"{v:.4g}") for name, v in compared.metrics().items()},
    }
    if budget is not None:
        record |= {"max_bytes_per_weight": budget, "promoted": dict(sorted(schemes.items()))}
    return Healed(packed, retention, schemes, record)


def _share(seen: Seen) -> float | None:
    if seen.before is None:
        return None
    return output_retention(seen.before, seen.weight, seen.placed.packed, seen.hessian)


def _assembled(
    model: LayeredModel, stream: Stream, activation_bits: int | None
) -> dict[str, PackedLayer]:
    """Put packed layers in their places in the model, and the rest of its stack beside them."""
    model.fill_all(except_for=stream.placed)
    layers = {}
    for name, placed in stream.placed.items():
        bias = model.model.get_submodule(name)._parameters["bias"]
        layers[name] = PackedLayer(placed, bias, activation_bits, name, model.pages)
        model.model.set_submodule(name, layers[name])
    return layers


def _packed(
    model: LayeredModel, layers: Mapping[str, PackedLayer], selection: Selection
) -> dict[str, PackedTensor]:
    """The weights as they are to be stored, by tensor name, in files."""
    packed = {}
    for name, layer in layers.items():
        packed[selection.tensors[name]] = model.pages.keep_packed(f"{name}.healed", layer.packed())
        model.pages.rest()
    return packed


def _compared(model: LayeredModel, held_out: Sequence[Rows], data: Calibration) -> Comparison:
    """The outputs of the healed model beside the unmerged one's, on the rows held out."""
    tally = Tally()
    bases = data.held_out_base or [None] * len(held_out)
    with torch.no_grad():
        for batch, base in zip(held_out, bases, strict=True):
            wanted = model.finished(batch.inputs, batch.state).numpy()
            mask = None if batch.mask is None else batch.mask.numpy()
            tally.add(wanted, model.outputs(batch.inputs).numpy(), mask, base)
    return tally.comparison()


def _require(compared: Comparison, min_retention: float) -> None:
    """The gate on rows that healing has not seen, which the probe is not where it was healed by."""
    if compared.retention is None or compared.retention >= min_retention:
        return
    found, limit = shown(compared.retention, min_retention)
    raise CheckFailed(
        f"pack: on the part of the probe that healing was not shown, retention is {found} (limit ≥ {limit}); "
        "name more data with --calibration, choose more bits, or keep the adapter separate"
    )
