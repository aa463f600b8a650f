"""Folding an adapter into its base's weights: plan first, then stream, then prove it on the probe."""

from qlx.merging.blocks import merged_value
from qlx.merging.change import Change
from qlx.merging.combine import Combination, chosen_combination, combine
from qlx.merging.engine import Written, write_merge
from qlx.merging.merge import Outline, adapter_checkpoint, merge, outline, plan_of
from qlx.merging.plan import MergePlan, Onto, choose_onto, plan_merge
from qlx.merging.values import (
    MAX_ERASED,
    Rounding,
    as_trained,
    base_value,
    check_effect,
    erased_share,
)

__all__ = [
    "MAX_ERASED",
    "Change",
    "Combination",
    "MergePlan",
    "Onto",
    "Outline",
    "Rounding",
    "Written",
    "adapter_checkpoint",
    "as_trained",
    "base_value",
    "check_effect",
    "choose_onto",
    "chosen_combination",
    "combine",
    "erased_share",
    "merge",
    "merged_value",
    "outline",
    "plan_merge",
    "plan_of",
    "write_merge",
]
