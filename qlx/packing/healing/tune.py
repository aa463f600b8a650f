"""Tuning a packed model against the one it was made of: scales first, then the rounding itself.

The loss is KL(unmerged ‖ packed) of the outputs on calibration data. Scales are learned as
s = s0 · exp(l), the codes staying what compensation made them. After that a low-rank C = B A inside
the rounding, level = round(position + C), with straight-through gradients (LR-QAT, arXiv 2406.06385)
moves single codes. Both use Adam with a warm-up and a cosine, and what is kept is what has the
smallest KL on held-out rows, the untuned model included.

One layer of the stack is in memory at a time: what each holds and learns, and its optimizer's states, lie in
files (`paged`), and it takes its step as soon as the backward pass has gone through it.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlx.packing.healing.blocks import Inputs, LayeredModel
from qlx.packing.healing.compensate import Placed
from qlx.packing.healing.grids import (
    grid_of,
    levels_of,
    on_grid,
    row_parts,
    scales_of,
    spread,
    with_parts,
)
from qlx.packing.healing.paged import Pages, Resting, release, tensors_of
from qlx.quant import FOUR_BIT, PackedTensor, packed_rows, quantize_activations

__all__ = ["PackedLayer", "Rows", "divergence_of", "tune"]

_SCALE_RATE = 2e-2  # of the logarithms
_CORRECTION_RATE = 0.05  # by the number of levels: finer grids lie closer to what is wanted
_WARM_UP, _LAST_RATE = 15, 0.03  # steps, and the share of the rate that is left at the end
_CHECKS = 10  # looks at the held-out rows in one stage


@dataclass(frozen=True)
class Rows:
    """A batch of inputs and what the unmerged model's last layer made of them."""

    inputs: Inputs
    state: Tensor

    @property
    def mask(self) -> Tensor | None:
        """Which positions are real, bool [n, T]; None where all are."""
        mask = self.inputs.get("attention_mask")
        return None if mask is None else mask.bool()


class PackedLayer(Resting):
    """A linear layer on its grid whose scales and rounding can be tuned.

    `logs` are added to the logarithms of the scales; `down` A [rank, in] and `up` B [out, rank] make
    the correction. Either is None until a stage wants it. They lie in `pages`, by the layer's name.
    """

    def __init__(
        self,
        placed: Placed,
        bias: Tensor | None,
        activation_bits: int | None,
        name: str,
        pages: Pages,
    ) -> None:
        super().__init__()
        self.placed, self.bias, self.activation_bits = placed, bias, activation_bits
        self.name, self.pages = name, pages
        self._remembered: dict[str, dict[str, Tensor | None]] = {}
        self.grid = grid_of(placed.packed.scheme)
        self.scales = pages.keep(f"{name}.scales", scales_of(placed.packed).float())
        self.logs: nn.Parameter | None = None
        self.down: nn.Parameter | None = None
        self.up: nn.Parameter | None = None

    def held(self) -> Iterator[Tensor]:
        """Codes, scales and fractions; what is learned are parameters."""
        yield from (*tensors_of(self.placed), self.scales)

    @property
    def scalable(self) -> bool:
        """Whether its layout can hold other scales than the codec's."""
        return self.placed.packed.scheme not in FOUR_BIT

    def forward(self, input: Tensor) -> Tensor:
        """The product with the tuned values, in float32."""
        if self.activation_bits is not None:
            input = quantize_activations(input, self.activation_bits)
        scales = self.scales if self.logs is None else self.scales * self.logs.exp()
        product: Callable[..., Tensor] = _Product.apply
        output = product(input, scales, self.down, self.up, self)
        return output if self.bias is None else output + self.bias

    def levels(self, rows: slice) -> Tensor:
        """The levels of some rows as they are now, float32 [rows, in]."""
        if self.down is None or self.up is None:
            return levels_of(packed_rows(self.placed.packed, rows))
        return self.grid.rounded(self.positions(rows))

    def positions(self, rows: slice) -> Tensor:
        """Where between the levels every value of some rows lies now, float32 [rows, in]."""
        assert self.down is not None
        assert self.up is not None
        packed = packed_rows(self.placed.packed, rows)
        before = Placed(packed, self.placed.fractions[rows]).positions()
        return before.addmm_(self.up.detach()[rows], self.down.detach())

    def packed(self) -> PackedTensor:
        """The weight as it is to be stored."""
        scales = None if self.logs is None else self.scales * self.logs.detach().exp()
        levels = torch.cat([self.levels(rows) for rows in row_parts(self.placed.packed)])
        return with_parts(self.placed.packed, levels, scales)

    def learn(self, rank: int, generator: torch.Generator) -> list[dict[str, Any]]:
        """Make the parameters of a stage and return them with their rates; of rank 0 only the scales."""
        groups: list[dict[str, Any]] = []
        if self.scalable:
            if self.logs is None:
                self.logs = nn.Parameter(self.pages.zeros(f"{self.name}.logs", self.scales.shape))
            groups.append({"params": [self.logs], "lr": _SCALE_RATE})
        if rank:
            rows, columns = self.placed.packed.shape
            first = torch.randn(rank, columns, generator=generator) / math.sqrt(columns)
            self.down = nn.Parameter(self.pages.keep(f"{self.name}.down", first))
            self.up = nn.Parameter(self.pages.zeros(f"{self.name}.up", (rows, rank)))
            rate = _CORRECTION_RATE / len(self.grid.levels)
            groups.append({"params": [self.down, self.up], "lr": rate})
        return groups

    def remember(self, when: str) -> None:
        """Keep what is learned so far under a name of its own, for `recall`."""
        parts = {"logs": self.logs, "down": self.down, "up": self.up}
        self._remembered[when] = {
            part: None if item is None else self.pages.keep(f"{self.name}.{part}.{when}", item)
            for part, item in parts.items()
        }
        release(item for item in parts.values() if item is not None)

    def recall(self, when: str) -> None:
        """Have again what `remember` kept."""
        for part, value in self._remembered[when].items():
            own = getattr(self, part)
            if value is None or own is None:
                setattr(self, part, None)
            else:
                own.data.copy_(value)
                release([own, value])


class _Product(torch.autograd.Function):
    """x W^T with W made of levels and scales in both passes, some rows at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scales: Tensor,
        down: Tensor | None,
        up: Tensor | None,
        layer: PackedLayer,
    ) -> Tensor:
        ctx.save_for_backward(x, scales)
        ctx.layer = layer
        parts = (
            nn.functional.linear(x, on_grid(layer.levels(rows), _of_rows(scales, rows)))
            for rows in row_parts(layer.placed.packed)
        )
        return torch.cat(list(parts), dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scales = ctx.saved_tensors
        layer: PackedLayer = ctx.layer
        made = _Gradients(layer, x, scales)
        for rows in row_parts(layer.placed.packed):
            made.add(rows, gradients[0], ctx.needs_input_grad)
        return made.to_x, made.to_scales, made.to_down, made.to_up, None


class _Gradients:
    """What `_Product` passes back, gathered over the rows of the weight."""

    def __init__(self, layer: PackedLayer, x: Tensor, scales: Tensor) -> None:
        self.layer, self.x, self.scales = layer, x, scales
        self.to_x: Tensor | None = None
        self.to_scales = torch.zeros_like(scales)
        self.to_down = None if layer.down is None else torch.zeros_like(layer.down)
        self.to_up = None if layer.up is None else torch.zeros_like(layer.up)

    def add(self, rows: slice, gradient: Tensor, needed: Sequence[bool]) -> None:
        """Add the part of some rows."""
        gradient, levels = gradient[..., rows], self.layer.levels(rows)
        scales = _of_rows(self.scales, rows)
        if needed[0]:
            to_x = gradient @ on_grid(levels, scales)
            self.to_x = to_x if self.to_x is None else self.to_x.add_(to_x)
        if any(needed[1:4]):
            weight = gradient.reshape(-1, len(levels)).T @ self.x.reshape(-1, levels.shape[1])
            self._learned(rows, weight, levels, scales)

    def _learned(self, rows: slice, weight: Tensor, levels: Tensor, scales: Tensor) -> None:
        """The gradients of scales and correction from those of the weight's values, [rows, in]."""
        layer, shape = self.layer, (int(levels.shape[0]), int(levels.shape[1]))
        cut = spread(scales, shape)
        weight = weight.reshape(cut.shape)
        to_scales = (weight * levels.reshape(cut.shape)).sum(dim=-1)
        if len(self.scales) == 1:
            self.to_scales += to_scales.sum(dim=0, keepdim=True)
        else:
            self.to_scales[rows] = to_scales
        if layer.down is None or layer.up is None or self.to_down is None or self.to_up is None:
            return
        # straight through the rounding, and nowhere beyond the ends of the grid
        moved = (weight * cut).reshape(shape) * layer.grid.inside(layer.positions(rows))
        self.to_down += layer.up.detach()[rows].T @ moved
        self.to_up[rows] = moved @ layer.down.detach().T


def _of_rows(scales: Tensor, rows: slice) -> Tensor:
    """The scales of some rows of a weight, or the one that serves them all."""
    return scales if len(scales) == 1 else scales[rows]


def divergence_of(reference: Tensor, outputs: Tensor, mask: Tensor | None) -> Tensor:
    """Mean KL(softmax(reference) ‖ softmax(outputs)) over the real positions, in nats, differentiable.

    The same quantity as `qlx.verification.compare` reports, in float32 and with a gradient; of
    heatmaps [n, K, h, w] softmax is taken over the cells.
    """
    if outputs.ndim == 4:
        reference, outputs = reference.flatten(2), outputs.flatten(2)
    if mask is not None:
        reference, outputs = reference[mask], outputs[mask]
    wanted = reference.log_softmax(dim=-1)
    return (wanted.exp() * (wanted - outputs.log_softmax(dim=-1))).sum(dim=-1).mean()


def tune(
    model: LayeredModel,
    layers: Mapping[str, PackedLayer],
    rows: Sequence[Rows],
    held_out: Sequence[Rows],
    *,
    steps: int,
    rank: int,
    seed: int,
) -> str:
    """Tune `layers`, by name and in their places in `model`; what was kept of it.

    `compensation`, `scales` or `correction` is kept: the last stage that made the held-out rows better.
    """
    best, kept = _held_out(model, held_out), "compensation"
    stages = [("scales", 0)] if any(layer.scalable for layer in layers.values()) else []
    stages += [("correction", rank)] if rank else []
    for at, (name, own_rank) in enumerate(stages if steps else []):
        generator = torch.Generator().manual_seed(seed + at)
        for layer in layers.values():
            layer.remember("before")
        optimizers = [
            _Optimizer(model.pages, part, own_rank, generator, steps)
            for part in _by_stack(model, layers)
        ]
        least = _stage(model, layers, rows, held_out, optimizers, steps, generator)
        if least < best:
            best, kept = least, name
        for layer in layers.values():
            layer.recall("best" if kept == name else "before")
    return kept


def _by_stack(
    model: LayeredModel, layers: Mapping[str, PackedLayer]
) -> list[dict[str, PackedLayer]]:
    """The packed layers that lie in each layer of the stack."""
    return [
        {name: layer for name, layer in layers.items() if name.startswith(f"{path}.")}
        for path in model.stack
    ]


class _Optimizer:
    """Adam for what the packed layers of one layer of the stack learn, its states in files."""

    def __init__(
        self,
        pages: Pages,
        layers: Mapping[str, PackedLayer],
        rank: int,
        generator: torch.Generator,
        steps: int,
    ) -> None:
        groups = [group for layer in layers.values() for group in layer.learn(rank, generator)]
        self.adam = torch.optim.Adam(groups, betas=(0.9, 0.98)) if groups else None
        if self.adam is None:
            return
        self.rates = torch.optim.lr_scheduler.LambdaLR(self.adam, lambda step: _rate(step, steps))
        self.states: list[Tensor] = []
        places = [parameter for group in groups for parameter in group["params"]]
        for at, parameter in enumerate(places):
            moments = {
                key: pages.zeros(f"{next(iter(layers))}.{at}.{key}", parameter.shape)
                for key in ("exp_avg", "exp_avg_sq")
            }
            self.adam.state[parameter] = {"step": torch.tensor(0.0), **moments}
            self.states += moments.values()
        release([*places, *self.states])

    def step(self) -> None:
        """Move by the gradients there are, and let go of them and of the states."""
        if self.adam is not None:
            self.adam.step()
            self.adam.zero_grad()
            self.rates.step()
            release(self.states)


def _stage(
    model: LayeredModel,
    layers: Mapping[str, PackedLayer],
    rows: Sequence[Rows],
    held_out: Sequence[Rows],
    optimizers: Sequence[_Optimizer],
    steps: int,
    generator: torch.Generator,
) -> float:
    """One stage of learning; the least held-out KL, whose parameters are remembered as `best`."""
    least, order = math.inf, _order(len(rows), generator)
    for step in range(1, steps + 1):
        batch = rows[next(order)]
        with torch.no_grad():
            wanted = model.finished(batch.inputs, batch.state)
        model.learn(
            batch.inputs,
            functools.partial(divergence_of, wanted, mask=batch.mask),
            lambda at: optimizers[at].step(),
        )
        if step % max(1, steps // _CHECKS) == 0 or step == steps:
            found = _held_out(model, held_out)
            if found < least:
                least = found
                for layer in layers.values():
                    layer.remember("best")
    return least


def _rate(step: int, steps: int) -> float:
    """The share of the learning rate at a step: a warm-up, then half a cosine down to `_LAST_RATE`."""
    falling = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / _WARM_UP) * (_LAST_RATE + (1 - _LAST_RATE) * falling)


def _order(count: int, generator: torch.Generator) -> Iterator[int]:
    """Batches for ever, each time in another order."""
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _held_out(model: LayeredModel, rows: Sequence[Rows]) -> float:
    """Mean KL over the real positions of all rows."""
    total = count = 0.0
    with torch.no_grad():
        for batch in rows:
            wanted = model.finished(batch.inputs, batch.state)
            found = divergence_of(wanted, model.outputs(batch.inputs), batch.mask)
            size = float(len(wanted) if batch.mask is None else batch.mask.sum())
            total, count = total + float(found) * size, count + size
    return total / count
