"""Short texts in one row: fewer padding tokens, and no text sees another.

In a row the positions of every text begin at 0 again and there is no attention mask. From such positions
transformers makes masks within which each text attends to itself alone (its sdpa and eager attention
as well as the flash ones), so the loss is that of the texts one by one.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qlx.inputs import Encoded
from qlx.inputs.text import IGNORED

__all__ = ["PackedRows", "pack", "packed_columns"]


def pack(items: Sequence[Encoded], length: int) -> list[list[Encoded]]:
    """Put texts of at most `length` tokens into rows of at most as many, the longest first, each where it fits best.

    Best-fit decreasing (Johnson 1973) needs at most 11/9 of the fewest rows possible, and a few.
    """
    rows: list[list[Encoded]] = []
    room: list[tuple[int, int]] = []  # tokens free in a row, and the row; in this order
    for item in sorted(items, key=lambda item: -len(item.ids)):
        at = bisect_left(room, (len(item.ids), -1))
        free, row = room.pop(at) if at < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(item)
        insort(room, (free - len(item.ids), row))
    return rows


def packed_columns(rows: Sequence[Sequence[Encoded]]) -> dict[str, list[list[int]]]:
    """The columns of a data set of packed rows.

    The first token of a text is no label: the text before it does not foretell it.
    """
    return {
        "input_ids": [[token for item in row for token in item.ids] for row in rows],
        "labels": [
            [label for item in row for label in [IGNORED, *item.labels[1:]]] for row in rows
        ],
        "position_ids": [[at for item in row for at in range(len(item.ids))] for row in rows],
    }


class PackedRows:
    """Makes a batch of packed rows; what fills the shorter ones is seen by nothing and counts for nothing."""

    def __init__(self, pad_id: int) -> None:
        self.fill = {"input_ids": pad_id, "labels": IGNORED, "position_ids": 0}

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Columns `[n, longest]` of int64."""
        longest = max(len(row["input_ids"]) for row in rows)
        return {
            name: torch.tensor([[*row[name], *[fill] * (longest - len(row[name]))] for row in rows])
            for name, fill in self.fill.items()
        }
