"""PEFT's LoRA layers with the adapter's product added into the base's output, instead of beside it.

PEFT computes `base(x) + up(down(x)) * scaling` as four arrays of the output's size: the product, its
multiple, the sum and, on a 4-bit base, a copy; backward as much again. Here one matrix product adds
`scaling * low @ up^T` to what the base gave, in place. The values agree to the last bits of a float; that is for
training alone: a model in eval mode computes PEFT's own bits.

Under autocast the factors, which are float32, are cast to the dtype of the products all at once, and so are
their gradients: a GPU spends more time on starting hundreds of casts than on casting.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
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
    model.register_forward_pre_hook(partial(_cast_factors, layers=joined))
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
    """Mixed into a LoRA layer of PEFT before the class itself.

    `cast` are the adapter's two factors in the dtype of autocast, from a forward pass to the end of its backward pass.
    """

    cast: tuple[Tensor, Tensor] | None = None

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
        dropped = layer.lora_dropout[adapter](rows)
        if self.cast is None:
            low, up = layer.lora_A[adapter](dropped), layer.lora_B[adapter].weight
        else:
            low, up = torch.nn.functional.linear(dropped, self.cast[0]), self.cast[1]
        # autocast knows no products in place: both factors in the dtype of the result
        result.addmm_(low.to(result.dtype), up.to(result.dtype).t(), alpha=layer.scaling[adapter])
        return result.view(*x.shape[:-1], result.shape[-1])


def _cast_factors(model: nn.Module, _: Any, *, layers: list[Any]) -> None:
    """Before a forward pass in training, give all layers their factors in autocast's dtype, where that is another."""
    for layer in layers:
        layer.cast = None
    if not model.training or torch.compiler.is_compiling():
        return
    adapted = [(layer, name) for layer in layers if (name := _adapter_that_trains(layer))]
    factors = [
        part[name].weight for layer, name in adapted for part in (layer.lora_A, layer.lora_B)
    ]
    device = factors[0].device.type if factors else "meta"  # the base's weights may be elsewhere
    if device == "meta" or not torch.is_autocast_enabled(device):
        return
    dtype = torch.get_autocast_dtype(device)
    if all(type(one) is nn.Parameter and one.dtype != dtype for one in factors):
        apply: Callable[..., tuple[Tensor, ...]] = _Cast.apply
        cast = iter(apply([layer for layer, _ in adapted], dtype, *factors))
        for layer, _ in adapted:
            layer.cast = (next(cast), next(cast))


class _Cast(torch.autograd.Function):
    """Many tensors in another dtype, by one operation; their gradients come back by one, when all are there.

    Then the layers forget what was cast: an optimizer's step comes next, and makes it stale.
    """

    @staticmethod
    def forward(
        ctx: Any, layers: list[Any], dtype: torch.dtype, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.layers, ctx.dtypes = layers, [tensor.dtype for tensor in tensors]
        return tuple(_cast_all(tensors, [dtype] * len(tensors)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        for layer in ctx.layers:
            layer.cast = None
        return None, None, *_cast_all(gradients, ctx.dtypes)


def _cast_all(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    found = [torch.empty_like(one, dtype=dtype) for one, dtype in zip(tensors, dtypes, strict=True)]
    torch._foreach_copy_(found, list(tensors))
    return found


def _only_adapter(layer: Any, x: Tensor) -> str | None:
    """The name of the one plain adapter that trains; None where the sum is not that simple for x."""
    name = _adapter_that_trains(layer)
    if name is None or torch.is_autocast_enabled(x.device.type):
        return name
    return name if layer.lora_B[name].weight.dtype == x.dtype else None


def _adapter_that_trains(layer: Any) -> str | None:
    active = layer.active_adapters
    if not layer.training or layer.disable_adapters or layer.merged or len(active) != 1:
        return None
    name: str = active[0]
    if name not in layer.lora_A or name in layer.lora_variant:
        return None
    up = layer.lora_B[name]
    simple = up.bias is None and up.weight.dtype == layer.lora_A[name].weight.dtype
    return name if simple else None
