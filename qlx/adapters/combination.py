"""Several adapters into one: the formulas, module by module.

They are those of PEFT's `add_weighted_adapter`, which for all methods but `cat` and `svd` works on
the factors A and B apart: with weight w and scaling s of each adapter, A counts sign(w) √|w s| and
B √|w s|. That makes cross terms between the adapters; `cat` has none and is the exact sum.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import sqrt
from typing import Literal, get_args

import torch
from torch import Tensor

from qlx.adapters.formula import LoraDelta, delta_energy, unoriented
from qlx.errors import Mismatch, UsageError

__all__ = ["METHODS", "PRUNING", "RANDOM", "Method", "combined_delta"]

Method = Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
METHODS: tuple[Method, ...] = get_args(Method)
"""All ways to combine adapters."""
PRUNING: tuple[Method, ...] = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Those that drop part of each adapter and so need a density."""
RANDOM: tuple[Method, ...] = ("dare_linear", "dare_ties")
"""Those that choose what they drop at random and so take a seed."""

_CANCELLED = 1e-12  # of the parts' energy: what rounding leaves of updates that cancel out


def combined_delta(
    deltas: Sequence[LoraDelta],
    weights: Sequence[float],
    method: Method,
    *,
    density: float = 1.0,
    rank: int | None = None,
    generator: torch.Generator | None = None,
) -> LoraDelta:
    """One update, of scaling 1, in place of several of the same module.

    Where nothing but rounding is left of them, because they cancel out, it is exactly zero.

    Args:
        deltas: the updates, all of one kind and shape, without magnitudes and biases.
        weights: the factor of each; negative ones subtract.
        method: `linear` adds factors; `cat` stacks them, so that the updates add up; `svd` cuts
            that sum to `rank`; `ties` (Yadav et al. 2023, arXiv:2306.01708) keeps the largest
            values and, where signs disagree, those of the heavier sign; `dare_linear` and
            `dare_ties` (Yu et al. 2023, arXiv:2311.03099) drop values at random and scale up the
            rest; `magnitude_prune` keeps the largest.
        density: the share of values kept, 0 to 1.
        rank: of the result of `svd`; the largest of the updates' if None.
        generator: where the random choices of DARE come from.

    Raises:
        Mismatch: factors that must be added have different shapes.
        UsageError: an unknown method.
    """
    if method not in METHODS:
        raise UsageError(f"--combine {method!r} is not one of {', '.join(METHODS)}")
    scaled = [weight * delta.scaling for weight, delta in zip(weights, deltas, strict=True)]
    if method == "cat":
        a = torch.cat([d.a.float() * s for d, s in zip(deltas, scaled, strict=True)], dim=0)
        b = torch.cat([d.b.float() for d in deltas], dim=1)
    elif method == "svd":
        a, b = _svd(deltas, weights, rank or max(delta.rank for delta in deltas))
    else:
        mixed = _METHODS[method]
        signed = [sqrt(abs(s)) * (1 if s >= 0 else -1) for s in scaled]
        a = mixed(_stack([d.a for d in deltas], deltas), signed, density, generator)
        b = mixed(
            _stack([d.b for d in deltas], deltas), [abs(s) for s in signed], density, generator
        )
    made = replace(deltas[0], a=a.contiguous(), b=b.contiguous(), scaling=1.0)
    parts = sum(w * w * delta_energy(delta) for w, delta in zip(weights, deltas, strict=True))
    return replace(made, b=made.b * 0) if delta_energy(made) <= _CANCELLED * parts else made


def _stack(factors: list[Tensor], deltas: Sequence[LoraDelta]) -> Tensor:
    if len({factor.shape for factor in factors}) > 1:
        ranks = ", ".join(str(delta.rank) for delta in deltas)
        raise Mismatch(
            f"module {deltas[0].module!r}: adapters of ranks {ranks} cannot be added factor by factor; "
            "use --combine cat or svd"
        )
    return torch.stack([factor.float() for factor in factors])


def _svd(deltas: Sequence[LoraDelta], weights: Sequence[float], rank: int) -> tuple[Tensor, Tensor]:
    """The best factors of `rank` of the weighted sum; the singular values go into B."""
    total = torch.stack([w * unoriented(d) for w, d in zip(weights, deltas, strict=True)]).sum(0)
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    a, b = vh[:rank], u[:, :rank] * s[:rank]
    if deltas[0].kind != "conv2d":
        return a, b
    return a.reshape(-1, *deltas[0].a.shape[1:]), b.reshape(*b.shape, 1, 1)


def _weighted(parts: Tensor, weights: Sequence[float]) -> Tensor:
    factors = torch.tensor(weights, dtype=torch.float32)
    return parts * factors.reshape(-1, *[1] * (parts.dim() - 1))


def _linear(
    parts: Tensor, weights: Sequence[float], density: float, generator: torch.Generator | None
) -> Tensor:
    return _weighted(parts, weights).sum(0)


def _largest(parts: Tensor, density: float) -> Tensor:
    """Each part with only its share `density` of largest magnitudes left, the rest zero."""
    if density >= 1:
        return parts
    flat = parts.reshape(len(parts), -1)
    kept = flat.abs().topk(int(density * flat.shape[1]), dim=1).indices
    return (flat * torch.zeros_like(flat).scatter_(1, kept, 1.0)).reshape(parts.shape)


def _random(parts: Tensor, density: float, generator: torch.Generator | None) -> Tensor:
    """Each part with a random share `density` of its values left, scaled up by its inverse."""
    if density >= 1:
        return parts
    chances = torch.full_like(parts[0], density)
    return (
        torch.stack([part * torch.bernoulli(chances, generator=generator) for part in parts])
        / density
    )


def _elected(parts: Tensor, weights: Sequence[float]) -> Tensor:
    """TIES' disjoint mean: at each place, the parts whose sign is that of the sum of all."""
    majority = torch.where(parts.sum(0) >= 0, 1, -1)
    agree = parts.sign() == majority
    return (_weighted(parts, weights) * agree).sum(0) / agree.sum(0).clamp(min=1.0)


def _ties(
    parts: Tensor, weights: Sequence[float], density: float, generator: torch.Generator | None
) -> Tensor:
    return _elected(_largest(parts, density), weights)


def _dare_linear(
    parts: Tensor, weights: Sequence[float], density: float, generator: torch.Generator | None
) -> Tensor:
    return _weighted(_random(parts, density, generator), weights).sum(0)


def _dare_ties(
    parts: Tensor, weights: Sequence[float], density: float, generator: torch.Generator | None
) -> Tensor:
    return _elected(_random(parts, density, generator), weights)


def _magnitude_prune(
    parts: Tensor, weights: Sequence[float], density: float, generator: torch.Generator | None
) -> Tensor:
    return _weighted(_largest(parts, density), weights).sum(0)


_METHODS: dict[str, Callable[[Tensor, Sequence[float], float, torch.Generator | None], Tensor]] = {
    "linear": _linear,
    "ties": _ties,
    "dare_linear": _dare_linear,
    "dare_ties": _dare_ties,
    "magnitude_prune": _magnitude_prune,
}
