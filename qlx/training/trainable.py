"""Which parameters a training may change: counted, shown, and asserted before the first step."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from qlx.adapters import adapted_modules, is_frozen_part, parameter_counts
from qlx.errors import CheckFailed
from qlx.quant import names_part
from qlx.recipe import AdapterSection

__all__ = [
    "ParameterRow",
    "ParameterTable",
    "parameter_table",
    "require_in_optimizer",
    "require_only_adapter",
]


_ADAPTER = ("lora_", "vera_")
_TOKENS = "token_adapter"


@dataclass(frozen=True)
class ParameterRow:
    """A group of trained parameters: what it is, how many tensors, how many parameters."""

    group: str
    tensors: int
    parameters: int


@dataclass(frozen=True)
class ParameterTable:
    """Trained parameters by group, and all parameters of the model (quantized ones by what they stand for)."""

    rows: tuple[ParameterRow, ...]
    trained: int
    total: int

    @property
    def share(self) -> float:
        """Trained parameters as a share of all."""
        return self.trained / self.total

    def lines(self) -> list[str]:
        """The table as lines of text."""
        lines = [
            f"  {row.group:<28} {row.tensors:>4} tensors {row.parameters:>12,}" for row in self.rows
        ]
        return [
            *lines,
            f"  {'trained of all':<28} {self.trained:>12,} of {self.total:,} ({self.share:.2%})",
        ]


def parameter_table(model: nn.Module) -> ParameterTable:
    """Count the trainable parameters of a model by group."""
    groups: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = _group(name)
            tensors, parameters = groups.get(group, (0, 0))
            groups[group] = tensors + 1, parameters + parameter.numel()
    rows = tuple(ParameterRow(group, *counts) for group, counts in sorted(groups.items()))
    trained, total = parameter_counts(model)
    return ParameterTable(rows, trained, total)


def _group(name: str) -> str:
    """`lora q_proj`, `vera q_proj`, `saved classifier`, `new tokens embed_tokens`, `bias`, or a whole model's part."""
    parts = name.split(".")
    for at, part in enumerate(parts):
        if part.startswith(_ADAPTER):
            return f"{part[:4]} {parts[at - 1]}"
        if part == _TOKENS:
            return f"new tokens {parts[at - 1]}"
        if part == "modules_to_save":
            return f"saved {parts[at - 1]}"
    if parts[-1] == "bias":
        return "bias"
    return parts[-2] if len(parts) > 1 else parts[-1]


def require_only_adapter(model: nn.Module, section: AdapterSection) -> None:
    """Check that nothing but the adapter, and what the recipe asks for beside it, is trainable.

    Raises:
        CheckFailed: another parameter would be trained, or none would.
    """
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    adapted = set(adapted_modules(model))
    foreign = [name for name in trained if not _asked_for(name, section, adapted)]
    if foreign:
        raise CheckFailed(
            f"parameter {foreign[0]!r} of the base would be trained ({len(foreign)} such); it must be frozen"
        )
    if not trained:
        raise CheckFailed("the adapter has no trainable parameters; check adapter.target_modules")


def _asked_for(name: str, section: AdapterSection, adapted: Iterable[str]) -> bool:
    parts = name.split(".")
    if is_frozen_part(name):
        return False
    if section.exact and any(names_part(name, saved) for saved in section.modules_to_save):
        return True
    if any(part.startswith(_ADAPTER) or part == "modules_to_save" for part in parts):
        return True
    if _TOKENS in parts:
        return bool(section.new_tokens)
    if parts[-1] != "bias" or section.bias == "none":
        return False
    module = (
        name.removeprefix("base_model.model.").removesuffix(".bias").removesuffix(".base_layer")
    )
    return section.bias == "all" or module in adapted


def require_in_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Check that the optimizer holds exactly the trainable parameters.

    Raises:
        CheckFailed: it misses one, or would change a frozen one.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = {
        id(parameter): name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    missing = [name for key, name in trained.items() if key not in held]
    if missing:
        raise CheckFailed(f"parameter {missing[0]!r} is trainable but not in the optimizer")
    if held - trained.keys():
        raise CheckFailed(
            f"the optimizer holds {len(held - trained.keys())} parameters that must not be trained"
        )
