"""Language models whose head is their input embedding: what an adapter on either means for both.

PEFT wraps the two modules apart, so an update of one leaves the other as it was: the unmerged model
is untied by its adapter. A merge that writes one tensor for both is another model. Here the head
gets a tensor of its own wherever the two come to differ, and `tie_word_embeddings` becomes false.
Only single trained tokens on the embedding apply to a tied head as well (PEFT ties those).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch

from qlx.errors import Mismatch, Unsupported
from qlx.merging.change import Change

__all__ = ["EMBEDDINGS", "HEAD", "Tied", "check_vocabulary", "settle", "tied_embedding"]

HEAD = "lm_head.weight"
"""The head's tensor in every language model qlx knows."""
EMBEDDINGS = ("embed_tokens.weight", "wte.weight")
"""How the input embedding's tensor ends, by family."""


@dataclass(frozen=True)
class Tied:
    """A base whose head is its input embedding: the name, dtype and shape of the one tensor."""

    embedding: str
    dtype: str
    shape: tuple[int, ...]


def tied_embedding(names: Collection[str], config: Mapping[str, object]) -> str | None:
    """The tensor that serves as input embedding and head, None where the head has its own.

    A configuration that does not say (older ones leave it out) is taken by what the files hold.
    """
    found = [name for name in names if name.endswith(EMBEDDINGS)]
    tied = config.get("tie_word_embeddings")
    if len(found) != 1 or tied is False or (tied is None and HEAD in names):
        return None
    return found[0]


def settle(changes: Mapping[str, Change], tied: Tied, *, head_stored: bool) -> dict[str, Change]:
    """The changes with head and embedding still one tensor, or two from here on.

    `head_stored` says that the base's files hold a (redundant) tensor for the head.

    Raises:
        Unsupported: trained tokens beside another update, whose meaning for the head is not known.
    """
    settled = dict(changes)
    embedding, head = settled.get(tied.embedding), settled.get(HEAD)
    if not _adapted(embedding) and not _adapted(head):
        return settled
    if embedding is not None and (_only_rows(embedding, head) or _one_value(embedding, head)):
        settled.pop(HEAD, None)
        return settled | ({HEAD: replace(embedding, name=HEAD)} if head_stored else {})
    if embedding is not None and embedding.rows is not None and (head is None or head.rows is None):
        raise Unsupported(
            "single trained tokens of a tied embedding beside another update of it are not handled"
        )
    if head is None:
        assert embedding is not None
        head = Change(HEAD, embedding.dtype, tied.shape, as_trained=embedding.as_trained)
    return settled | {HEAD: replace(head, copy_of=tied.embedding)}


def _adapted(change: Change | None) -> bool:
    return change is not None and change.adapted


def _only_rows(embedding: Change, head: Change | None) -> bool:
    """Whether single tokens are all that is trained; PEFT ties those of the embedding to the head."""
    alone = embedding.value is None and embedding.delta is None and embedding.rows is not None
    return alone and not _adapted(head)


def _one_value(embedding: Change, head: Change | None) -> bool:
    """Whether both were saved whole and alike: a tied model whose vocabulary was resized."""
    both = (embedding, head)
    if any(c is None or c.value is None or c.delta is not None or c.rows is not None for c in both):
        return False
    values = [change.value for change in both if change is not None and change.value is not None]
    return torch.equal(*values)


def check_vocabulary(rows: Mapping[str, int]) -> None:
    """Check that embedding and head, by tensor name and number of rows, have one vocabulary.

    Raises:
        Mismatch: one was resized without the other.
    """
    if len(set(rows.values())) > 1:
        told = " and ".join(f"{name!r} {count}" for name, count in sorted(rows.items()))
        raise Mismatch(f"merged, {told} rows: embedding and head were not resized together")
