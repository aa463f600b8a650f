"""How llama.cpp names and arranges the tensors of a language model in a GGUF file, and reading one back.

Sources: the tensor names are the `gguf` package's own map; what is done to values follows llama.cpp's
converter. Its graph of Llama (and Mistral) rotates neighbouring pairs of a head's channels where
transformers rotates its two halves, so rows of q and k are reordered; the norms of Gemma multiply by
1 + weight in transformers and by the stored weight in llama.cpp. Matrices are otherwise [out, in] as
here, and blocks run along the inputs, so quantizing before or after reordering is the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlx.errors import CorruptCheckpoint, Unsupported, require
from qlx.models.architectures import auto_class
from qlx.models.names import tensor_names

__all__ = ["GGUF_FILE", "ROPE_FACTORS", "GgufLayout", "gguf_layout", "load_gguf"]

GGUF_FILE = "model.gguf"
"""The weights of a packed checkpoint in llama.cpp's format."""

_ARCHITECTURES: Mapping[str, str] = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
_LEAF = (".weight", ".bias")

ROPE_FACTORS = "rope_freqs.weight"
"""What llama.cpp divides rotary frequencies by; of no weight of the model."""


@dataclass(frozen=True)
class GgufLayout:
    """One model's tensors in a GGUF file; `config` is transformers' configuration of it."""

    architecture: str
    config: Any

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        heads: int = self.config.num_attention_heads
        return int(getattr(self.config, "head_dim", None) or self.config.hidden_size // heads)

    @cached_property
    def _names(self) -> Any:
        gguf = require("gguf", "gguf")
        known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        return gguf.get_tensor_name_map(
            known[self.architecture], int(self.config.num_hidden_layers)
        )

    def name(self, name: str) -> str:
        """The name in the GGUF file of the tensor `name` of a transformers directory.

        Raises:
            Unsupported: llama.cpp has no place for it.
        """
        found = self._names.get_name(name, try_suffixes=_LEAF)
        if found is None:
            raise Unsupported(
                f"tensor {name!r}: llama.cpp's architecture {self.architecture!r} has no place for it"
            )
        return str(found)

    def stored(self, name: str, values: Tensor) -> Tensor:
        """The values of a tensor as the file holds them, fp32."""
        heads = self._rotated_heads(name)
        if heads:
            return _reordered(values, (heads, 2, -1))
        return values + 1 if self._counts_from_one(name) else values

    def values(self, name: str, stored: Tensor) -> Tensor:
        """The inverse of `stored`."""
        heads = self._rotated_heads(name)
        if heads:
            return _reordered(stored, (heads, -1, 2))
        return stored - 1 if self._counts_from_one(name) else stored

    def _rotated_heads(self, name: str) -> int:
        """The heads whose rows are reordered, 0 for other tensors."""
        if self.architecture != "llama":
            return 0
        module = name.rpartition(".")[0]
        if module.endswith(".q_proj"):
            return int(self.config.num_attention_heads)
        return int(self.config.num_key_value_heads) if module.endswith(".k_proj") else 0

    def _counts_from_one(self, name: str) -> bool:
        return self.architecture.startswith("gemma") and name.endswith("norm.weight")


def _reordered(rows: Tensor, cut: tuple[int, int, int]) -> Tensor:
    """Rows seen as [heads, a, b], in the order [heads, b, a]."""
    return rows.reshape(*cut, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def gguf_layout(config: Any) -> GgufLayout:
    """The layout of the model that a transformers configuration describes.

    Raises:
        Unsupported: not one of the causal language models that can be written as GGUF.
    """
    if config.model_type not in _ARCHITECTURES:
        raise Unsupported(
            f"{config.model_type!r} models cannot be written as GGUF; {', '.join(_ARCHITECTURES)} can"
        )
    return GgufLayout(_ARCHITECTURES[config.model_type], config)


def load_gguf(directory: Path, config: Any) -> nn.Module:
    """The model of a directory's `model.gguf` and its configuration, in fp32 and evaluation mode.

    Raises:
        CorruptCheckpoint: the file is not what the configuration needs.
        MissingExtra: the package gguf is not installed.
    """
    layout = gguf_layout(config)
    model: nn.Module = auto_class("causal-lm").from_config(config, dtype=torch.float32)
    targets = model.state_dict()
    found = _tensors(directory / GGUF_FILE)
    names = {layout.name(disk): (memory, disk) for memory, disk in tensor_names(model).items()}
    if names.keys() != found.keys() - {ROPE_FACTORS}:
        wrong = min(names.keys() ^ (found.keys() - {ROPE_FACTORS}))
        raise CorruptCheckpoint(
            f"{directory / GGUF_FILE}: tensor {wrong!r} is missing, or one too many"
        )
    for stored, (memory, disk) in names.items():
        values = layout.values(disk, _dequantized(found[stored]))
        if values.shape != targets[memory].shape:
            raise CorruptCheckpoint(
                f"{directory / GGUF_FILE}: tensor {stored!r} is {[*values.shape]}, the model has "
                f"{[*targets[memory].shape]} there"
            )
        targets[memory].copy_(values)
    return model.eval()


def _tensors(path: Path) -> dict[str, Any]:
    gguf = require("gguf", "gguf")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
        raise CorruptCheckpoint(f"{path}: not a GGUF file that can be read ({error})") from error
    return {tensor.name: tensor for tensor in reader.tensors}


def _dequantized(tensor: Any) -> Tensor:
    """The values of a tensor of the reader, fp32 in the order of torch."""
    gguf = require("gguf", "gguf")
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(values.reshape(*reversed(tensor.shape.tolist())).copy())
