"""From logits to one token: penalty, temperature, top-k, top-p, in that order, as transformers applies them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlx.errors import UsageError

__all__ = ["Sampler", "SamplingOptions", "next_distribution"]

Array = NDArray[Any]

MAX_STOPS = 16


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose tokens.

    `temperature` 0 is greedy and ignores `top_k`, `top_p` and `seed`. `top_k` 0 and `top_p` 1 keep
    everything. `repetition_penalty` > 1 makes tokens seen before less likely. Generation ends at the
    model's end token, at one of the `stop` strings (not part of the text), after `max_tokens` tokens, or at
    the context's end. `seed` None draws a fresh one.

    Raises:
        UsageError: a value outside its range; the message names it.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        _within("max_tokens", self.max_tokens, 1, 2**31)
        _within("temperature", self.temperature, 0.0, 100.0)
        _within("top_k", self.top_k, 0, 2**31)
        _within("top_p", self.top_p, 1e-6, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _within("seed", self.seed or 0, 0, 2**64 - 1)
        if len(self.stop) > MAX_STOPS or not all(self.stop):
            raise UsageError(f"stop takes at most {MAX_STOPS} strings, none of them empty")


def _within(name: str, value: float, low: float, high: float) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise UsageError(f"{name} must lie between {low:g} and {high:g}, not {value:g}")


class Sampler:
    """Chooses one token after another; remembers what was seen, for the repetition penalty."""

    def __init__(self, options: SamplingOptions, seen: Iterable[int] = ()) -> None:
        self._options = options
        self._seen = set(seen)
        self._random = np.random.default_rng(options.seed)

    def choose(self, logits: Array) -> int:
        """The next token for logits [vocabulary]; it counts as seen from now on."""
        if self._options.temperature == 0:
            penalty = self._options.repetition_penalty
            scores = logits if penalty == 1 else _penalised(logits, self._seen, penalty)
            token = int(np.argmax(scores))
        else:
            weights = next_distribution(logits, self._options, self._seen)
            token = int(
                np.searchsorted(
                    np.cumsum(weights), self._random.random() * weights.sum(), side="right"
                )
            )
            token = min(token, int(np.flatnonzero(weights)[-1]))
        self._seen.add(token)
        return token


def next_distribution(logits: Array, options: SamplingOptions, seen: Iterable[int] = ()) -> Array:
    """Probabilities float64 [vocabulary] of the next token, zero where top-k or top-p cut it off.

    Top-k keeps ties with the k-th logit; top-p (nucleus sampling, Holtzman et al. 2020) keeps the
    smallest set of most likely tokens whose probability reaches `top_p`.
    """
    scores = _penalised(logits, seen, options.repetition_penalty)
    with np.errstate(over="ignore"):  # next to none of the heat: what is not the best is -inf
        scores = (scores - scores.max()) / options.temperature
    if 0 < options.top_k < scores.size:
        scores[scores < np.partition(scores, -options.top_k)[-options.top_k]] = -np.inf
    weights = np.exp(scores)
    weights /= weights.sum()
    if options.top_p < 1:
        order = np.argsort(-weights, kind="stable")
        before = np.cumsum(weights[order]) - weights[order]
        weights[order[before >= options.top_p]] = 0.0
        weights /= weights.sum()
    return np.asarray(weights)


def _penalised(logits: Array, seen: Iterable[int], penalty: float) -> Array:
    """Logits as float64, seen ones divided (if positive) or multiplied (if negative) by the penalty.

    The rule is that of CTRL (Keskar et al. 2019).
    """
    scores = logits.astype(np.float64)
    index = np.fromiter(seen, np.int64)
    if penalty != 1 and index.size:
        scores[index] = np.where(
            scores[index] > 0, scores[index] / penalty, scores[index] * penalty
        )
    return scores
