"""What a setup trains of a shape: factors of the adapter, modules trained whole, rows of new tokens, biases."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from qlx.planning.families import FAMILIES, MLP
from qlx.planning.setup import Setup
from qlx.planning.shapes import Part, Shape


@dataclass(frozen=True)
class Trained:
    """Parameters of a training.

    Attributes:
        added: of the adapter and of new tokens' rows; fp32, beside the base.
        whole: of modules that are trained whole: of copies, or with rank 0 of the model itself.
        table: those of `whole` that are a token embedding's.
        biases: of biases that are trained in their place.
        frozen: fp32 values of the adapter that are not trained.
        notes: what is trained and not counted.
    """

    added: int = 0
    whole: int = 0
    table: int = 0
    biases: int = 0
    frozen: int = 0
    notes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """All that is trained."""
        return self.added + self.whole + self.biases


def trained_parameters(shape: Shape, setup: Setup) -> Trained:
    """What `setup` trains of `shape`."""
    if setup.rank == 0:
        return Trained(whole=shape.parameters, table=shape.table_parameters)
    saved = {part for part in shape.parts if _named(part, setup.saved)}
    adapted = [part for part in shape.adapted(setup.roles) if part not in saved]
    added, frozen = _adapter(adapted, setup)
    tables = 1 if shape.tied else 2
    return Trained(
        added=added + setup.new_tokens * tables * (shape.head_width or shape.hidden),
        whole=sum(part.weights + part.biases for part in saved),
        table=sum(part.weights for part in saved if part.name == FAMILIES[shape.family].embedding),
        biases=_biases(shape, adapted, setup.bias),
        frozen=frozen,
        notes=tuple(_notes(shape, adapted, setup)),
    )


def _named(part: Part, endings: tuple[str, ...]) -> bool:
    """Whether the part, or a module that holds it, has a name with one of these endings."""
    return any(f".{ending}." in f".{part.name}." for ending in endings)


def _adapter(adapted: list[Part], setup: Setup) -> tuple[int, int]:
    """Parameters of the adapter's factors that are trained, and fp32 ones that are frozen."""
    if setup.adapter == "vera":
        return _vera(adapted, setup.rank)
    outputs = sum(part.outputs for part in adapted) if setup.dora else 0
    if setup.adapter not in ("exact", "fold"):
        factors = sum(_rank(part, setup) * (part.inputs + part.outputs) for part in adapted)
        return factors + outputs, factors if setup.adapter == "pissa" else 0
    group = setup.weights.group_size or 1
    narrow = group if setup.adapter == "fold" else 1
    factors = sum(_rank(part, setup) * (part.inputs // narrow + part.outputs) for part in adapted)
    weights = sum(part.weights for part in adapted)
    # the fraction of each adapted weight takes a byte
    return factors + setup.learned_scales * weights // group, weights // 4


def _vera(adapted: list[Part], rank: int) -> tuple[int, int]:
    """Parameters of VeRA that are trained, Σ (r + d_out), and those that all layers share.

    Kopiczko et al. 2024, §3.2; the shared matrices are as large as the largest of them needs.
    """
    sides = [
        max((getattr(part, side) for part in adapted), default=0) for side in ("inputs", "outputs")
    ]
    return sum(rank + part.outputs for part in adapted), rank * sum(sides)


def _rank(part: Part, setup: Setup) -> int:
    """The adapter's rank on a linear map: Σ r (d_in + d_out) is what LoRA trains (Hu et al. 2021, §4.2)."""
    patterns: Mapping[str, int] = setup.rank_pattern
    return next((rank for key, rank in patterns.items() if _matches(key, part)), setup.rank)


def _matches(key: str, part: Part) -> bool:
    """PEFT's rule for the keys of `rank_pattern`: they match the whole name, or its end from a dot on."""
    return re.match(rf"(.*\.)?({key})$", part.name) is not None


def _biases(shape: Shape, adapted: list[Part], bias: str) -> int:
    if bias == "none":
        return 0
    return sum(part.biases for part in (shape.parts if bias == "all" else adapted))


def _notes(shape: Shape, adapted: list[Part], setup: Setup) -> list[str]:
    what = f"no module of that name is known in {shape.family}"
    unknown = [
        f"modules_to_save: {ending!r} is not counted, {what}"
        for ending in setup.saved
        if not any(_named(part, (ending,)) for part in shape.parts)
    ]
    unknown += [
        f"rank_pattern: {key!r} is not counted, no adapted module of that name is known in {shape.family}"
        for key in setup.rank_pattern
        if not any(_matches(key, part) for part in adapted)
    ]
    if shape.sparse_layers and setup.weights.quantized:
        unknown.append("experts are planned in the base's dtype, since qlx quantizes linear layers")
    if shape.sparse_layers and any(part.role in MLP for part in adapted):
        unknown.append("adapters that PEFT gives to experts are not counted")
    return unknown
