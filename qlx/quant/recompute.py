"""Products with a weight that is made twice instead of kept: once forward, once backward."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["linear_learned", "linear_remade"]


def _in_its_dtype(x: Tensor) -> AbstractContextManager[Any]:
    """Products of x stay in its dtype, whatever autocast says: it is switched off where it says another."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) == x.dtype:
        return nullcontext()
    return torch.autocast(device, enabled=False)


class _RemadeLinear(torch.autograd.Function):
    """x @ W^T where only the parts that W is made of live on between the passes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        make: Callable[..., Tensor],
        product: Callable[..., Tensor] | None,
        *parts: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*parts)
        ctx.make = make
        with _in_its_dtype(x):
            if product is not None:
                return product(x, *parts)
            return torch.nn.functional.linear(x, make(*parts).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        parts = ctx.saved_tensors  # once: gradient checkpointing recomputes them for this one look
        return gradient @ ctx.make(*parts).to(gradient.dtype), None, None, *(None for _ in parts)


def linear_remade(
    x: Tensor,
    make: Callable[..., Tensor],
    *parts: Tensor,
    product: Callable[..., Tensor] | None = None,
) -> Tensor:
    """X [..., in] times the transpose of `make(*parts)` [out, in], in the dtype of x.

    Forward, `product(x, *parts)` computes it where given, without the weight in between.

    The weight is frozen: only x gets a gradient. Nothing of the weight's size is saved for the
    backward pass, whatever autocast says the product stays in the dtype of x.
    """
    apply: Callable[..., Tensor] = _RemadeLinear.apply
    return apply(x, make, product, *parts)


class _LearnedLinear(torch.autograd.Function):
    """x @ W^T where W is made of parts that learn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, make: Callable[..., Tensor], *parts: Tensor) -> Tensor:
        ctx.save_for_backward(x, *parts)
        ctx.make = make
        with _in_its_dtype(x):
            return torch.nn.functional.linear(x, make(*parts).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, *parts = ctx.saved_tensors
        leaves = [part.detach().requires_grad_() for part in parts]
        with torch.enable_grad():
            weight = ctx.make(*leaves)
        flat = gradient.reshape(-1, gradient.shape[-1])
        of_weight = flat.T @ x.reshape(-1, x.shape[-1])
        found = torch.autograd.grad(weight, leaves, of_weight.to(weight.dtype))
        return gradient @ weight.detach().to(gradient.dtype), None, *found


def linear_learned(x: Tensor, make: Callable[..., Tensor], *parts: Tensor) -> Tensor:
    """X [..., in] times the transpose of `make(*parts)` [out, in], in the dtype of x.

    The parts learn through `make`. Of the weight's size nothing is saved for the backward pass.
    """
    apply: Callable[..., Tensor] = _LearnedLinear.apply
    return apply(x, make, *parts)
