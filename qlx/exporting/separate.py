"""Adapters kept beside their base layers in the exported graph.

A PEFT layer is replaced by `SeparateLora`, whose two matrices become the initializers
`<module>.lora_A` [in, r] and `<module>.lora_B` [r, out]. That is the layout onnxruntime's LoraAdapter feeds,
so declaring them as graph inputs later makes the adapter swappable without touching a node.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qlx.errors import Unsupported

__all__ = ["SeparateLora", "separate_adapter"]


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
        if hasattr(module, "lora_A") and not isinstance(module, SeparateLora):
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
