"""Merged values some rows at a time, and what rounding cost them.

A LoRA delta's rows depend on nothing but the same rows of B, and a codec's on little more, so a
merged tensor comes out in blocks that stay in the processor's cache; no tensor is ever whole in
memory. Where rows do depend on each other (a DoRA norm across them) the tensor is one block. The
size of a block is fixed: the bytes written do not depend on memory or on the number of cores.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from qlx.adapters import TokenRows, delta_rows, merged_weight, with_rows
from qlx.merging.change import Change
from qlx.merging.coded import CodedWeights
from qlx.merging.plan import MergePlan
from qlx.merging.values import Rounding, codes_as_trained, exact_codes, stored_dtype
from qlx.quant import PackedTensor, packed_rows, value_unit
from qlx.weights import WeightSet, read_rows, torch_dtype

__all__ = ["BLOCK", "Tally", "block_rows", "merged_blocks", "merged_value"]

BLOCK = 2**18
"""Values of one block: 1 MiB in fp32."""

Rows = Callable[[slice], Tensor]


@dataclass
class Tally:
    """What rounding did to one tensor, added up over its blocks.

    A block is summed in fp32, the blocks in float64. `whole` says that the tensor was trained
    whole, so that its delta is the difference from the base.
    """

    name: str
    whole: bool = False
    energy: float = 0.0
    kept: float = 0.0
    changed: bool = False
    differs: bool = False

    def add(self, before: Tensor, after: Tensor, written: Tensor) -> None:
        """Count one block: its fp32 values before and after, and what is stored of the latter.

        The last two may be one tensor, as before and after may.
        """
        if self.whole and not self.differs:
            self.differs = not torch.equal(before, after)
        if not self.changed:
            self.changed = not torch.equal(written, before.to(written.dtype))
        delta = (after - before).reshape(-1)
        energy = float(torch.dot(delta, delta))
        self.energy += energy
        if written.dtype == torch.float32:
            self.kept += energy
        else:
            self.kept += float(torch.dot(written.float().sub_(before).reshape(-1), delta))

    def rounding(self) -> Rounding | None:
        """The sum; None for a tensor trained whole that is still the base's."""
        if self.whole and not self.differs:
            return None
        return Rounding(self.name, self.energy, self.kept, self.changed, self.whole)


def merged_blocks(
    plan: MergePlan,
    change: Change,
    tally: Tally | None = None,
    codes: Callable[[str, PackedTensor], None] | None = None,
    moved: Callable[[str, PackedTensor], None] | None = None,
) -> Iterator[Tensor]:
    """The tensor to write, in its final dtype, as consecutive blocks of rows.

    `tally` counts what rounding costs. `codes` is told the name and codes of a tensor that goes
    through the codec of training, `moved` those that an exact adapter makes of them.
    """
    if change.exact is not None:
        yield from _exact_blocks(plan, change, tally, codes, moved)
        return
    base, unit = _base_rows(plan, change, codes)
    compared = _compared_with(plan, change, base)
    for rows in _cuts(change, unit):
        before = base(rows)
        after = _updated(before, change, rows)
        written = after.to(torch_dtype(change.dtype))
        if tally is not None and compared is not None:
            tally.add(before if compared is base else compared(rows), after, written)
        yield written


def _exact_blocks(
    plan: MergePlan,
    change: Change,
    tally: Tally | None,
    codes: Callable[[str, PackedTensor], None] | None,
    moved: Callable[[str, PackedTensor], None] | None,
) -> Iterator[Tensor]:
    """The values of the codes that an exact adapter ends with."""
    base, unit = _base_rows(plan, change, codes)
    final = exact_codes(plan, change)
    if moved is not None:
        moved(change.name, final)
    for rows in _cuts(change, unit):
        after = packed_rows(final, rows).values()
        written = after.to(torch_dtype(change.dtype))
        if tally is not None:
            tally.add(base(rows), after, written)
        yield written


def merged_value(plan: MergePlan, change: Change) -> tuple[Tensor, Rounding | None]:
    """The whole tensor to write, and what rounding cost (None where nothing was trained)."""
    tally = tally_of(change)
    blocks = list(merged_blocks(plan, change, tally))
    whole = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    return whole.reshape(change.shape), None if tally is None else tally.rounding()


def tally_of(change: Change) -> Tally | None:
    """An empty tally for a tensor that the adapter changes, None for any other."""
    if not change.adapted:
        return None
    return Tally(change.name, whole=not _updates(change))


def _updates(change: Change) -> bool:
    parts = (change.rows, change.delta, change.addend, change.exact)
    return any(part is not None for part in parts)


def _shape(change: Change) -> tuple[int, ...]:
    return change.shape or (1,)


def block_rows(change: Change, unit: int) -> int:
    """Rows of one block: as many units as `BLOCK` values hold, at least one; or all there are."""
    shape = _shape(change)
    if _needs_all_rows(change):
        return max(1, shape[0])
    return max(unit, BLOCK // max(1, prod(shape[1:])) // unit * unit)


def _needs_all_rows(change: Change) -> bool:
    return change.delta is not None and delta_rows(change.delta, slice(0, 1)) is None


def _cuts(change: Change, unit: int) -> Iterator[slice]:
    total, step = _shape(change)[0], block_rows(change, unit)
    return (slice(at, min(at + step, total)) for at in range(0, total, step))


def _base_rows(
    plan: MergePlan, change: Change, codes: Callable[[str, PackedTensor], None] | None
) -> tuple[Rows, int]:
    """The fp32 rows that a delta is added to, and the number that must be asked for together.

    They are those of a value that was trained whole, as training saw the base's, or as stored.
    """
    if change.value is not None:
        value = change.value.reshape(_shape(change))
        return lambda rows: value[rows].float(), 1
    name, weights, spec = change.source, plan.weights, plan.spec
    if change.as_trained and name in spec.tensors:
        packed = codes_as_trained(weights, spec, name)
        if codes is not None:
            codes(name, packed)
        return lambda rows: packed_rows(packed, rows).values(), value_unit(packed)
    if isinstance(weights, CodedWeights) and name in weights.coded:
        stored = weights.packed(name)
        return lambda rows: packed_rows(stored, rows).values(), value_unit(stored)
    dtype = stored_dtype(spec) if change.as_trained else torch.float32
    return lambda rows: _known_rows(weights, name, rows).to(dtype).float(), 1


def _known_rows(weights: WeightSet, name: str, rows: slice) -> Tensor:
    """Rows of a tensor; those of new tokens, which lie behind its end, are zero until they are replaced."""
    count = (weights[name].shape or (1,))[0]
    known = read_rows(weights, name, slice(min(rows.start, count), min(rows.stop, count)))
    missing = rows.stop - rows.start - len(known)
    return torch.cat([known, known.new_zeros(missing, *known.shape[1:])]) if missing else known


def _compared_with(plan: MergePlan, change: Change, base: Rows) -> Rows | None:
    """The fp32 rows that a tensor's delta is measured from; None where nothing was trained."""
    if not change.adapted:
        return None
    if _updates(change):
        return base
    info = plan.weights.get(change.source)
    if info is None or info.shape != change.shape:  # a new head
        return lambda rows: torch.zeros_like(base(rows))
    return _base_rows(plan, replace(change, value=None, as_trained=False), None)[0]


def _updated(before: Tensor, change: Change, rows: slice) -> Tensor:
    after = before
    every = rows.stop - rows.start == _shape(change)[0]
    if change.rows is not None:
        after = with_rows(after, change.rows) if every else _with_rows(after, change.rows, rows)
    if change.delta is not None:
        delta = change.delta if every else delta_rows(change.delta, rows)
        assert delta is not None
        return merged_weight(after, delta)
    return after if change.addend is None else after + change.addend[rows]


def _with_rows(block: Tensor, trained: TokenRows, rows: slice) -> Tensor:
    inside = [at for at, index in enumerate(trained.indices) if rows.start <= index < rows.stop]
    if not inside:
        return block
    indices = tuple(trained.indices[at] - rows.start for at in inside)
    return with_rows(block, replace(trained, indices=indices, values=trained.values[inside]))
