"""A causal language model's graph as a function with a cache: tokens in, logits out.

The graph takes `input_ids` [B, T], `attention_mask` [B, past + T], `position_ids` [B, T] and one key and
one value tensor [B, heads, past, head size] per layer; the same graph prefills (past = 0) and decodes.
"""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlx.errors import CorruptCheckpoint, UsageError
from qlx.runtime.adapters import AdapterChoice, ChosenAdapter
from qlx.runtime.cache import Cache, ReturnedCache, SharedCache
from qlx.runtime.session import OnnxModel

__all__ = ["CausalDecoder", "positions"]

Array = NDArray[Any]

_ROOM = 256
"""Tokens by which the mask's buffer grows at least."""
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")


def positions(mask: Array, before: Array | int = 0) -> Array:
    """Position of every token, int64 [B, T], counting real tokens only; padding gets 0 or repeats one.

    `mask` is int64 [B, T] with 1 for real tokens, padded on either side; `before` [B, 1] counts those of
    earlier calls.
    """
    found: Array = np.maximum(before + mask.cumsum(axis=1) - 1, 0)
    return found


class CausalDecoder:
    """One sequence batch being decoded; holds the keys and values of everything fed so far.

    The cache stays where it is between steps, or inside onnxruntime on its device; only logits are copied out.

    Args:
        model: an opened causal LM.
        batch: number of sequences.
        adapter: of all sequences, or one for each; see `AdapterChoice`.

    Raises:
        CorruptCheckpoint: the graph lacks one of the inputs or outputs named above.
        UsageError: there is no such adapter, or not one for each sequence.
    """

    def __init__(
        self, model: OnnxModel, batch: int = 1, adapter: AdapterChoice | ChosenAdapter = None
    ) -> None:
        self._adapter = model.adapters.choose(adapter).for_batch(batch)
        self._mask, self._length = np.zeros((batch, 0), np.int64), 0
        self._real = np.zeros((batch, 1), np.int64)
        self._one = {name: np.zeros((batch, 1), np.int64) for name in ("input_ids", "position_ids")}
        layers = _cache_inputs(model)
        self._by_column = model.fused and batch > 1
        kind = SharedCache if model.fused else ReturnedCache
        self._cache: Cache = kind(model, layers, batch)

    @property
    def length(self) -> int:
        """Number of tokens fed so far, padding included."""
        return self._length

    def feed(self, tokens: Array, mask: Array | None = None) -> Array:
        """Append tokens [B, T] to the sequence; `mask` [B, T] marks the real ones (None: all).

        Returns:
            Logits float32 [B, T, vocabulary] of the appended positions.

        Raises:
            UsageError: the tokens are those of another number of sequences.
        """
        tokens = np.asarray(tokens, np.int64)
        if tokens.ndim != 2 or len(tokens) != len(self._real):
            raise UsageError(f"tokens of shape {tokens.shape} for a batch of {len(self._real)}")
        if mask is None and tokens.shape[1] == 1:
            return self._step(tokens)
        fresh = np.ones_like(tokens) if mask is None else np.asarray(mask, np.int64)
        if not (self._by_column and self.length):
            return self._feed(tokens, fresh)
        # The fused kernel appends several tokens to a filled cache for one sequence only.
        columns = range(tokens.shape[1])
        steps = [self._feed(tokens[:, at : at + 1], fresh[:, at : at + 1]) for at in columns]
        return np.concatenate(steps, axis=1)

    def _step(self, tokens: Array) -> Array:
        """One real token for each sequence, from arrays that a cache binds once: a tenth of a small model's time."""
        self._one["input_ids"][:] = tokens
        self._one["position_ids"][:] = self._real
        self._real += 1
        return self._run(self._one, self._seen(1, 1))

    def _feed(self, tokens: Array, fresh: Array) -> Array:
        feeds = {
            "input_ids": np.ascontiguousarray(tokens),
            "position_ids": positions(fresh, self._real),
        }
        self._real += fresh.sum(axis=1, keepdims=True)
        return self._run(feeds, self._seen(fresh, fresh.shape[1]))

    def _run(self, feeds: dict[str, Array], seen: Array) -> Array:
        every = {**feeds, "attention_mask": np.ascontiguousarray(seen)}
        return self._cache.run(every, self._adapter, self._length)

    def _seen(self, fresh: Array | int, tokens: int) -> Array:
        """The mask [B, length] of everything fed, these tokens too, in a buffer that is not copied at each step."""
        start, end = self._length, self._length + tokens
        if end > self._mask.shape[1]:
            room = np.zeros((len(self._mask), max(end, _ROOM)), np.int64)
            self._mask = np.concatenate([self._mask, room], axis=1)
        self._mask[:, start:end] = fresh
        self._length = end
        return self._mask[:, :end]


def _cache_inputs(model: OnnxModel) -> dict[str, tuple[int, int]]:
    """Cache inputs in graph order, each with (heads, head size)."""
    wanted = ["input_ids", "attention_mask", "position_ids"]
    found = {}
    for name, shape in model.shapes.items():
        if (
            _PAST.fullmatch(name)
            and len(shape) == 4
            and isinstance(shape[1], int)
            and isinstance(shape[3], int)
        ):
            found[name] = (shape[1], shape[3])
        elif name in wanted:
            wanted.remove(name)
        else:
            raise CorruptCheckpoint(
                f"{model.path}: the graph has an input {name!r} that a causal LM does not need"
            )
    present = [name.replace("past_key_values", "present") for name in found]
    if wanted or not found or model.outputs != ["logits", *present]:
        raise CorruptCheckpoint(
            f"{model.path}: inputs and outputs are not those of a causal LM with a cache; "
            "export it again"
        )
    return found
