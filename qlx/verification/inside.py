"""Looking inside two checkpoints: the states between their layers, their weights, their noise.

Everything is read from the loaded models by `qlx.models.trace` and from graphs by `graph`; torch is
imported when a torch model is looked at and not before.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qlx.checkpoint import Manifest, Source, resolve_source
from qlx.errors import Unsupported
from qlx.inputs import Batch
from qlx.verification.base import needs_base
from qlx.verification.drift import Drift, LayerDrift, LayerTally, Weights, weight_drift
from qlx.verification.graph import graph_weights
from qlx.verification.metrics import Array, compare
from qlx.verification.side import Side
from qlx.verification.thresholds import UNIT_ROUNDOFF, lossy_steps

if TYPE_CHECKING:
    from torch import nn

    from qlx.models.trace import Trace

__all__ = ["BaseModel", "base_model", "look_inside", "measured_noise"]

_SHOWN = 3  # names of weights that a sentence lists


class BaseModel:
    """The model as it was before training: an unmerged one with its adapter off, or one loaded anew."""

    def __init__(self, model: "nn.Module") -> None:
        self.model = model

    @contextmanager
    def current(self) -> Iterator["nn.Module"]:
        """The model, its adapter switched off meanwhile."""
        from qlx.models.trace import adapter_off

        with adapter_off(self.model):
            yield self.model

    def outputs(self, task: Any, inputs: Mapping[str, Array]) -> Array:
        """Its logits, f32."""
        from qlx.models import forward_logits

        with self.current() as model:
            return forward_logits(model, task, inputs)

    def weights(self) -> dict[str, Callable[[], Array]]:
        """Its weights as they act, by name, each computed when called."""
        from qlx.models.trace import acting_weights

        def switched_off(read: Callable[[], Array]) -> Callable[[], Array]:
            def value() -> Array:
                with self.current():
                    return read()

            return value

        return {name: switched_off(read) for name, read in acting_weights(self.model).items()}


def base_model(sides: Iterable[Side], base: Source | str | Path | None) -> BaseModel | None:
    """What the adapter was put on: that of an unmerged side, else `base` as training saw it.

    None where neither is there.
    """
    sides = list(sides)
    for side in sides:
        if needs_base(side.manifest):
            return BaseModel(_torch_model(side))
    if base is None:
        return None
    source = base if isinstance(base, Source) else resolve_source(str(base))
    merged = [side for side in sides if side.manifest.kind == "merged"]
    return BaseModel(_as_trained(merged[0].manifest, source)) if merged else None


def _as_trained(manifest: Manifest, source: Source) -> "nn.Module":
    """The base of a merged checkpoint, quantized as it was in training, computing in fp32."""
    import torch

    from qlx.models import STORED_DTYPE, computing_in, load_base, torch_float

    spec = manifest.quantization
    stored = torch_float(str(spec.extras.get(STORED_DTYPE, "float32")))
    quant = spec if spec.quantized else None
    model = load_base(source.path, manifest.task, dtype=stored, quant=quant)
    return computing_in(model, torch.float32)


def _torch_model(side: Side) -> "nn.Module":
    from qlx.models import TorchPredictor

    predictor = side.predictor
    assert isinstance(predictor, TorchPredictor)
    return predictor.model


def look_inside(
    reference: Side, candidate: Side, off: BaseModel | None, batches: Iterable[Batch]
) -> Drift:
    """Compare what leaves every layer, on `batches` of at most 16 rows, and every weight."""
    unseen: list[str] = []
    layers: tuple[LayerDrift, ...] = ()
    graphs = [side.name for side in (reference, candidate) if not side.in_torch]
    if graphs:
        kind = "are ONNX graphs" if len(graphs) > 1 else "is an ONNX graph"
        unseen.append(
            f"the layers are not visible: {' and '.join(graphs)} {kind}, of which outputs alone are seen; weights are "
            "compared by the names that the export kept"
        )
    else:
        try:
            layers = _layers(reference, candidate, off, batches)
        except Unsupported as error:
            unseen.append(f"the layers are not visible: {error}")
    weights, missing = weight_drift(
        _weights(reference), _weights(candidate), off.weights() if off else None
    )
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (" …" if len(missing) > _SHOWN else "")
        unseen.append(f"{len(missing)} weights are not in both under one name and shape: {shown}")
    return Drift(layers, weights, tuple(unseen))


def _weights(side: Side) -> Weights:
    if not side.in_torch:
        from qlx.runtime import ADAPTER_SUFFIX, GRAPH_FILE

        path, name = side.checkpoint.path, side.checkpoint.adapter
        file = None if name is None else path / f"{name}{ADAPTER_SUFFIX}"
        return graph_weights(path / GRAPH_FILE, file)
    from qlx.models.trace import acting_weights

    return acting_weights(_torch_model(side))


def _layers(
    reference: Side, candidate: Side, off: BaseModel | None, batches: Iterable[Batch]
) -> tuple[LayerDrift, ...]:
    from qlx.models.trace import layer_stack, trace_layers

    task = reference.manifest.task
    original, moved = _torch_model(reference), _torch_model(candidate)
    tally = LayerTally(tuple(layer_stack(original)))
    for batch in batches:
        wanted = trace_layers(original, task, batch.inputs)
        free = trace_layers(moved, task, batch.inputs)
        fed = trace_layers(moved, task, batch.inputs, fed=wanted)
        before = None
        if off is not None:
            with off.current() as model:
                before = _states(trace_layers(model, task, batch.inputs))
        mask = batch.inputs.get("attention_mask")
        tally.add(
            _states(wanted),
            _states(free),
            _states(fed),
            before,
            None if mask is None else mask.astype(bool),
        )
    return tally.layers()


def _states(trace: "Trace") -> list[Array]:
    return [*trace.states(), trace.logits]


def measured_noise(
    reference: Side, candidate: Side, inputs: Mapping[str, Array], mask: Array | None
) -> float | None:
    """The relative error that the precision alone makes, which no conversion can be blamed for.

    Where the candidate was rounded to 16 bits: the reference computing in that dtype. Else fp32
    itself: a side with plain weights against the same in float64. None where neither can be had.
    """
    rounded = [str(step.options.get("dtype")) for step in lossy_steps(candidate.manifest)]
    dtypes = [dtype for dtype in rounded if dtype in UNIT_ROUNDOFF]
    if rounded and not (dtypes and reference.in_torch):
        return None
    if dtypes:
        return _noise_in(reference, dtypes[-1], inputs, mask)
    plain = [s for s in (reference, candidate) if s.in_torch and not _has_codes(s)]
    return _noise_of_fp32(plain[0], inputs, mask) if plain else None


def _has_codes(side: Side) -> bool:
    return any(not weight.is_floating_point() for weight in _torch_model(side).parameters()) or any(
        hasattr(module, "in_features") and not hasattr(module, "weight")
        for module in _torch_model(side).modules()
    )


def _noise_in(side: Side, dtype: str, inputs: Mapping[str, Array], mask: Array | None) -> float:
    from qlx.models import TorchPredictor, load_model, torch_float

    model = load_model(side.checkpoint, side.source, compute_dtype=torch_float(dtype))
    coarse = TorchPredictor(model, side.manifest.task).predict(inputs)
    return compare(side.outputs(inputs), coarse, mask).relative


def _noise_of_fp32(side: Side, inputs: Mapping[str, Array], mask: Array | None) -> float:
    model, single = _torch_model(side), side.outputs(inputs)
    model.double()
    try:
        exact = np.asarray(side.predictor.predict(inputs))
    finally:
        model.float()
    return compare(exact, single, mask).relative
