"""The unit of a merge plan: what becomes of one tensor."""

from dataclasses import dataclass

import torch

from qlx.adapters import ExactUpdate, LoraDelta, TokenRows

__all__ = ["Change"]


@dataclass(frozen=True)
class Change:
    """One tensor of the merged model that differs from the base's.

    `dtype` is the safetensors name it is written in, `shape` its shape. In this order: `value`, a
    tensor that was trained whole, replaces the base's, which otherwise is taken as training saw it
    (`as_trained`: loaded in training's dtype and through its codec) or as it is; then single `rows`
    are replaced, and the weight's `delta` or, for a bias, `addend` is added; `exact` moves the codes of training
    instead, and what is written is their values. `copy_of` names the
    base's tensor where it is another one: that of a head that the base ties to its embedding.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    as_trained: bool = False
    value: torch.Tensor | None = None
    delta: LoraDelta | None = None
    addend: torch.Tensor | None = None
    rows: TokenRows | None = None
    exact: ExactUpdate | None = None
    copy_of: str | None = None

    @property
    def source(self) -> str:
        """The tensor of the base that this one starts from."""
        return self.copy_of or self.name

    @property
    def adapted(self) -> bool:
        """Whether the adapter changes this tensor, as opposed to the codec or the untying alone."""
        parts = (self.value, self.delta, self.addend, self.rows, self.exact)
        return any(part is not None for part in parts)
