"""Adapters that start at something: the weight's principal part (PiSSA), or what quantization took (LoftQ).

Both are singular value decompositions, here of the values that training computes with. PiSSA (arXiv
2404.02948) trains the r largest directions B0 A0 of a weight W and freezes the rest, W - s B0 A0. A base
that is named by its content, and perhaps packed, cannot become that rest; so its weight stays W, and
a second, frozen adapter holds -B0 A0. What is trained is the same function of the same parameters, and
what is stored is one ordinary LoRA of rank 2r on the untouched base: [B, -B0] and [A; A0].

LoftQ (arXiv 2310.08659) lets s B A begin as the best approximation of W - Q(W) of rank r, one step of its
alternation: the codes stay those of W. PEFT's own one leaves s out, and overshoots where s is not 1.
"""

from collections.abc import Callable, Mapping
from copy import copy
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from qlx.errors import Unsupported
from qlx.quant import packed_modules, packed_of_module

__all__ = [
    "doubled",
    "frozen_part",
    "is_frozen_part",
    "join_halves",
    "low_rank",
    "start_loftq",
    "start_pissa",
]

_TRAINED, _FROZEN = "default", "start"
"""Names in PEFT of the adapter that is trained, and of the one that takes PiSSA's beginning away again."""

Factors = tuple[Tensor, Tensor]


def low_rank(matrix: Tensor, rank: int, iterations: int | None = None) -> Factors:
    """A [r, in] and B [out, r] whose product B A is the nearest of that rank to `matrix` [out, in].

    The singular values are shared evenly between both. With `iterations` the decomposition is the
    randomized one (arXiv 0909.4061), much faster and nearly as near; it draws from torch's generator.
    """
    if iterations is None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    else:
        left, values, right = torch.svd_lowrank(matrix, q=rank, niter=iterations)
        right = right.T
    root = values[:rank].sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def start_pissa(adapted: Any, iterations: int | None) -> None:
    """Let the adapter of a `PeftModel` begin as the principal part of every adapted weight.

    The model computes what its base does, but for float rounding.

    Raises:
        Unsupported: an adapted module is no linear layer, or has fewer directions than the rank.
    """
    config = copy(adapted.peft_config[_TRAINED])
    config.bias, config.lora_dropout, config.modules_to_save = "none", 0.0, None
    config.trainable_token_indices, config.init_lora_weights = None, True
    adapted.add_adapter(_FROZEN, config)
    values = _Values(adapted)
    for name, layer in _layers(adapted, "pissa").items():
        if layer.weight.device.type != "meta":
            a, b = _factors(name, layer, values(layer), iterations)
            _put(layer, _TRAINED, a, b)
            _put(layer, _FROZEN, a, -b)
        layer.set_adapter([_TRAINED, _FROZEN])
    for name, parameter in adapted.named_parameters():
        if is_frozen_part(name):
            parameter.requires_grad_(False)


def start_loftq(adapted: Any, original: Callable[[str], Tensor]) -> None:
    """Let the adapter of a `PeftModel` begin as the largest part of what quantization took.

    `original` gives the unquantized weight of a module, by its name in the plain model; one at a time is
    asked for. Layers that are not quantized, or lost nothing, begin as ever.

    Raises:
        Unsupported: no adapted module is quantized, or one has fewer directions than the rank.
    """
    values = _Values(adapted)
    layers = _layers(adapted, "loftq")
    if any(layer.weight.device.type == "meta" for layer in layers.values()):
        return
    quantized = {name: layer for name, layer in layers.items() if values.packed(layer)}
    if not quantized:
        raise Unsupported("adapter.init_lora_weights: loftq, but no adapted module is quantized")
    for name, layer in quantized.items():
        lost = original(name).to(layer.weight.device, torch.float32) - values(layer)
        if bool(lost.any()):
            _put(layer, _TRAINED, *_factors(name, layer, lost, None))


def is_frozen_part(parameter: str) -> bool:
    """Whether a parameter's name is one of PiSSA's frozen half."""
    return f".lora_A.{_FROZEN}." in parameter or f".lora_B.{_FROZEN}." in parameter


def frozen_part(model: nn.Module) -> dict[str, nn.Parameter]:
    """The frozen half of an adapter that began as PiSSA, by parameter name; empty for any other."""
    return {name: value for name, value in model.named_parameters() if is_frozen_part(name)}


def doubled(
    config: Mapping[str, Any], trained: Mapping[str, Tensor], frozen: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields and tensors of the one LoRA that is the sum of both halves, by PEFT's names for files.

    `config` and `trained` are those of the trained half; `frozen` is what `frozen_part` gives. Ranks
    double, and every alpha grows so that the scaling stays: twice, or √2 with `use_rslora`.
    """
    factor = sqrt(2) if config["use_rslora"] else 2
    fields = {
        **config,
        "r": 2 * config["r"],
        "lora_alpha": factor * config["lora_alpha"],
        "rank_pattern": {key: 2 * rank for key, rank in config["rank_pattern"].items()},
        "alpha_pattern": {key: factor * alpha for key, alpha in config["alpha_pattern"].items()},
        "init_lora_weights": True,
    }
    joined = {
        name: torch.cat([trained[name], value], dim=0 if ".lora_A." in name else 1)
        for name, value in ((key.replace(f".{_FROZEN}.", "."), v) for key, v in frozen.items())
    }
    return fields, {**trained, **joined}


def join_halves(adapted: Any) -> None:
    """Make one adapter of twice the rank of PiSSA's two, in place: the one that is stored; else do nothing.

    Their sum is the same but for the order of float sums, which tells where both are large.
    """
    if not frozen_part(adapted):
        return
    config = adapted.peft_config[_TRAINED]
    fields, _ = doubled(config.to_dict(), {}, {})
    for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
        setattr(config, name, fields[name])
    for layer in _layers(adapted, "pissa").values():
        for parts, dim in ((layer.lora_A, 0), (layer.lora_B, 1)):
            both = [parts[half].weight.detach() for half in (_TRAINED, _FROZEN)]
            parts[_TRAINED].weight = nn.Parameter(torch.cat(both, dim=dim))
        layer.r[_TRAINED] *= 2
        layer.delete_adapter(_FROZEN)
        layer.set_adapter(_TRAINED)
    del adapted.peft_config[_FROZEN]


class _Values:
    """The fp32 values [out, in] that the adapted layers of a model compute with."""

    def __init__(self, adapted: nn.Module) -> None:
        self._packed = {id(module) for _, module in packed_modules(adapted)}

    def packed(self, layer: Any) -> bool:
        """Whether an adapted layer's own weight is packed."""
        return id(layer.get_base_layer()) in self._packed

    def __call__(self, layer: Any) -> Tensor:
        base = layer.get_base_layer()
        if self.packed(layer):
            return packed_of_module(base).values().to(base.weight.device)
        weight: Tensor = base.weight.detach().float()
        return weight.T if layer.fan_in_fan_out else weight


def _layers(adapted: Any, what: str) -> dict[str, Any]:
    """The adapted modules by their name in the plain model."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper
    from transformers.pytorch_utils import Conv1D

    found = {}
    for name, module in adapted.get_base_model().named_modules():
        if not isinstance(module, LoraLayer):
            continue
        base = module.get_base_layer()
        if isinstance(module, ParamWrapper) or not isinstance(base, nn.Linear | Conv1D):
            kind = type(base).__name__
            raise Unsupported(
                f"adapter.init_lora_weights: {what} is for linear layers, and {name!r} is a {kind}; take it out of "
                "target_modules"
            )
        found[name] = module
    return found


def _factors(name: str, layer: Any, matrix: Tensor, iterations: int | None) -> Factors:
    rank = layer.r[_TRAINED]
    if rank > min(matrix.shape):
        raise Unsupported(
            f"adapter.rank: {rank} is more than the {min(matrix.shape)} directions that the weight of {name!r} has"
        )
    return low_rank(matrix / layer.scaling[_TRAINED], rank, iterations)


def _put(layer: Any, adapter: str, a: Tensor, b: Tensor) -> None:
    with torch.no_grad():
        layer.lora_A[adapter].weight.copy_(a)
        layer.lora_B[adapter].weight.copy_(b)
