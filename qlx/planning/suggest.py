"""What fits: totals over model sizes and ranks, and the nearest setup that stays within a budget."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qlx.planning.memory import Plan, check_rank, plan_shape
from qlx.planning.public import shape_from_count
from qlx.planning.setup import Setup, weight_format
from qlx.planning.shapes import Shape

DEFAULT_SIZES = tuple(int(n * 1e9) for n in (0.6, 1.2, 3.2, 7, 8, 13, 32, 70))
DEFAULT_RANKS = (8, 16, 32, 64)


@dataclass(frozen=True)
class SizeTable:
    """One row per model size, one plan per rank in it."""

    ranks: tuple[int, ...]
    rows: tuple[tuple[Plan, ...], ...]


def size_table(
    sizes: Sequence[int] = DEFAULT_SIZES,
    ranks: Sequence[int] = DEFAULT_RANKS,
    setup: Setup | None = None,
) -> SizeTable:
    """Plans of every size (in parameters) at every rank, all else as in `setup`.

    Raises:
        UsageError: a rank that no matrix of one of the models has.
    """
    start = setup or Setup()
    shapes = [shape_from_count(size) for size in sizes]
    for shape in shapes:
        check_rank(shape, max(ranks))
    rows = (tuple(plan_shape(s, replace(start, rank=r)) for r in ranks) for s in shapes)
    return SizeTable(tuple(ranks), tuple(rows))


def _halvings(start: int, lowest: int) -> list[int]:
    values = [start]
    while values[-1] // 2 >= lowest:
        values.append(values[-1] // 2)
    return values


def suggest(shape: Shape, setup: Setup, available: float) -> Plan | None:
    """The first setup that fits `available` bytes, giving up the least costly thing first.

    In this order: speed (checkpointing on), batch (halved down to 1), weight format (NF4 with double
    quantization, in groups as they are if it is NF4 already), rank (down to 4), sequence length (down to 128).
    None when nothing fits.
    """
    group = setup.weights.group_size if setup.weights.name == "nf4" else 64
    nf4 = weight_format("nf4", group_size=group, double_quant=True)
    formats = [setup.weights, nf4] if setup.rank and setup.weights != nf4 else [setup.weights]
    lengths = [0] if shape.tokens else _halvings(setup.tokens, 128)
    ranks = _halvings(setup.rank, 4) if setup.rank else [0]
    checkpointing = [setup.checkpointing, True]
    choices = itertools.product(
        lengths, ranks, formats, _halvings(setup.batch, 1), dict.fromkeys(checkpointing)
    )
    for tokens, rank, weights, batch, recompute in choices:
        plan = plan_shape(
            shape,
            replace(
                setup,
                tokens=tokens or setup.tokens,
                rank=rank,
                weights=weights,
                batch=batch,
                checkpointing=recompute,
            ),
        )
        if plan.fits(available):
            return plan
    return None
