"""Names of a model's tensors in memory and in its files, which transformers 5 lets differ.

A ViT's `vit.encoder.layer.0.attention.attention.query.weight` on disk is
`vit.layers.0.attention.q_proj.weight` in memory; GPT-2 files leave out the prefix `transformer.`.
The translation is transformers' own: its load-side renaming where the files are at hand, its
save-side one where they are not.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlx.errors import Unsupported, require
from qlx.models.coded import logical_names
from qlx.weights import open_weights

__all__ = ["plain_names", "tensor_names"]

_WRAPPERS = (".base_layer", ".original_module")


def tensor_names(model: nn.Module, directory: Path | None = None) -> dict[str, str]:
    """In-memory name of each parameter and buffer to its name in the checkpoint files.

    `model` may be quantized or carry PEFT adapters; the names in memory are always those of the
    plain model. With `directory` the names are those found in its weight files; without, those that
    transformers would save.

    Raises:
        Unsupported: the files hold tensors that are split or merged on load, so that no
            one-to-one translation exists.
    """
    plain = _meta_copy(_unwrapped(model))
    if directory is None:
        return _save_side(plain)
    return _load_side(plain, logical_names(open_weights(directory)))


def plain_names(model: nn.Module) -> dict[str, str]:
    """Module names of a model with adapters (those of `named_modules`) to the plain model's names."""
    prefix = "base_model.model." if hasattr(model, "get_base_model") else ""
    names = {}
    for name, _ in model.named_modules():
        plain = name.removeprefix(prefix)
        for wrapper in _WRAPPERS:
            plain = plain.replace(wrapper, "")
        names[name] = plain
    return names


def _unwrapped(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _meta_copy(model: Any) -> Any:
    """The same architecture without weights, adapters or quantization."""
    import copy

    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return type(model)(config)


def _persistent(model: nn.Module) -> list[str]:
    """Names in the state dict, a tied tensor only once."""
    seen: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        seen.setdefault(id(tensor), name)
    return list(seen.values())


def _save_side(plain: Any) -> dict[str, str]:
    loading = require("transformers.core_model_loading", "train")
    marks = {name: torch.tensor(float(at)) for at, name in enumerate(_persistent(plain))}
    names = list(marks)
    saved = loading.revert_weight_conversion(plain, marks)
    result = {names[int(mark.item())]: name for name, mark in saved.items()}
    _require_one_to_one(names, result)
    return {name: result[name] for name in names}


def _load_side(plain: Any, files: Iterable[str]) -> dict[str, str]:
    loading = require("transformers.core_model_loading", "train")
    mapping = require("transformers.conversion_mapping", "train")
    transforms = mapping.get_model_conversion_mapping(plain)
    renamings = [item for item in transforms if isinstance(item, loading.WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, loading.WeightConverter)]
    state = plain.state_dict()
    result: dict[str, str] = {}
    for stored in files:
        name, pattern = loading.rename_source_key(
            stored, renamings, converters, plain.base_model_prefix, state
        )
        if name in state and pattern is None:
            if name in result:
                raise Unsupported(
                    f"tensors {result[name]!r} and {stored!r} are both loaded as {name!r}"
                )
            result[name] = stored
    return result


def _require_one_to_one(names: Iterable[str], found: dict[str, str]) -> None:
    missing = [name for name in names if name not in found]
    if missing:
        raise Unsupported(
            f"tensor {missing[0]!r} is split or merged in this architecture's files, which is not supported"
        )
