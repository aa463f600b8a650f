"""The architectures qlx knows: what their heads are called, and how small ones are built.

Which are loaded at all says `qlx.checkpoint.model_config`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlx.checkpoint import CONFIG_FILE, KNOWN, Source, Task, read_config
from qlx.errors import Unsupported, require
from qlx.recipe import ArchitectureSection

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "CONFIG_FILE",
    "KNOWN",
    "Labels",
    "auto_class",
    "build_config",
    "build_model",
    "read_config",
    "stores_transposed",
    "task_of",
]

_TRANSPOSED: Mapping[str, tuple[str, ...]] = {"gpt2": ("c_attn", "q_attn", "c_proj", "c_fc")}


@dataclass(frozen=True)
class Labels:
    """Class names of a classifier, in order of their index."""

    names: tuple[str, ...]

    def as_config(self) -> dict[str, Any]:
        """The fields of `config.json` that carry them."""
        return {
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: at for at, name in enumerate(self.names)},
        }


def task_of(source: Source) -> Task:
    """The task of a base: the recorded one of a qlx checkpoint, else that of its architecture."""
    if source.manifest is not None:
        return source.manifest.task
    model_type = read_config(source.path)["model_type"]
    return next(task for task, types in KNOWN.items() if model_type in types)


def stores_transposed(model_type: str, module: str) -> bool:
    """Whether a linear module's weight is stored as [in, out] (transformers' `Conv1D`)."""
    return module.rpartition(".")[2] in _TRANSPOSED.get(model_type, ())


def auto_class(task: Task) -> Any:
    """The transformers class that loads models for a task."""
    transformers = require("transformers", "train")
    if task == "causal-lm":
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForImageClassification


def build_config(
    section: ArchitectureSection,
    *,
    labels: Labels | None = None,
    special: Mapping[str, int | None] | None = None,
) -> Any:
    """The transformers configuration of a model built from nothing.

    `labels` are a classifier's classes; `special` the ids of a language model's special tokens by
    their field name (`pad_token_id`, `eos_token_id`, `vocab_size`).

    Raises:
        Unsupported: a classifier without labels.
    """
    transformers = require("transformers", "train")
    shared = {
        "hidden_size": section.hidden_size,
        "num_hidden_layers": section.layers,
        "num_attention_heads": section.heads,
        "intermediate_size": section.intermediate_size,
    }
    if section.model_type == "vit":
        if labels is None:
            raise Unsupported("a vit classifier needs the class names of its data")
        sizes = {"image_size": section.image_size, "patch_size": section.patch_size}
        return transformers.ViTConfig(**shared, **sizes, **labels.as_config())
    return transformers.LlamaConfig(
        **shared,
        num_key_value_heads=section.kv_heads or section.heads,
        max_position_embeddings=section.max_length,
        tie_word_embeddings=False,
        **{"bos_token_id": None, "vocab_size": section.vocab_size, **(special or {})},
    )


def build_model(task: Task, config: Any, *, seed: int) -> "nn.Module":
    """A model with fresh fp32 weights; the same seed gives the same weights."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = auto_class(task).from_config(config, dtype=torch.float32)
    return model
