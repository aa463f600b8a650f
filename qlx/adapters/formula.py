"""What an adapter does to a weight, written once: training's forward, merging and packing agree by it.

LoRA (arXiv 2106.09685), rsLoRA's scaling (arXiv 2312.03732), DoRA's magnitudes (arXiv
2402.09353) and VeRA's vectors (arXiv 2310.11454). Everything is computed in float32; the caller
rounds once to the target dtype.
"""

from dataclasses import dataclass, replace
from math import sqrt
from typing import Literal

import torch
from torch import Tensor

from qlx.errors import InputRefused, Mismatch

__all__ = [
    "Kind",
    "LoraDelta",
    "TokenRows",
    "delta_bias",
    "delta_energy",
    "delta_of_expert",
    "delta_rows",
    "delta_shape",
    "delta_weight",
    "dora_factor",
    "fitted",
    "merged_weight",
    "scaling_of",
    "unoriented",
    "vera_delta",
    "widened",
    "with_rows",
]

Kind = Literal["linear", "embedding", "conv2d", "parameter", "experts"]


@dataclass(frozen=True)
class LoraDelta:
    """The low-rank update of one module's weight.

    linear: `a` [r, in], `b` [out, r], magnitude [out].
    embedding: `a` [r, vocabulary], `b` [dim, r], magnitude [dim]; the weight is [vocabulary, dim].
    conv2d: `a` [r, in, kh, kw], `b` [out, r, 1, 1], magnitude [out]; the weight is [out, in, kh, kw].
    parameter: a bare parameter [rows, columns] with `a` [r, columns], `b` [rows, r], never transposed.
    experts: the weights of n experts as one parameter [n, out, in], with `a` [n r, in] (expert by
    expert) and `b` [out, r n] (the expert counts fastest); see `delta_of_expert`.
    `fan_in_fan_out` says that a linear weight is stored as [in, out] (transformers' `Conv1D`).
    `bias` [out] is the bias of B, added to the module's own after scaling.
    `shared` says that `a` is as wide as the widest layer that shares it (VeRA); `fitted` cuts it.
    """

    module: str
    a: Tensor
    b: Tensor
    scaling: float
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    kind: Kind = "linear"
    fan_in_fan_out: bool = False
    experts: int = 1
    shared: bool = False

    @property
    def rank(self) -> int:
        """r, the rows of A (of each expert's, where there are experts)."""
        return self.a.shape[0] // self.experts

    @property
    def empty(self) -> bool:
        """Whether the update is exactly nothing: no factor, magnitude or bias was ever trained."""
        whole = self.magnitude is None and self.bias is None
        return whole and not (bool(self.a.any()) and bool(self.b.any()))

    @property
    def crosses_rows(self) -> bool:
        """Whether the rows of the stored weight are inputs, so that an output runs across them."""
        return self.kind == "embedding" or self.fan_in_fan_out

    @property
    def _out_axis(self) -> int:
        """The axis of the stored weight that counts outputs, along which DoRA has magnitudes."""
        return 1 if self.crosses_rows else 0


@dataclass(frozen=True)
class TokenRows:
    """New rows of one embedding: `values` [n, dim] replace the rows `indices` (n different ones)."""

    module: str
    indices: tuple[int, ...]
    values: Tensor


def scaling_of(alpha: float, rank: int, *, use_rslora: bool) -> float:
    """Give alpha / r, or alpha / sqrt(r) for rsLoRA."""
    return alpha / sqrt(rank) if use_rslora else alpha / rank


def vera_delta(
    module: str, a: Tensor, b: Tensor, inner: Tensor, outer: Tensor, *, fan_in_fan_out: bool = False
) -> LoraDelta:
    """VeRA's update diag(outer) B diag(inner) A as a low-rank one with scaling 1.

    The projections `a` [r, widest in] and `b` [widest out, r] are shared; the layer uses the first columns of
    the one, which only its weight can count, and the first rows of the other. `inner` [r], `outer` [out].
    """
    own_b = outer.float()[:, None] * b[: len(outer)].float()
    return LoraDelta(
        module=module,
        a=inner.float()[:, None] * a.float(),
        b=own_b,
        scaling=1.0,
        fan_in_fan_out=fan_in_fan_out,
        shared=True,
    )


def fitted(delta: LoraDelta, inputs: int) -> LoraDelta:
    """The update with its own columns of a shared A, for a weight with so many inputs.

    Raises:
        Mismatch: A has fewer.
    """
    if not delta.shared:
        return delta
    if delta.a.shape[1] < inputs:
        raise Mismatch(
            f"module {delta.module!r}: the weight has {inputs} inputs, the shared projection {delta.a.shape[1]}"
        )
    return replace(delta, a=delta.a[:, :inputs], shared=False)


def delta_shape(delta: LoraDelta) -> tuple[int, ...]:
    """The shape of the weight that the delta belongs to, as stored."""
    if delta.kind == "conv2d":
        return (delta.b.shape[0], *delta.a.shape[1:])
    if delta.kind == "experts":
        return (delta.experts, delta.b.shape[0], delta.a.shape[1])
    shape = (delta.b.shape[0], delta.a.shape[1])
    return shape[::-1] if delta._out_axis else shape


def delta_weight(delta: LoraDelta) -> Tensor:
    """The product scaling * B @ A in float32, in the shape and orientation of the stored weight."""
    if delta.kind == "experts":
        return torch.stack([delta_weight(delta_of_expert(delta, e)) for e in range(delta.experts)])
    product = unoriented(delta)
    if delta._out_axis:
        product = product.T
    return product.reshape(delta_shape(delta))


def unoriented(delta: LoraDelta) -> Tensor:
    """The product scaling * B @ A in float32 as [out, everything else], however the weight is stored."""
    product: Tensor = (delta.b.float().flatten(1) @ delta.a.float().flatten(1)).mul_(delta.scaling)
    return product


def delta_energy(delta: LoraDelta) -> float:
    """‖scaling · B A‖² (Frobenius) in float64, from the two r x r Gram matrices; magnitudes left out."""
    if delta.kind == "experts":
        return sum(delta_energy(delta_of_expert(delta, e)) for e in range(delta.experts))
    a, b = delta.a.double().flatten(1), delta.b.double().flatten(1)
    return delta.scaling**2 * float(((b.T @ b) * (a @ a.T)).sum())


def delta_of_expert(delta: LoraDelta, expert: int, rows: slice | None = None) -> LoraDelta:
    """The update of one expert's own weight [out, in], or of some of its rows, as a linear one.

    PEFT (`lora.ParamWrapper`) stores A as [n, r, in] and B as [out, r, n], flattened.
    """
    rank, count = delta.rank, delta.experts
    a = delta.a[expert * rank : (expert + 1) * rank]
    b = delta.b.reshape(delta.b.shape[0], rank, count)[:, :, expert]
    b = b if rows is None else b[rows]
    return replace(delta, a=a, b=b.contiguous(), kind="linear", experts=1)


def delta_rows(delta: LoraDelta, rows: slice) -> LoraDelta | None:
    """The update of some rows of the stored weight alone; None where rows depend on each other.

    They do where DoRA takes a norm across them (embeddings, transposed weights), and in the fused
    parameter of several experts.
    """
    if delta.kind == "experts" or (delta.crosses_rows and delta.magnitude is not None):
        return None
    if delta.crosses_rows:
        return replace(delta, a=delta.a[:, rows], bias=None)
    magnitude = None if delta.magnitude is None else delta.magnitude[rows]
    return replace(delta, b=delta.b[rows], magnitude=magnitude, bias=None)


def widened(shape: tuple[int, ...], rows: TokenRows) -> tuple[int, ...]:
    """The shape of an embedding [vocabulary, dim] that has room for all of `rows`.

    Raises:
        Mismatch: a row in between would have no values.
    """
    count = max(shape[0], *(index + 1 for index in rows.indices))
    gap = set(range(shape[0], count)) - set(rows.indices)
    if gap:
        raise Mismatch(
            f"module {rows.module!r}: the embedding is {list(shape)}, the adapter replaces row {count - 1} and has "
            f"none for row {min(gap)}"
        )
    return (count, *shape[1:])


def with_rows(base: Tensor, rows: TokenRows) -> Tensor:
    """A copy of an embedding [vocabulary, dim] in float32 with some rows replaced.

    Raises:
        Mismatch: a row is not in the embedding, or has another width.
    """
    if max(rows.indices) >= base.shape[0] or rows.values.shape[1] != base.shape[1]:
        raise Mismatch(
            f"module {rows.module!r}: the embedding is {list(base.shape)}, the adapter replaces row "
            f"{max(rows.indices)} of width {rows.values.shape[1]}"
        )
    changed = base.to(torch.float32, copy=True)
    changed[list(rows.indices)] = rows.values.float()
    return changed


def merged_weight(base: Tensor, delta: LoraDelta) -> Tensor:
    """The weight that has the adapter folded in, float32, of the shape of `base`.

    W' = W + delta; with DoRA, W' = m * (W + delta) / ||W + delta||, the norm of each output's
    values (PEFT's convention), written down nowhere else.

    Raises:
        Mismatch: the delta is for a weight of another shape.
        InputRefused: DoRA meets an output whose values are all zero.
    """
    _require_fit(base, delta)
    updated = delta_weight(delta).add_(base.float())
    return updated if delta.magnitude is None else updated * _dora_factor(updated, delta)


def dora_factor(base: Tensor, delta: LoraDelta) -> Tensor | None:
    """By what DoRA multiplies each output [out], float32: m / ||W + delta||; None without magnitudes.

    Raises:
        Mismatch, InputRefused: as `merged_weight`.
    """
    _require_fit(base, delta)
    if delta.magnitude is None:
        return None
    return _dora_factor(delta_weight(delta).add_(base.float()), delta).reshape(-1)


def _dora_factor(updated: Tensor, delta: LoraDelta) -> Tensor:
    """M / ||W + delta||, shaped to multiply the weight `updated` = W + delta."""
    assert delta.magnitude is not None
    axis = delta._out_axis
    others = tuple(dim for dim in range(updated.dim()) if dim != axis)
    norm: Tensor = torch.linalg.vector_norm(updated, dim=others, keepdim=True)
    if not bool((norm > 0).all()):
        raise InputRefused(
            f"module {delta.module!r}: DoRA cannot rescale an output that is all zero"
        )
    return delta.magnitude.float().reshape(norm.shape) / norm


def _require_fit(base: Tensor, delta: LoraDelta) -> None:
    if tuple(base.shape) != delta_shape(delta):
        raise Mismatch(
            f"module {delta.module!r}: the base weight is {list(base.shape)}, "
            f"the adapter is for {list(delta_shape(delta))}"
        )


def delta_bias(delta: LoraDelta) -> Tensor | None:
    """What the adapter adds to the module's bias [out], float32; None without `lora_bias`."""
    return None if delta.bias is None else delta.bias.float() * delta.scaling
