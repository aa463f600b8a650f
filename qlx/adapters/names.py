"""From the names of parameters in memory to the names of tensors in a base's files.

transformers 5 renames on load: a ViT that lies on disk as `vit.encoder.layer.0.attention.attention.
query.weight` is `vit.layers.0.attention.q_proj.weight` in memory, and PEFT stores the latter. A qlx
adapter records the mapping; for a plain PEFT directory it is found here, or refused by name.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from itertools import product

from qlx.errors import Mismatch

__all__ = ["disk_names"]

# In memory -> on disk, for ViT, DeiT, BEiT, DINOv2 and Mixtral (transformers 5.23); each rule may apply or
# not, since the models share only some of them.
_RULES = (
    (r"\blayers\.(\d+)\.", r"encoder.layer.\1."),
    (r"\battention\.q_proj\b", "attention.attention.query"),
    (r"\battention\.k_proj\b", "attention.attention.key"),
    (r"\battention\.v_proj\b", "attention.attention.value"),
    (r"\battention\.o_proj\b", "attention.output.dense"),
    (r"\bmlp\.fc1\b", "intermediate.dense"),
    (r"\bmlp\.fc2\b", "output.dense"),
    (r"\bmlp\.gate\b", "block_sparse_moe.gate"),  # Mixtral
)


def disk_names(parameters: Iterable[str], base: Collection[str]) -> dict[str, str]:
    """Map each parameter (such as `model.layers.0.mlp.up_proj.weight`) to its tensor in `base`.

    The same name if the base has it; else what the known renamings make of it; else either of
    these with the leading component dropped or added, as when the base was saved without its head.

    Raises:
        Mismatch: no tensor of the base, or several, could be the one; nothing is guessed.
    """
    known = set(base)
    endings: dict[str, list[str]] = {}
    for name in known:
        endings.setdefault(name.partition(".")[2], []).append(name)
    return {name: _find(name, known, endings) for name in parameters}


def _find(name: str, known: set[str], endings: dict[str, list[str]]) -> str:
    if name in known:
        return name
    spellings = list(_spellings(name))
    for candidates in (
        [s for s in spellings if s in known],
        [s.partition(".")[2] for s in spellings if s.partition(".")[2] in known],
        [full for s in spellings for full in endings.get(s, [])],
    ):
        found = sorted(set(candidates))
        if len(found) == 1:
            return found[0]
        if found:
            raise Mismatch(f"parameter {name!r} could be any of {', '.join(found)} in the base")
    raise Mismatch(
        f"the base has no tensor for parameter {name!r}; the adapter was trained on another model"
    )


def _spellings(name: str) -> Iterator[str]:
    """The name with every choice of the rules that apply to it, itself first."""
    applicable = [rule for rule in _RULES if re.search(rule[0], name)]
    for choice in product((False, True), repeat=len(applicable)):
        spelled = name
        for (pattern, replacement), apply in zip(applicable, choice, strict=True):
            spelled = re.sub(pattern, replacement, spelled) if apply else spelled
        yield spelled
