"""Training: from a recipe to a run, adapters from runs or plain PEFT directories, and the run's report."""

from qlx.training.adapter import save_adapter
from qlx.training.checks import DryRun, check
from qlx.training.distributed import launch, this_process
from qlx.training.run import train
from qlx.training.trainable import ParameterRow, ParameterTable, parameter_table
from qlx.training.work import check_places, interrupted_at

__all__ = [
    "DryRun",
    "ParameterRow",
    "ParameterTable",
    "check",
    "check_places",
    "interrupted_at",
    "launch",
    "parameter_table",
    "save_adapter",
    "this_process",
    "train",
]
