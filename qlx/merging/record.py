"""What every merge records of itself, whichever way it was made, and says of what it left alone."""

from collections.abc import Sequence

from qlx.merging.companions import float_name, main_dtype
from qlx.merging.plan import MergePlan
from qlx.merging.tied import HEAD
from qlx.merging.values import MAX_ERASED, Rounding, check_effect, left_alone

__all__ = ["merge_options", "untouched_tensors", "untouched_text"]

_SHOWN = 3  # names that a sentence lists


def merge_options(
    plan: MergePlan, roundings: Sequence[Rounding], max_erased: float
) -> dict[str, object]:
    """The options of the lineage step of a merge whose weights are written.

    `adapted_tensors` counts those with an update, `untouched_tensors` names those whose update in
    the adapter is exactly zero, where there are any.

    Raises:
        CheckFailed: the adapter did not arrive; see `check_effect`.
    """
    erased = check_effect(roundings, max_erased, main_dtype(plan))
    options: dict[str, object] = {
        "onto": plan.onto,
        "dtype": main_dtype(plan),
        "exact": plan.exact,
        "adapted_tensors": len(roundings) - len(left_alone(roundings)),
        "erased_share": float(f"{erased:.3g}"),
    }
    if plan.head_cast is not None:
        options["head_dtype"] = float_name(plan.dtype_of(HEAD))
    untouched = untouched_tensors(plan, roundings)
    if untouched:
        options["untouched_tensors"] = untouched
    if max_erased > MAX_ERASED:
        options["max_erased"] = max_erased  # the retention gate follows what was allowed
    return options


def untouched_tensors(plan: MergePlan, roundings: Sequence[Rounding]) -> list[str]:
    """The tensors that the adapter has a part for which is exactly zero, by name."""
    return sorted({*plan.untouched, *left_alone(roundings)})


def untouched_text(names: Sequence[str]) -> str:
    """One sentence on the tensors that an adapter has a part for, but does not change."""
    shown = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
    count = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
    return f"warning: the adapter's update of {count} is zero, so that nothing is added to {shown}"
