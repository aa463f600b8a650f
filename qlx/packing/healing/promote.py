"""More bits for the layers that lose most, as far as a budget of bytes allows.

A layer's need is how much of the adapter's effect on its outputs is lost (`output_retention`). Layers
that get the same inputs go together: vLLM computes them as one, which has one scheme.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from qlx.checkpoint import QuantSpec
from qlx.errors import UsageError
from qlx.packing.healing.compensate import compensated, output_retention
from qlx.packing.healing.passes import Seen
from qlx.quant import PackedTensor, quantize_tensor

__all__ = ["LADDER", "Need", "need_of", "promote", "require_budget"]

LADDER: Mapping[str, tuple[str, ...]] = {
    "ternary": ("ternary", "int4", "int8"),
    "int4": ("int4", "int8"),
}
"""What a layer can be promoted to, by where it begins; they differ in the bits of a code only."""


@dataclass(frozen=True)
class Need:
    """What one layer keeps of the adapter's effect, and its bytes and weights, at every rung of the ladder."""

    name: str
    group: tuple[str, ...]
    retention: tuple[float, ...]
    nbytes: tuple[int, ...]
    count: int


def require_budget(shapes: Iterable[tuple[int, ...]], spec: QuantSpec, budget: float) -> None:
    """Refuse a budget that is too small for weights of these shapes [out, in] without any promotion.

    Raises:
        UsageError: there is no layout in which some layers could have more bits, or the budget is too small.
    """
    if spec.scheme not in LADDER or spec.backend != "compressed-tensors":
        raise UsageError(
            f"--max-bytes-per-weight: {spec.scheme} has no layout in which layers differ in bits; "
            f"{' and '.join(LADDER)} in groups have"
        )
    needed = count = 0
    for rows, width in shapes:
        needed += rows * quantize_tensor(torch.zeros(1, width), spec).nbytes
        count += rows * width
    if needed > budget * count:
        raise UsageError(
            f"--max-bytes-per-weight {budget:g}: {spec.scheme} in these groups takes {needed / count:.4g} "
            "already; allow more, or take larger groups"
        )


def need_of(seen: Seen, spec: QuantSpec) -> Need:
    """A layer rounded to every rung above that of `spec`, too; without a known adapter it needs nothing."""
    rungs = LADDER[str(spec.scheme)]
    packed: list[PackedTensor] = [seen.placed.packed]
    for scheme in rungs[1:]:
        finer = spec.model_copy(update={"scheme": scheme})
        packed.append(compensated(seen.weight, seen.hessian, finer).packed)
    shares = [1.0] * len(packed)
    if seen.before is not None:
        found = [output_retention(seen.before, seen.weight, p, seen.hessian) for p in packed]
        shares = [1.0 if share is None else share for share in found]
    sizes = tuple(item.nbytes for item in packed)
    return Need(seen.name, seen.group, tuple(shares), sizes, packed[0].count)


def promote(
    needs: Sequence[Need],
    spec: QuantSpec,
    gate: float,
    budget: float,
    tell: Callable[[str], None],
) -> dict[str, str]:
    """The scheme of every promoted layer, by name.

    The group that keeps least climbs one rung at a time, until all keep `gate` or the next step of each
    would take more than `budget` bytes a packed weight on average.
    """
    rungs = LADDER[str(spec.scheme)]
    groups: dict[tuple[str, ...], list[Need]] = {}
    for need in needs:
        groups.setdefault(need.group, []).append(need)
    total = sum(need.nbytes[0] for need in needs)
    weights = sum(need.count for need in needs)
    level = dict.fromkeys(groups, 0)
    open_ = set(groups)
    while open_:
        worst = min(open_, key=lambda group: (_kept(groups[group], level[group]), group))
        at = level[worst]
        more = (
            sum(need.nbytes[at + 1] - need.nbytes[at] for need in groups[worst])
            if at + 1 < len(rungs)
            else None
        )
        if _kept(groups[worst], at) >= gate or more is None or total + more > budget * weights:
            open_.remove(worst)
            continue
        level[worst], total = at + 1, total + more
    chosen = {group: rungs[at] for group, at in level.items() if at}
    for group, scheme in chosen.items():
        before, after = _kept(groups[group], 0), _kept(groups[group], level[group])
        tell(
            f"{', '.join(group)}: {scheme}, {before:.1%} → {after:.1%} of the effect on its outputs"
        )
    tell(f"{total / weights:.4g} bytes a packed weight, {budget:g} allowed")
    return {name: scheme for group, scheme in chosen.items() for name in group}


def _kept(needs: Sequence[Need], level: int) -> float:
    return min(need.retention[level] for need in needs)
