"""Rounding a weight so that its outputs stay, not its values: GPTQ on any grid.

Columns are rounded one after the other, and what each one's rounding does to the layer's outputs is
taken back by those that are still to come (GPTQ, arXiv 2210.17323, algorithm 1, with the Cholesky
factor of the inverse Hessian X^T X of the layer's inputs). Integer scales are searched when a group
begins, on the weights as they are by then, for the least squared error weighted by the Hessian's
diagonal; NF4 and FP4 keep those of the codec.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qlx.checkpoint import QuantSpec
from qlx.errors import InputRefused
from qlx.packing.healing.grids import (
    Grid,
    grid_of,
    levels_of,
    row_parts,
    scales_of,
    unfilled,
    with_parts,
)
from qlx.packing.healing.paged import release
from qlx.quant import (
    FOUR_BIT,
    SCALE_DTYPE,
    PackedTensor,
    dequantize_tensor,
    packed_rows,
    quantize_tensor,
    torch_dtype_of,
)

__all__ = ["FRACTION", "Placed", "compensated", "output_retention"]

FRACTION = 254
"""Steps that `Placed.fractions` divides the way from one level to the next into."""

_DAMPING = 0.01  # of the Hessian's mean diagonal, as in the paper
_RUN = 128  # columns between two updates of the rest, where a scale serves a whole row
_FACTORS = (0.25, 1.05, 25)  # scales that are tried, as shares of the one that clips nothing
_AT_ONCE = 2**18  # values whose scales are searched together, for the sake of memory
_BLOCK = 256  # of a triangle that is inverted in place


@dataclass(frozen=True)
class Placed:
    """A weight on its grid, and where between the levels each value would lie.

    `fractions` int8 [out, in]: (position - level) * FRACTION, the position clipped to what rounds to
    that level.
    """

    packed: PackedTensor
    fractions: Tensor

    def positions(self) -> Tensor:
        """Positions float32 [out, in]; rounding them gives the levels of `packed`."""
        return levels_of(self.packed) + self.fractions.float() / FRACTION


def compensated(weight: Tensor, hessian: Tensor, spec: QuantSpec) -> Placed:
    """Round `weight` [out, in] to the grid of `spec`, given X^T X [in, in] of its inputs, both float32.

    Raises:
        InputRefused: the inputs or the weight are not finite, or scales too large for their dtype.
    """
    if not all(bool(torch.isfinite(end)) for item in (hessian, weight) for end in item.aminmax()):
        raise InputRefused("the calibration data make inputs or weights that are not finite")
    grid, importance = grid_of(str(spec.scheme)), hessian.diagonal().clone()
    scales = _first_scales(weight, importance, spec, grid)  # before the factor needs its room
    factor, left = _inverse_factor(hessian), weight.clone()
    release([hessian, weight])
    fractions = torch.empty_like(left, dtype=torch.int8)
    rows, columns = weight.shape
    runs = scales.shape[1] if scales.shape[1] > 1 else -(-columns // _RUN)
    width = columns // scales.shape[1] if scales.shape[1] > 1 else _RUN
    for at in range(runs):
        run = slice(at * width, min((at + 1) * width, columns))
        group = at if scales.shape[1] > 1 else 0
        if at and scales.shape[1] > 1 and spec.scheme not in FOUR_BIT:
            scales[:, group] = _searched(left[:, run], importance[run], grid, spec)
        scale = scales[:, group].float().expand(rows)
        errors, apart = _run(left, run, scale, factor, grid)
        left[:, run.stop :].addmm_(errors, factor[run, run.stop :], alpha=-1)
        fractions[:, run] = apart.clamp_(-0.5, 0.5).mul_(FRACTION).round_()
    del factor
    packed = unfilled(weight, spec, None if spec.scheme in FOUR_BIT else scales)
    release([weight])
    return Placed(with_parts(packed, left), fractions)


def _run(
    left: Tensor, run: slice, scale: Tensor, factor: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """Round the columns of one run, whose levels take their places in `left`.

    Returns:
        Their weighted errors, for the rest, and how far each value lay from its level; [out, columns].
    """
    inverse = _inverse(scale)
    errors, apart = torch.empty_like(left[:, run]), torch.empty_like(left[:, run])
    for at, column in enumerate(range(run.start, run.stop)):
        position = left[:, column] * inverse
        level = grid.rounded(position)
        error = (left[:, column] - level * scale) / factor[column, column]
        left[:, column : run.stop] -= error[:, None] * factor[column, column : run.stop]
        errors[:, at], apart[:, at], left[:, column] = error, position - level, level
    return errors, apart


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper triangular U with U^T U the inverse of the damped Hessian.

    With rows and columns in reverse order H is L L^T, and U the inverse of L with both in order again.
    Inputs that are always zero, or fewer rows than inputs, make it singular; damping is raised until
    it can be factored.
    """
    mean = hessian.diagonal().mean()
    damping = _DAMPING * (mean if mean > 0 else torch.ones(()))
    for _ in range(6):
        turned = hessian.flip(0, 1)
        turned.diagonal().add_(damping)
        release([hessian])
        lower, failed = torch.linalg.cholesky_ex(turned)
        del turned
        if not failed:
            return _inverted(lower).flip(0, 1)
        damping = damping * 10
    raise InputRefused("the calibration data make inputs whose products cannot be factored")


def _inverted(lower: Tensor) -> Tensor:
    """The inverse of a lower triangle [n, n], in its place, block by block from its lower right corner."""
    for start in range((len(lower) - 1) // _BLOCK * _BLOCK, -1, -_BLOCK):
        here = slice(start, min(start + _BLOCK, len(lower)))
        corner = lower[here, here]
        inverse = torch.linalg.solve_triangular(corner, torch.eye(len(corner)), upper=False)
        below = lower[here.stop :, here]
        below.copy_(-(lower[here.stop :, here.stop :] @ (below @ inverse)))
        corner.copy_(inverse)
    return lower


def _first_scales(weight: Tensor, importance: Tensor, spec: QuantSpec, grid: Grid) -> Tensor:
    """Scales [out or 1, n]: those of the codec, or searched ones for the first group, row or tensor."""
    if spec.scheme in FOUR_BIT:
        return scales_of(quantize_tensor(weight, spec)).clone()
    rows, columns = weight.shape
    if spec.group_size is None and spec.scheme == "ternary":
        every = importance.repeat(rows)
        return _searched(weight.reshape(1, -1), every, grid, spec).reshape(1, 1)
    width = spec.group_size or columns
    parts = weight[:, :width].split(max(1, _AT_ONCE // width))
    first = torch.cat([_searched(part, importance[:width], grid, spec) for part in parts])
    return first[:, None].repeat(1, columns // width)


def _searched(weight: Tensor, importance: Tensor, grid: Grid, spec: QuantSpec) -> Tensor:
    """A scale for each row of `weight` [out, k]: the best of several starts, each fitted to its levels.

    Fitting is ⟨w, q⟩ / ⟨q, q⟩ (Ternary Weight Networks, arXiv 1605.04711, equation 4) with each input
    weighted by `importance` [k].
    """
    dtype = torch_dtype_of(str(spec.extras.get(SCALE_DTYPE, "float32")))
    top = weight.abs().amax(dim=1) / grid.largest
    best, least = top.clone(), torch.full_like(top, torch.inf)
    for share in torch.linspace(*_FACTORS).tolist():
        scale = top * share
        level = grid.rounded(weight * _inverse(scale)[:, None])
        power = (level * level * importance).sum(dim=1)
        fitted = (weight * level * importance).sum(dim=1) / power.clamp(min=1e-30)
        scale = torch.where(power > 0, fitted, scale).to(dtype).float()
        level = grid.rounded(weight * _inverse(scale)[:, None])
        error = ((weight - level * scale[:, None]).square() * importance).sum(dim=1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    if not bool(torch.isfinite(best).all()):
        raise InputRefused(f"a scale of the weight is too large for {dtype}")
    return best.to(dtype)


def _inverse(scales: Tensor) -> Tensor:
    """1 / scale, and 0 where the scale is 0: a group of zeros has level 0."""
    return (1.0 / scales).nan_to_num(posinf=0.0)


def output_retention(
    before: Tensor, weight: Tensor, packed: PackedTensor, hessian: Tensor
) -> float | None:
    """How much of an adapter's effect on a layer's outputs is left: 1 - ‖(Ŵ - W)X‖² / ‖(W - W0)X‖².

    What the gate measures on the model's outputs, here on one layer's: 1 when packing adds no error,
    0 when it adds as much as the adapter had changed, below when more. None where nothing was changed.
    """
    effect = lost = 0.0
    for rows in row_parts(packed):
        values = dequantize_tensor(packed_rows(packed, rows), torch.float32)
        effect += _energy(weight[rows] - before[rows], hessian)
        lost += _energy(values.sub_(weight[rows]), hessian)
    return 1.0 - lost / effect if effect > 0 else None


def _energy(rows: Tensor, hessian: Tensor) -> float:
    """What some rows of a weight make of the inputs, squared and summed."""
    return float(((rows @ hessian) * rows).sum())
