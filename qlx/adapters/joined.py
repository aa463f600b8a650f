"""PEFT's LoRA layers with the adapter's product added into the base's output, instead of beside it.

PEFT computes `base(x) + up(down(x)) * scaling` as four arrays of the output's size: the product, its
multiple, the sum and, on a 4-bit base, a copy; backward as much again. Here one matrix product adds
`scaling * low @ up^T` to what the base gave, in place. The values agree to the last bits of a float; that is for
training alone: a model in eval mode computes PEFT's own bits.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["join_products"]


def join_products(model: nn.Module) -> int:
    """Let every LoRA layer of a model around a linear one train this way; returns how many do.

    What a layer is, holds and saves does not change. DoRA, several adapters at once, biases of the
    adapter's own, dtypes that only a cast would bring together, and eval mode stay PEFT's own computation.
    """
    layers: list[Any] = [m for m in model.modules() if type(m) in _lora_layers()]
    joined = [layer for layer in layers if isinstance(layer.base_layer, nn.Linear)]
    for layer in joined:
        layer.__class__ = _joined(layer.__class__)
    return len(joined)


@cache
def _lora_layers() -> tuple[Any, ...]:
    """PEFT's layers around a linear layer: of floats, and of 4-bit codes where bitsandbytes is installed."""
    from peft.tuners import lora

    return tuple(getattr(lora, name) for name in ("Linear", "Linear4bit") if hasattr(lora, name))


@cache
def _joined(kind: Any) -> type:
    return type(f"Joined{kind.__name__}", (_Joined, kind), {})


class _Joined:
    """Mixed into a LoRA layer of PEFT before the class itself."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map x [..., in] to [..., out]."""
        layer: Any = self
        adapter = None if args or kwargs else _only_adapter(layer, x)
        if adapter is None:
            inherited: Any = super()
            whole: Tensor = inherited.forward(x, *args, **kwargs)
            return whole
        rows = x.reshape(-1, x.shape[-1])
        # of a matrix, so that the base's output is no view: autograd copies views that are changed
        result: Tensor = layer.base_layer(rows)
        low = layer.lora_A[adapter](layer.lora_dropout[adapter](rows)).to(result.dtype)
        up = layer.lora_B[adapter].weight.to(result.dtype)  # autocast knows no products in place
        result.addmm_(low, up.t(), alpha=layer.scaling[adapter])
        return result.view(*x.shape[:-1], result.shape[-1])


def _only_adapter(layer: Any, x: Tensor) -> str | None:
    """The name of the one plain adapter that trains; None where the sum is not that simple."""
    active = layer.active_adapters
    if not layer.training or layer.disable_adapters or layer.merged or len(active) != 1:
        return None
    name: str = active[0]
    if name not in layer.lora_A or name in layer.lora_variant:
        return None
    up, down = layer.lora_B[name], layer.lora_A[name].weight
    factors = {up.weight.dtype, down.dtype}
    alike = factors == {x.dtype} or torch.is_autocast_enabled(x.device.type)
    return name if up.bias is None and len(factors) == 1 and alike else None
