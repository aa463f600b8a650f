"""Training: from a recipe to a run, adapters from runs or plain PEFT directories, and the run's report."""

from qlx.training.run import train

__all__ = ["train"]
