"""Adapters kept beside their base layers in the exported graph.

A PEFT layer is replaced by `SeparateLora`, whose two matrices become the initializers
`<module>.lora_A` [in, r] and `<module>.lora_B` [r, out]. Where adapters are to be swapped, `SwappableLora` is
put around a base's layers, whose parameters `passes.declare_adapters` then makes graph inputs.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlx.errors import Unsupported

__all__ = ["SeparateLora", "SwappableLora", "make_swappable", "separate_adapter"]


class SeparateLora(nn.Module):
    """A base layer plus its low-rank branch: base(x) + (x · A) · B.

    Args:
        base: the layer the adapter was trained on, mapping [..., in] to [..., out].
        lora_a: [in, r].
        lora_b: [r, out] with the adapter's scaling already multiplied in.
    """

    def __init__(self, base: nn.Module, lora_a: Tensor, lora_b: Tensor) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(
            lora_a.detach().to(torch.float32).contiguous(), requires_grad=False
        )
        self.lora_B = nn.Parameter(
            lora_b.detach().to(torch.float32).contiguous(), requires_grad=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        result: Tensor = self.base(x) + (x @ self.lora_A) @ self.lora_B
        return result


class SwappableLora(nn.Module):
    """A base layer with room for any adapter: (1 + scale) · base(x), without its bias, + (x · A) · B + bias.

    The parameters only hold a place while the model is traced: `lora_A` [in, 1], `lora_B` [1, out], and
    where any adapter has them `lora_scale` and `lora_bias` [out]. Inputs without a sequence, [n, in], get one of
    length 1, so that the rows of a batch can have adapters of their own.
    """

    lora_A: Tensor | None  # noqa: N815 - the names that PEFT and onnxruntime use
    lora_B: Tensor | None  # noqa: N815
    lora_scale: Tensor | None
    lora_bias: Tensor | None

    def __init__(self, base: nn.Module, parts: frozenset[str]) -> None:
        super().__init__()
        self.base = base
        inputs, outputs = _sizes(base)
        shapes: dict[str, tuple[int, ...]] = {"lora_A": (inputs, 1), "lora_B": (1, outputs)}
        shapes |= {"lora_scale": (outputs,), "lora_bias": (outputs,)}
        for name, shape in shapes.items():
            held = nn.Parameter(torch.zeros(shape), requires_grad=False) if name in parts else None
            self.register_parameter(name, held)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] → [..., out]."""
        if x.dim() == 2:
            return self._adapted(x.unsqueeze(1)).squeeze(1)
        return self._adapted(x)

    def _adapted(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        bias: Tensor | None = getattr(self.base, "bias", None)
        if self.lora_scale is not None:
            y = y + (y if bias is None else y - bias) * self.lora_scale
        if self.lora_A is not None and self.lora_B is not None:
            y = y + (x @ self.lora_A) @ self.lora_B
        return y if self.lora_bias is None else y + self.lora_bias


def _sizes(layer: Any) -> tuple[int, int]:
    """(in, out) of a linear layer; transformers' Conv1D has other names for them."""
    if hasattr(layer, "in_features"):
        return layer.in_features, layer.out_features
    return layer.nx, layer.nf


def make_swappable(model: nn.Module, places: Mapping[str, frozenset[str]]) -> dict[str, str]:
    """Put a `SwappableLora` around layers of a base, in place; `places` names the parameters each has.

    Returns:
        A map from the prefix of each layer's parameters to the prefix the plain model has.
    """
    for name, parts in places.items():
        _replace(model, name, SwappableLora(model.get_submodule(name), parts))
    return {f"{name}.base.": f"{name}." for name in places}


def separate_adapter(model: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """Take PEFT's wrappers off a model, leaving one `SeparateLora` per adapted module.

    Returns:
        The transformers model itself, changed in place, and a map from the prefix of each base
        layer's parameters to the prefix the unadapted model has.

    Raises:
        Unsupported: an adapter that is not a plain LoRA on linear layers (DoRA, embeddings, biases
            inside the branch); the message names the module.
    """
    inner: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    prefixes = {}
    for name, module in list(inner.named_modules()):
        if hasattr(module, "lora_A") and not isinstance(module, SeparateLora | SwappableLora):
            _replace(inner, name, _separated(name, module))
            prefixes[f"{name}.base."] = f"{name}."
        elif hasattr(module, "vera_lambda_d"):
            _replace(inner, name, _from_vera(module, _only(name, list(module.vera_lambda_d))))
            prefixes[f"{name}.base."] = f"{name}."
        elif hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
            _replace(inner, name, module.modules_to_save[_only(name, module.active_adapters)])
    return inner, prefixes


def _separated(name: str, layer: Any) -> SeparateLora:
    adapter = _only(name, list(layer.lora_A))
    if layer.use_dora.get(adapter) or len(getattr(layer, "lora_magnitude_vector", {})):
        raise Unsupported(
            f"{name}: DoRA rescales the whole layer and cannot be exported unmerged; run qlx merge first"
        )
    if layer.lora_embedding_A or layer.lora_B[adapter].bias is not None or layer.merged:
        raise Unsupported(
            f"{name}: only plain LoRA on linear layers can be exported unmerged; run qlx merge first"
        )
    scaled = layer.lora_B[adapter].weight.to(torch.float32) * layer.scaling[adapter]
    return SeparateLora(layer.base_layer, layer.lora_A[adapter].weight.T, scaled.T)


def _from_vera(layer: Any, adapter: str) -> SeparateLora:
    """Both of its vectors multiplied into the parts of the shared projections that the layer uses."""
    a, b = layer.vera_A[adapter], layer.vera_B[adapter]
    narrow = a[:, : layer.in_features].float() * layer.vera_lambda_d[adapter][:, None]
    scaled = b[: layer.out_features].float() * layer.vera_lambda_b[adapter][:, None]
    return SeparateLora(layer.base_layer, narrow.T, scaled.T)


def _only(name: str, adapters: list[str]) -> str:
    if len(adapters) != 1:
        raise Unsupported(
            f"{name}: carries {len(adapters)} adapters at once; export them one by one"
        )
    return adapters[0]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
