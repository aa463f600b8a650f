"""The check of a merge that is too large to be run: rows of every tensor, computed again in fp64.

It is weaker than a replay: it shows that the written values are what the formulas give, at their
places, not that the formulas are those of the training. Formulas and reading are on purpose not the
merge's own: nothing here goes through `merged_weight` or the blocks.
"""

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qlx.adapters import LoraDelta
from qlx.errors import CheckFailed
from qlx.merging.change import Change
from qlx.merging.coded import CodedWeights
from qlx.merging.plan import MergePlan
from qlx.merging.stream import load_tensor
from qlx.merging.values import codes_as_trained, stored_dtype
from qlx.quant import packed_rows, value_unit
from qlx.weights import WeightSet, read_rows

__all__ = ["ROWS", "check_sample"]

ROWS = 6
"""Rows of each tensor: the first, the last, and others drawn by the tensor's name."""

_ROUNDOFF = {"F32": 2.0**-24, "BF16": 2.0**-8, "F16": 2.0**-11}
_SMALLEST = {"F32": 0.0, "BF16": 0.0, "F16": 2.0**-25}  # half of the smallest step above zero
_EPS32 = 2.0**-23


def check_sample(plan: MergePlan, written: WeightSet) -> int:
    """Check rows of every tensor in `written`, the merged files: changed ones in fp64, others bit by bit.

    A changed value may be off by half a unit in its last place and by what fp32 sums lose.

    Returns:
        How many rows were checked.

    Raises:
        CheckFailed: a row is not what it should be; the message names it.
    """
    count = 0
    for name in written:
        change = plan.changes.get(name)
        if change is None and written[name].dtype != _dtype(plan, name):
            change = Change(name, written[name].dtype, written[name].shape)
        rows = _drawn(name, written[name].shape)
        bad = _differing(plan, written, name, change, rows)
        if bad is not None:
            raise CheckFailed(
                f"merge: row {bad} of {name!r} is not what the adapter and base give; merge again, and "
                "where that fails too look at the disk and the memory, or report it"
            )
        count += len(rows)
    return count


def _dtype(plan: MergePlan, name: str) -> str:
    weights = plan.weights
    coded = isinstance(weights, CodedWeights) and name in weights.coded
    return "" if coded else weights[name].dtype


def _drawn(name: str, shape: tuple[int, ...]) -> list[int]:
    total = shape[0] if shape else 1
    draw = random.Random(name)
    return (
        sorted({0, total - 1, *(draw.randrange(total) for _ in range(ROWS - 2))}) if total else []
    )


def _differing(
    plan: MergePlan, written: WeightSet, name: str, change: Change | None, rows: Sequence[int]
) -> int | None:
    if change is None:
        pairs: Iterator[tuple[int, Tensor]] = _rows_of(plan.weights, name, rows)
        unequal = (row for row, right in pairs if not _same_bytes(_row(written, name, row), right))
        return next(unequal, None)
    right, error = _oracle(plan, change, rows)
    got = torch.cat([_row(written, name, row) for row in rows]).double().reshape(right.shape)
    allowed = error + right.abs() * _ROUNDOFF[change.dtype] + _SMALLEST[change.dtype]
    wrong = ((got - right).abs() > allowed).flatten(1).any(dim=1)
    return rows[int(wrong.nonzero()[0])] if bool(wrong.any()) else None


def _row(weights: WeightSet, name: str, row: int) -> Tensor:
    return read_rows(weights, name, slice(row, row + 1))


def _rows_of(weights: WeightSet, name: str, rows: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    return ((row, _row(weights, name, row)) for row in rows)


def _same_bytes(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


def _oracle(plan: MergePlan, change: Change, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Some rows of the merged tensor in fp64, and what fp32 arithmetic may add to their error."""
    if (
        change.delta is not None
        and change.delta.magnitude is not None
        and change.delta.crosses_rows
    ):
        every = list(range(change.shape[0]))
        right, error = _updated(_base(plan, change, every), change, every)
        return right[list(rows)], error[list(rows)]
    return _updated(_base(plan, change, rows), change, rows)


def _base(plan: MergePlan, change: Change, rows: Sequence[int]) -> Tensor:
    """Rows of what the update is added to, as [rows, values], in fp64."""
    if change.value is not None:
        shape = change.shape or (1,)
        return change.value.reshape(shape)[list(rows)].double().reshape(len(rows), -1)
    name, weights, spec = change.source, plan.weights, plan.spec
    if change.as_trained and name in spec.tensors:
        packed = codes_as_trained(weights, spec, name)
        unit, total = value_unit(packed), change.shape[0]
        found = []
        for row in rows:
            start = row // unit * unit
            values = packed_rows(packed, slice(start, min(start + unit, total))).values()
            found.append(values[row - start].double().reshape(1, -1))
        return torch.cat(found)
    if isinstance(weights, CodedWeights) and name in weights.coded:
        return load_tensor(weights, name)[list(rows)].double().reshape(len(rows), -1)
    count = (weights[name].shape or (1,))[0]
    new = torch.zeros_like(_row(weights, name, 0))  # a new token's row, which the base has not
    stored = torch.cat([_row(weights, name, row) if row < count else new for row in rows])
    seen = stored.to(stored_dtype(spec)) if change.as_trained else stored
    return seen.double().reshape(len(rows), -1)


def _updated(base: Tensor, change: Change, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    value = base.clone()
    if change.rows is not None:
        where = {index: at for at, index in enumerate(change.rows.indices)}
        for at, row in enumerate(rows):
            if row in where:
                value[at] = change.rows.values[where[row]].double()
    size = value.abs()
    if change.delta is not None:
        value, size = _with_delta(value, change.delta, rows)
    elif change.addend is not None:
        addend = change.addend.double()[list(rows)].reshape(len(rows), -1)
        value, size = value + addend, size + addend.abs()
    terms = 8 if change.delta is None else change.delta.a.shape[0] + 8
    return value, size * _EPS32 * terms


def _with_delta(base: Tensor, delta: LoraDelta, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """W + scaling * B A of some rows, and the sum of the magnitudes of all its terms."""
    a, b = delta.a.double().flatten(1), delta.b.double().flatten(1)
    picked = list(rows)
    left, right = (a[:, picked].T, b.T) if delta.crosses_rows else (b[picked], a)
    value = base + delta.scaling * (left @ right)
    size = base.abs() + abs(delta.scaling) * (left.abs() @ right.abs())
    if delta.magnitude is None:
        return value, size
    axis = 0 if delta.crosses_rows else 1
    norm = value.square().sum(dim=axis, keepdim=True).sqrt()
    factor = (
        delta.magnitude.double().reshape(1, -1)
        if delta.crosses_rows
        else delta.magnitude.double()[picked][:, None]
    )
    factor = factor / norm
    return value * factor, size * factor.abs() * 4
