"""Adapters: the formulas, the strict reader of PEFT directories, and PEFT itself for training.

`read_adapter`, `delta_weight` and `merged_weight` need torch only; `attach_adapter`, `load_adapter`
and `save_adapter` import PEFT when they are called.
"""

from qlx.adapters.attach import (
    OWN_BIASES,
    adapted_modules,
    adapter_spec,
    attach_adapter,
    auto_targets,
    load_adapter,
    lora_config,
    parameter_counts,
    save_adapter,
)
from qlx.adapters.combination import METHODS, PRUNING, RANDOM, Method, combined_delta
from qlx.adapters.compact import to_int8
from qlx.adapters.config import AdapterConfig, read_config, read_peft_type
from qlx.adapters.exact import (
    EXACT_FILE,
    ExactLinear,
    ExactUpdate,
    ExactWeights,
    exact_layers,
    exact_spec,
    not_quantized,
    put_exact,
    read_exact,
    require_exact_codes,
)
from qlx.adapters.experts import split_experts
from qlx.adapters.formula import (
    LoraDelta,
    TokenRows,
    delta_bias,
    delta_of_expert,
    delta_rows,
    delta_shape,
    delta_weight,
    dora_factor,
    fitted,
    merged_weight,
    scaling_of,
    widened,
    with_rows,
)
from qlx.adapters.initial import frozen_part, is_frozen_part, join_halves
from qlx.adapters.names import disk_names
from qlx.adapters.reader import AdapterWeights, read_adapter, read_recorded

__all__ = [
    "EXACT_FILE",
    "METHODS",
    "OWN_BIASES",
    "PRUNING",
    "RANDOM",
    "AdapterConfig",
    "AdapterWeights",
    "ExactLinear",
    "ExactUpdate",
    "ExactWeights",
    "LoraDelta",
    "Method",
    "TokenRows",
    "adapted_modules",
    "adapter_spec",
    "attach_adapter",
    "auto_targets",
    "combined_delta",
    "delta_bias",
    "delta_of_expert",
    "delta_rows",
    "delta_shape",
    "delta_weight",
    "disk_names",
    "dora_factor",
    "exact_layers",
    "exact_spec",
    "fitted",
    "frozen_part",
    "is_frozen_part",
    "join_halves",
    "load_adapter",
    "lora_config",
    "merged_weight",
    "not_quantized",
    "parameter_counts",
    "put_exact",
    "read_adapter",
    "read_config",
    "read_exact",
    "read_peft_type",
    "read_recorded",
    "require_exact_codes",
    "save_adapter",
    "scaling_of",
    "split_experts",
    "to_int8",
    "widened",
    "with_rows",
]
