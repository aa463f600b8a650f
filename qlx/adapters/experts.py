"""Experts that are one parameter in memory and a tensor each on disk (transformers 5).

A mixture of experts is stored expert by expert (`experts.0.gate_proj.weight`, …); on load
transformers stacks them, gate above up, into `experts.gate_up_proj` [n, 2 f, d] and
`experts.down_proj` [n, d, f]. An adapter on the stacked parameter is taken apart here the same way.
"""

from collections.abc import Mapping

from qlx.adapters.formula import LoraDelta, delta_of_expert
from qlx.errors import Mismatch, Unsupported

__all__ = ["split_experts"]

# Parameter in memory -> its parts in each expert, from the first row down, by family.
_PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
_OWNERS = ("mlp.experts", "block_sparse_moe.experts")


def split_experts(delta: LoraDelta, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LoraDelta]:
    """The linear update of every expert's tensor, by tensor name.

    `delta` is of kind `experts`; `shapes` are those of the base's tensors.

    Raises:
        Unsupported: the base does not store these experts one by one.
        Mismatch: the number of experts or a shape differs.
    """
    owner, _, parameter = delta.module.rpartition(".")
    for stored in dict.fromkeys((owner, owner.replace(*_OWNERS))):
        for parts in _PARTS.get(parameter, ()):
            if all(f"{stored}.0.{part}.weight" in shapes for part in parts):
                return _split(delta, stored, parts, shapes)
    raise Unsupported(
        f"target_parameters: the base has no tensors of single experts for {delta.module!r}, and other "
        "fused parameters are not handled"
    )


def _split(
    delta: LoraDelta, owner: str, parts: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, LoraDelta]:
    found = {}
    for expert in range(delta.experts):
        start = 0
        for part in parts:
            name = f"{owner}.{expert}.{part}.weight"
            if name not in shapes:
                raise Mismatch(f"the adapter has {delta.experts} experts, the base lacks {name!r}")
            rows = slice(start, start := start + shapes[name][0])
            found[name] = delta_of_expert(delta, expert, rows)
        if start != delta.b.shape[0]:
            raise Mismatch(
                f"parameter {delta.module!r}: the adapter has {delta.b.shape[0]} rows, the base {start}"
            )
    if f"{owner}.{delta.experts}.{parts[0]}.weight" in shapes:
        raise Mismatch(
            f"the base has more experts than the adapter's {delta.experts} for {delta.module!r}"
        )
    return found
