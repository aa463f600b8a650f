"""The weights to pack: a merged checkpoint's, or an adapter's merged on the fly, tensor by tensor."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from torch import Tensor

from qlx.checkpoint import Checkpoint, Manifest, Source
from qlx.errors import InputRefused, Mismatch
from qlx.merging import MergePlan, adapter_checkpoint, as_trained, base_value, merged_value, plan_of
from qlx.merging.coded import open_base
from qlx.merging.stream import load_tensor
from qlx.merging.values import codes_as_trained, exact_codes
from qlx.quant import GRID_FILE, PackedTensor, grid_names, packed_on_grid
from qlx.verification import base_of, later_steps, needs_base
from qlx.weights import WeightSet, open_weights, read_header, read_tensors

__all__ = ["Weights", "WholeWeights", "weights_to_pack"]


class Weights(Protocol):
    """Tensors by their names in the files, and what they were before the adapter."""

    @property
    def directory(self) -> Path:
        """Where the weight files lie whose tensor names these are."""
        ...

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, known without reading it."""
        ...

    def value(self, name: str, *, full: bool) -> Tensor:
        """The tensor to store; `full` gives it in fp32, before any rounding to the stored dtype."""
        ...

    def before(self, name: str) -> Tensor | None:
        """The fp32 value without the adapter, as training saw it; None if unknown or the same."""
        ...

    def codes(self, name: str) -> PackedTensor | None:
        """The codes that an exact adapter left of a tensor quantized in training; None of any other."""
        ...


@dataclass(frozen=True)
class WholeWeights:
    """Weights that exist as files; `base` and its record tell what they were before the adapter."""

    weights: WeightSet
    manifest: Manifest
    base: WeightSet | None

    @property
    def directory(self) -> Path:
        """The checkpoint's directory."""
        return self.weights.directory

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self.weights)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in the file's header."""
        return self.weights[name].shape

    def value(self, name: str, *, full: bool) -> Tensor:
        """The stored tensor."""
        stored = load_tensor(self.weights, name)
        return stored.float() if full else stored

    def before(self, name: str) -> Tensor | None:
        """The base's tensor, through the codec of training where that quantized it."""
        adapted = (
            self.manifest.adapter is not None and name in self.manifest.adapter.tensors.values()
        )
        if self.base is None or not adapted or name not in self.base:
            return None
        if _onto_original(self.manifest):
            return load_tensor(self.base, name).float()
        return as_trained(self.base, self.manifest.quantization, name)

    def codes(self, name: str) -> PackedTensor | None:
        """Those whose values the file holds, told by the scales that the merge kept beside it."""
        spec, adapter = self.manifest.quantization, self.manifest.adapter
        if adapter is None or adapter.type != "exact" or name not in spec.tensors:
            return None
        file = self.directory / GRID_FILE
        entries = read_tensors(file, grid_names(read_header(file).tensors, name))
        return packed_on_grid(entries, name, load_tensor(self.weights, name), spec)


def _onto_original(manifest: Manifest) -> bool:
    return any(step.options.get("onto") == "original" for step in later_steps(manifest))


@dataclass(frozen=True)
class MergedOnTheFly:
    """Weights that a merge plan would write, without writing them."""

    plan: MergePlan

    @property
    def directory(self) -> Path:
        """The base's directory."""
        return self.plan.weights.directory

    def names(self) -> list[str]:
        """All tensor names of the merged model, sorted."""
        return sorted({*self.plan.weights, *self.plan.changes})

    def shape(self, name: str) -> tuple[int, ...]:
        """The merged tensor's shape."""
        change = self.plan.changes.get(name)
        return self.plan.weights[name].shape if change is None else change.shape

    def value(self, name: str, *, full: bool) -> Tensor:
        """The merged tensor."""
        change = self.plan.changes.get(name)
        if change is None:
            stored = load_tensor(self.plan.weights, name)
            return stored.float() if full else stored
        return merged_value(self.plan, replace(change, dtype="F32") if full else change)[0]

    def before(self, name: str) -> Tensor | None:
        """The base's value that the delta is added to."""
        change = self.plan.changes.get(name)
        moved = change is not None and (change.delta is not None or change.exact is not None)
        return base_value(self.plan, change) if change is not None and moved else None

    def codes(self, name: str) -> PackedTensor | None:
        """Those that the adapter makes of the base's."""
        plan = self.plan
        if not plan.moves_codes or name not in plan.spec.tensors:
            return None
        change = plan.changes.get(name)
        if change is None or change.exact is None:
            return codes_as_trained(plan.weights, plan.spec, name)
        return exact_codes(plan, change)


@contextmanager
def weights_to_pack(
    checkpoint: Checkpoint, base: str | Path | None
) -> Iterator[tuple[Weights, Path]]:
    """The weights of any unpacked torch checkpoint, and the directory with its companions.

    Raises:
        InputRefused: the kind cannot be packed, or an adapter's base is not to be found.
        Mismatch: the base is not the recorded one.
    """
    manifest = checkpoint.manifest
    if manifest.kind not in ("run", "adapter", "merged"):
        raise InputRefused(
            f"{checkpoint.path}: a checkpoint of kind {manifest.kind!r} cannot be packed; pack a merged one"
        )
    if not needs_base(manifest):
        yield (
            WholeWeights(open_weights(checkpoint.path), manifest, _base_weights(checkpoint, base)),
            checkpoint.path,
        )
        return
    with adapter_checkpoint(checkpoint.path, base) as (adapter, recorded):
        source = base_of(adapter, base)
        assert source is not None
        plan = plan_of(adapter, source, None, None, recorded, to_pack=True)
        yield MergedOnTheFly(plan), adapter.path


def _base_weights(checkpoint: Checkpoint, base: str | Path | None) -> WeightSet | None:
    if base is None:
        return None
    if checkpoint.manifest.base is None:
        raise Mismatch(f"{checkpoint.path}: records no base; leave --base out")
    source: Source | None = base_of(checkpoint, base)
    return None if source is None else open_base(source.path)
