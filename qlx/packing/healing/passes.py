"""One pass through the stack of a model: every layer compensated on what the packed ones before it give it.

Two streams of states go along, both of the calibration data: that of the unmerged model, whose end is
what tuning aims at, and that of the packed one, whose inputs the layers are compensated by. One layer's
weights are in memory at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qlx.checkpoint import QuantSpec
from qlx.packing.healing.blocks import Inputs, LayeredModel, Stop
from qlx.packing.healing.compensate import Placed, compensated
from qlx.packing.healing.data import Calibration
from qlx.packing.healing.grids import row_parts
from qlx.packing.healing.paged import release
from qlx.packing.healing.tune import Rows
from qlx.packing.select import Selection
from qlx.packing.source import Weights
from qlx.quant import dequantize_tensor, packed_rows, quantize_activations

__all__ = ["Seen", "Stream", "compensate_stack"]


@dataclass(frozen=True)
class Seen:
    """One layer when it has been compensated: `group` are the layers that get the same inputs, itself too.

    `before` and `weight` are its values without and with the adapter, `before` None where that changed
    nothing or is not known; `hessian` X^T X of its inputs by their number.
    """

    name: str
    group: tuple[str, ...]
    before: Tensor | None
    weight: Tensor
    hessian: Tensor
    placed: Placed


@dataclass
class Stream:
    """What a pass made: packed layers by name, and the rows with the unmerged model's last states."""

    placed: dict[str, Placed] = field(default_factory=dict)
    rows: list[Rows] = field(default_factory=list)
    held_out: list[Rows] = field(default_factory=list)


class _Look(Protocol):
    def __call__(self, seen: Seen) -> None: ...


def compensate_stack(
    model: LayeredModel,
    weights: Weights,
    selection: Selection,
    spec_of: Callable[[str], QuantSpec],
    data: Calibration,
    look: _Look,
    tell: Callable[[str], None],
    *,
    store: bool = True,
) -> Stream:
    """Compensate all of `selection` that lies in the stack, each layer on the grid of `spec_of(name)`.

    `look` is shown every layer while its weights and the products of its inputs are still there;
    without `store` nothing else is wanted of them.
    """
    work = _Pass(model, weights, selection, spec_of, look, store)
    batches = [*data.rows, *data.held_out]
    with torch.no_grad():
        exact = [model.entering(batch) for batch in batches]
        packed = list(exact[: len(data.rows)])
        for at, path in enumerate(model.stack):
            with model.filled(at) as layer:
                groups = work.groups(at, layer, data.rows[0], exact[0])
                _through(model, at, batches, exact)
                for group in groups:
                    work.compensate(at, layer, group, data.rows, packed)
                _through(model, at, data.rows, packed)
            model.pages.rest()
            tell(f"compensated {path}")
    rows = [Rows(inputs, state) for inputs, state in zip(batches, exact, strict=True)]
    return Stream(work.placed, rows[: len(data.rows)], rows[len(data.rows) :])


def _through(model: LayeredModel, at: int, batches: Sequence[Inputs], states: list[Tensor]) -> None:
    """Replace the states before layer `at` by those behind it, batch by batch."""
    for number, batch in enumerate(batches):
        states[number] = model.leaving(at, batch, states[number])


class _Pass:
    """The layers of a stack, compensated group by group."""

    def __init__(
        self,
        model: LayeredModel,
        weights: Weights,
        selection: Selection,
        spec_of: Callable[[str], QuantSpec],
        look: _Look,
        store: bool,
    ) -> None:
        self.model, self.weights, self.selection = model, weights, selection
        self.spec_of, self.look, self.store = spec_of, look, store
        self.placed: dict[str, Placed] = {}

    def groups(
        self, at: int, layer: nn.Module, batch: Inputs, state: Tensor
    ) -> list[tuple[str, ...]]:
        """The modules to pack in a layer in the order they run, those together that get the same inputs."""
        groups: list[list[str]] = []
        last: list[Tensor] = []

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                if last and last[0] is inputs[0]:
                    groups[-1].append(name)
                else:
                    groups.append([name])
                    last[:] = [inputs[0]]

            return hook

        modules = {name: self.model.model.get_submodule(name) for name in self.selection.tensors}
        inside = set(layer.modules())
        handles = [
            module.register_forward_pre_hook(note(name))
            for name, module in modules.items()
            if module in inside
        ]
        self.model.leaving(at, batch, state)
        for handle in handles:
            handle.remove()
        return [tuple(group) for group in groups]

    def compensate(
        self,
        at: int,
        layer: nn.Module,
        group: tuple[str, ...],
        batches: Sequence[Inputs],
        states: Sequence[Tensor],
    ) -> None:
        """Round the modules of a group by their common inputs; their weights become the rounded ones."""
        hessian = self._hessian(at, group[0], batches, states)
        for name in group:
            self.model.rest(at)
            module: Any = self.model.model.get_submodule(name)
            weight = module.weight.data
            placed = compensated(weight, hessian, self.spec_of(name))
            if self.store:
                self.placed[name] = placed = self._paged(name, placed)
            release([weight])
            before = self.weights.before(self.selection.tensors[name])
            self.look(Seen(name, group, before, weight, hessian, placed))
            del before
            release([hessian, weight])
            for rows in row_parts(placed.packed):
                weight[rows] = dequantize_tensor(packed_rows(placed.packed, rows), torch.float32)

    def _hessian(
        self, at: int, name: str, batches: Sequence[Inputs], states: Sequence[Tensor]
    ) -> Tensor:
        """X^T X of a module's inputs at all real positions by their number, float32 [in, in]."""
        bits = self.spec_of(name).activation_bits
        found: list[Tensor] = []

        def gather(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found.append(inputs[0])
            raise Stop

        module: Any = self.model.model.get_submodule(name)
        handle, inside = module.register_forward_pre_hook(gather), module.weight.shape[1]
        total, count = self.model.pages.zeros("hessian", (inside, inside)), 0
        for batch, state in zip(batches, states, strict=True):
            self.model.leaving(at, batch, state)
            inputs = _real(found.pop(), batch.get("attention_mask"))
            inputs = inputs if bits is None else quantize_activations(inputs, bits)
            total.addmm_(inputs.T, inputs)
            count += len(inputs)
        handle.remove()
        return total.div_(count)

    def _paged(self, name: str, placed: Placed) -> Placed:
        """The same, lying in files."""
        pages = self.model.pages
        packed = pages.keep_packed(f"{name}.compensated", placed.packed)
        return Placed(packed, pages.keep(f"{name}.fractions", placed.fractions))


def _real(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """Inputs [n, T, in] at real positions, or all of any shape, as rows."""
    if mask is not None and inputs.shape[:2] == mask.shape:
        return inputs[mask.bool()]
    return inputs.reshape(-1, inputs.shape[-1])
