"""Packed-exact adapters: LoRA inside the rounding, so that what was trained is what the packed format holds.

The weight of an adapted layer is at every step of the training a weight of its grid:

    codes = clip(round(place + C)),  weight = scale * codes,  C = scaling / step * B A

`place` is where the base's weight lies among its codes (`qlx.quant.grid`), `step` the mean distance of two codes, so
that B A counts in the units of the weight and learning rates are LoRA's. Scales of integer codes learn, too:
scale = scale0 * exp(l), and so do zero points, zero = clip(round(zero0 + z)). The method is LR-QAT's (arXiv
2406.06385), with NF4 as one more grid. Merging writes the values of these codes, packing the codes; neither rounds
anything again.

A *folded* adapter leaves the codes and moves zero points that are no whole numbers: QA-LoRA's way (arXiv 2309.14717),
whose A [r, groups] sees the sum of each group's inputs, so that B A adds the same to all weights of a group:

    weight = scale * (codes - zero'),  zero' = zero - scaling B A / scale

B A is computed in float64 and rounded to float32 once: a sum of a few hundred products is then the same on any
machine, however it is cut. The fingerprint of the codes is recorded, and checked by whoever makes them again.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlx.adapters.config import pattern_matches
from qlx.adapters.formula import scaling_of
from qlx.checkpoint import AdapterSpec
from qlx.errors import CorruptCheckpoint, Mismatch, Unsupported
from qlx.quant import (
    EXACT_SCHEMES,
    Grid,
    Move,
    PackedTensor,
    linear_learned,
    names_part,
    packed_fingerprint,
    packed_layer,
    packed_modules,
    packed_of_module,
    quantize_activations,
)
from qlx.recipe import AdapterSection
from qlx.weights import read_tensors, write_tensors

__all__ = [
    "EXACT_FILE",
    "ExactLinear",
    "ExactUpdate",
    "ExactWeights",
    "attach_exact",
    "exact_layers",
    "exact_spec",
    "not_quantized",
    "put_exact",
    "read_exact",
    "require_exact_codes",
    "save_exact",
]

EXACT_FILE = "exact_adapter.safetensors"
"""The file of a packed-exact adapter. PEFT has no such type, and must not take it for a LoRA."""

_A, _B, _SCALE, _ZERO = "lora_A", "lora_B", "lora_scale", "lora_zero"
_PARTS = (_A, _B, _SCALE, _ZERO)
_FOLDS = ("int4", "int2")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

Original = Callable[[str], Tensor | None]
"""A module's weight before it was quantized, by the module's name; None where only its codes are known."""


@dataclass(frozen=True)
class ExactUpdate:
    """What an adapter does to one packed weight: `a` [r, in], `b` [out, r], learned `log_scales` and `zeros` or None.

    Of a `folded` one `a` is [r, groups]. What learns is float32, scales and zeros in the shape of the grid's.
    """

    a: Tensor
    b: Tensor
    scaling: float
    log_scales: Tensor | None = None
    zeros: Tensor | None = None
    folded: bool = False

    @property
    def empty(self) -> bool:
        """Whether nothing was ever trained."""
        moved = bool(self.a.any()) and bool(self.b.any())
        learned = (self.log_scales, self.zeros)
        return not moved and not any(part is not None and bool(part.any()) for part in learned)

    def applied(self, grid: Grid) -> PackedTensor:
        """The packed weight that training ended with."""
        return grid.moved(self._move(grid))

    def values(self, grid: Grid) -> Tensor:
        """Its values, float32 [out, in], differentiable in all that learns."""
        return grid.values(self._move(grid))

    def _move(self, grid: Grid) -> Move:
        if self.folded:
            folded = correction(self.a, self.b, self.scaling)
            return Move(log_scales=self.log_scales, folded=folded)
        steps = correction(self.a, self.b, self.scaling / grid.step)
        return Move(steps, self.log_scales, self.zeros)

    def shape(self, group_size: int | None) -> tuple[int, int]:
        """The shape of the weight it moves, in groups of `group_size` inputs."""
        width = group_size or 1 if self.folded else 1
        return self.b.shape[0], self.a.shape[1] * width

    def fits(self, grid: Grid) -> bool:
        """Whether everything has the shape that the grid's weight wants."""
        learned = [part.shape for part in (self.log_scales, self.zeros) if part is not None]
        inner = grid.scale_shape if self.folded else grid.packed.shape
        return self.shape(None) == inner and all(part == grid.scale_shape for part in learned)


def correction(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """Factor * B A, float32 [out, in]."""
    return (b.double() @ a.double() * factor).float()


class ExactLinear(nn.Module):
    """x [..., in] -> [..., out] with a packed weight whose codes an adapter moves.

    The parameters `lora_A` [r, in], `lora_B` [out, r] and, where they learn, `lora_scale` and `lora_zero` are float32,
    and are what `ExactUpdate` says. Values are made in float32 and cast once to `compute_dtype` (that of x if None),
    as a packed layer makes them. `off` leaves the base's own codes.
    """

    def __init__(
        self,
        grid: Grid,
        layer: Any,
        *,
        rank: int,
        scaling: float,
        learned_scales: bool,
        folded: bool = False,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = grid.packed.shape
        self.grid, self.scaling, self.folded, self.off = grid, scaling, folded, False
        self.bias: nn.Parameter | None = layer.bias
        self.compute_dtype: torch.dtype | None = layer.compute_dtype
        self.activation_bits: int | None = getattr(layer, "activation_bits", None)
        shape = grid.scale_shape
        inner = shape[1] if folded and shape else self.in_features
        a = torch.empty(rank, inner, dtype=torch.float32)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # as PEFT's LoRA begins
        # a fold's is as wide as LoRA's, too, so that the same learning rates fit
        a *= math.sqrt(inner / self.in_features)
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank))
        learns = learned_scales and shape is not None
        self.lora_scale = nn.Parameter(torch.zeros(shape)) if learns and shape else None
        moves = learns and grid.has_zeros and not folded
        self.lora_zero = nn.Parameter(torch.zeros(shape)) if moves and shape else None

    @property
    def update(self) -> ExactUpdate:
        """The adapter as it is now, sharing memory."""
        return self._updated([part.detach() for part in self.learned.values()])

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """The parameters that there are, by name."""
        found = {name: getattr(self, name) for name in _PARTS}
        return {name: part for name, part in found.items() if part is not None}

    def _updated(self, parts: Sequence[Tensor]) -> ExactUpdate:
        """The update that values of `learned` make."""
        named = dict(zip(self.learned, parts, strict=True))
        scales, zeros = named.get(_SCALE), named.get(_ZERO)
        return ExactUpdate(named[_A], named[_B], self.scaling, scales, zeros, self.folded)

    @property
    def packed(self) -> PackedTensor:
        """The packed weight as the adapter has moved it."""
        return self.grid.packed if self.off else self.update.applied(self.grid)

    def forward(self, input: Tensor) -> Tensor:
        """The product, returned in the dtype of the input."""
        dtype = self.compute_dtype or input.dtype
        x = (
            input
            if self.activation_bits is None
            else quantize_activations(input, self.activation_bits)
        )
        if self.off:
            y = nn.functional.linear(x.to(dtype), self.grid.packed.values().to(dtype))
        else:
            y = linear_learned(x.to(dtype), self._values, *self.learned.values())
        if self.bias is not None:
            y += self.bias.to(dtype)
        return y.to(input.dtype)

    def _values(self, *parts: Tensor) -> Tensor:
        return self._updated(parts).values(self.grid)

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> "ExactLinear":
        """The grid goes where the parameters go; its types never change."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.grid = self.grid.to(self.lora_A.device)
        return self

    def extra_repr(self) -> str:
        """Sizes, scheme and rank."""
        packed = self.grid.packed
        return f"{self.in_features}, {self.out_features}, {packed.scheme}, rank={len(self.lora_A)}"


def exact_layers(model: nn.Module) -> dict[str, ExactLinear]:
    """The layers of a model that learn inside the rounding, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, ExactLinear)}


def attach_exact(
    model: nn.Module, section: AdapterSection, targets: Sequence[str], original: Original
) -> nn.Module:
    """Give a quantized model, changed in place, a fresh packed-exact adapter; all else is frozen.

    `targets` are endings of names. The model gets a method `disable_adapter`, as PEFT's have.

    Raises:
        Unsupported: a target is not quantized, or not on a grid of `EXACT_SCHEMES`, or its zero points are to be
            moved and it has none.
    """
    packed = dict(packed_modules(model))
    chosen = [
        n for n, _ in model.named_modules() if any(f".{n}".endswith(f".{t}") for t in targets)
    ]
    plain = [name for name in chosen if name not in packed]
    if plain or not chosen:
        raise Unsupported(not_quantized(plain[0] if plain else "model"))
    model.requires_grad_(False)
    for name in chosen:
        layer = _exact(name, packed[name], section, original(name))
        model.set_submodule(name, layer.train(packed[name].training))
    before = {}
    for name, parameter in model.named_parameters():
        if any(names_part(name.rpartition(".")[0], part) for part in section.modules_to_save):
            before[name] = parameter.detach().clone()
            parameter.requires_grad_(True)
    for mark in (
        "is_loaded_in_4bit",
        "is_quantized",
    ):  # by which Trainer refuses bases without an adapter
        setattr(model, mark, False)
    model.disable_adapter = partial(_without, model, before)  # type: ignore[assignment]
    return model


def not_quantized(name: str) -> str:
    """What is said of a target that has no codes."""
    return (
        f"adapter.exact: {name!r} is not quantized, so there are no codes to move; quantize it to one of "
        f"{', '.join(EXACT_SCHEMES)}, or leave it out of adapter.target_modules"
    )


def _exact(
    name: str, layer: nn.Module, section: AdapterSection, weight: Tensor | None
) -> ExactLinear:
    rank = _of(section.rank_pattern, name, section.rank)
    scaling = scaling_of(
        _of(section.alpha_pattern, name, section.alpha), rank, use_rslora=section.use_rslora
    )
    try:
        grid = Grid.of(packed_of_module(layer), None if section.folded else weight)
    except Unsupported as error:
        raise Unsupported(f"adapter.exact: layer {name!r}: {error}") from error
    if section.folded and not (grid.has_zeros and grid.packed.scheme in _FOLDS):
        raise Unsupported(
            f"adapter.exact: layer {name!r} has {grid.packed.scheme} codes; fold takes "
            f"{' and '.join(_FOLDS)} ones with zero points"
        )
    return ExactLinear(
        grid,
        layer,
        rank=rank,
        scaling=scaling,
        learned_scales=section.learned_scales,
        folded=section.folded,
    )


def _of(pattern: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    return next((value for key, value in pattern.items() if pattern_matches(key, name)), otherwise)


@contextmanager
def _without(model: nn.Module, before: Mapping[str, Tensor]) -> Iterator[None]:
    """The base's own codes, and what the adapter trains whole as it was `before`, by name."""
    layers, parameters = exact_layers(model).values(), dict(model.named_parameters())
    trained = {name: parameters[name].data for name in before}
    for layer in layers:
        layer.off = True
    for name, value in before.items():
        parameters[name].data = value.to(trained[name].device, trained[name].dtype)
    try:
        yield
    finally:
        for layer in layers:
            layer.off = False
        for name, value in trained.items():
            parameters[name].data = value


def _whole(model: nn.Module) -> dict[str, Tensor]:
    """What is trained beside the codes: parameters of modules that are saved whole."""
    parts = {f"{name}.{part}" for name in exact_layers(model) for part in _PARTS}
    trained = ((name, value) for name, value in model.named_parameters() if value.requires_grad)
    return {name: value.detach() for name, value in trained if name not in parts}


def save_exact(model: nn.Module, directory: Path) -> None:
    """Write `exact_adapter.safetensors`, the same bytes every time; the manifest says the rest."""
    tensors = {name: value.cpu() for name, value in _whole(model).items()}
    for name, layer in exact_layers(model).items():
        learned = layer.learned.items()
        tensors |= {f"{name}.{part}": value.detach().cpu() for part, value in learned}
    write_tensors(Path(directory) / EXACT_FILE, tensors, metadata={"format": "pt"})


@dataclass(frozen=True)
class ExactWeights:
    """A packed-exact adapter: an update for each module, and parameters saved whole, by name in memory."""

    updates: dict[str, ExactUpdate]
    saved: dict[str, Tensor]


def read_exact(directory: Path, spec: AdapterSpec) -> ExactWeights:
    """Read the adapter that `spec` describes; every tensor finds its place or is refused.

    Raises:
        CorruptCheckpoint: a tensor is missing, too many, or of another shape or type than its record says.
    """
    path = Path(directory) / EXACT_FILE
    if not path.is_file():
        raise CorruptCheckpoint(f"{path} is missing")
    tensors = read_tensors(path)
    updates = {name: _update(path, name, tensors, spec) for name in spec.tensors}
    for name, value in tensors.items():
        module = name.rpartition(".")[0]
        if not any(names_part(module, part) for part in spec.modules_to_save):
            raise CorruptCheckpoint(f"{path}: tensor {name!r} belongs to nothing the record lists")
        if value.dtype not in _FLOATS or not bool(torch.isfinite(value).all()):
            raise CorruptCheckpoint(f"{path}: tensor {name!r} holds other than finite numbers")
    return ExactWeights(updates, tensors)


def _update(path: Path, name: str, tensors: dict[str, Tensor], spec: AdapterSpec) -> ExactUpdate:
    """The update of one module, whose tensors are taken out of `tensors`."""
    found = [tensors.pop(f"{name}.{part}", None) for part in _PARTS]
    a, b, scale, zero = found
    learns = spec.learned_scales
    misplaced = (scale is None) == learns or (zero is not None and (spec.folded or not learns))
    if a is None or b is None or misplaced:
        raise CorruptCheckpoint(f"{path}: not all tensors of the module {name!r} are there")
    rank = _of(spec.rank_pattern, name, spec.rank)
    fits = a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] == rank
    there = [tensor for tensor in found if tensor is not None]
    finite = all(t.dtype == torch.float32 and bool(torch.isfinite(t).all()) for t in there)
    if not fits or not finite:
        raise CorruptCheckpoint(
            f"{path}: the tensors of module {name!r} are {[*a.shape]} and {[*b.shape]}, or not finite float32; "
            f"its rank is {rank}"
        )
    alpha = float(_of(spec.alpha_pattern, name, spec.alpha))
    scaling = scaling_of(alpha, rank, use_rslora=spec.use_rslora)
    return ExactUpdate(a, b, scaling, scale, zero, spec.folded)


def put_exact(
    model: nn.Module, adapter: ExactWeights, original: Original, where: Path
) -> nn.Module:
    """Put an adapter into a model quantized as in training, in place: packed layers with the codes it ended with.

    Raises:
        Mismatch: a module is not packed in this base, or something has another shape.
    """
    layers: dict[str, Any] = dict(packed_modules(model))
    for name, update in adapter.updates.items():
        if name not in layers:
            raise Mismatch(f"{where}: module {name!r} of the adapter is not quantized in this base")
        grid = Grid.of(packed_of_module(layers[name]), original(name))
        _require_fit(where, name, update, grid)
        layer = layers[name]
        bits = getattr(layer, "activation_bits", None)
        model.set_submodule(
            name, packed_layer(update.applied(grid), layer.bias, layer.compute_dtype, bits).eval()
        )
    parameters = dict(model.named_parameters())
    for name, value in adapter.saved.items():
        if name not in parameters or parameters[name].shape != value.shape:
            raise Mismatch(
                f"{where}: {name!r} of the adapter has no place of its shape in this base"
            )
        parameters[name].data = value.to(parameters[name].dtype)
    return model


def _require_fit(where: Path, name: str, update: ExactUpdate, grid: Grid) -> None:
    if not update.fits(grid):
        shape = (update.b.shape[0], update.a.shape[1])
        raise Mismatch(
            f"{where}: the adapter's update of {name!r} is {[*shape]}, the base's weight {[*grid.packed.shape]}"
        )


def require_exact_codes(spec: AdapterSpec, found: str, where: str) -> None:
    """Check the fingerprint of the codes that an adapter makes of its base against the record of its training.

    Raises:
        Mismatch: it is another one.
    """
    recorded = spec.codes or "sha256:none"
    if found != recorded:
        raise Mismatch(
            f"{where}: adapter and base make other codes than training ended with ({found[7:19]}…, recorded "
            f"{recorded[7:19]}…): this machine's arithmetic differs, or the record belongs to another adapter"
        )


def exact_spec(
    model: nn.Module, section: AdapterSection, names: Mapping[str, str], counts: tuple[int, int]
) -> AdapterSpec:
    """What the manifest says of a packed-exact adapter; see `adapter_spec`.

    `counts` are the trained and all parameters.
    """
    layers = exact_layers(model)
    packed = {name: layer.packed for name, layer in layers.items()}
    packed |= {name: packed_of_module(layer) for name, layer in packed_modules(model)}
    codes = packed_fingerprint((names[f"{name}.weight"], found) for name, found in packed.items())
    targets = sorted({name.rpartition(".")[2] for name in layers})
    return AdapterSpec(
        type="exact",
        rank=section.rank,
        alpha=section.alpha,
        use_rslora=section.use_rslora,
        targets=tuple(targets),
        tensors={name: names[f"{name}.weight"] for name in layers},
        rank_pattern=dict(section.rank_pattern),
        alpha_pattern=dict(section.alpha_pattern),
        modules_to_save=tuple(sorted(section.modules_to_save)),
        trained_parameters=counts[0],
        total_parameters=counts[1],
        learned_scales=any(layer.lora_scale is not None for layer in layers.values()),
        codes=codes,
        folded=section.folded,
    )
