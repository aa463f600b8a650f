"""Which tensors are packed, and how a plain transformers is told which layers are not."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from qlx.checkpoint import Manifest
from qlx.errors import Unsupported
from qlx.models import empty_model, tensor_names
from qlx.packing.source import Weights
from qlx.quant import eligible_modules

__all__ = ["Selection", "select_modules"]


@dataclass(frozen=True)
class Selection:
    """What is packed and what is not.

    `tensors` maps the modules to pack (names in memory) to their weights' names in the files;
    `skipped` names the linear modules that stay as they are; `biased` says whether any packed one
    has a bias.
    """

    tensors: dict[str, str]
    skipped: tuple[str, ...]
    biased: bool


def select_modules(
    weights: Weights,
    companions: Path,
    manifest: Manifest,
    group_size: int | None,
    smaller: str = "a smaller --group-size",
) -> Selection:
    """Choose what to pack: what training had quantized, else every eligible linear layer.

    Embeddings, heads, norms and layers whose inputs are no multiple of `group_size` (None: of any
    number) are never packed. `companions` holds the configuration, from which the model is built
    without memory for its weights; `smaller` tells in an error what to choose instead.

    Raises:
        Unsupported: nothing can be packed.
    """
    model = empty_model(companions, manifest.task)
    names = tensor_names(model, weights.directory)
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    odd = [name for name, module in linears.items() if module.in_features % (group_size or 1)]
    allowed = set(eligible_modules(model, odd, group_size))
    recorded = set(manifest.quantization.tensors)
    chosen = {
        module: names[f"{module}.weight"]
        for module in linears
        if module in allowed and (not recorded or names[f"{module}.weight"] in recorded)
    }
    if not chosen:
        widths = sorted({module.in_features for module in linears.values()})
        raise Unsupported(
            f"{companions}: no linear layer can be packed in groups of {group_size}, because none has "
            f"a multiple of that many inputs ({', '.join(map(str, widths[:6]))}); choose {smaller}"
        )
    skipped = tuple(name for name in linears if name not in chosen)
    biased = any(linears[name].bias is not None for name in chosen)
    return Selection(chosen, skipped, biased)
