"""The architectures qlx knows: what their heads are called, and how small ones are built.

Which are loaded at all says `qlx.checkpoint.model_config`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
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
    "heatmap_grid",
    "image_shape",
    "read_config",
    "stores_transposed",
    "task_of",
]

_PRIOR = 0.02
_TRANSPOSED: Mapping[str, tuple[str, ...]] = {"gpt2": ("c_attn", "q_attn", "c_proj", "c_fc")}


@dataclass(frozen=True)
class Labels:
    """Class names of a classifier or keypoints of a heatmap model, in order of their index."""

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
    if task == "heatmap":  # which has no automatic class
        model = transformers.VitPoseForPoseEstimation
        return SimpleNamespace(
            from_config=model._from_config, from_pretrained=model.from_pretrained
        )
    if task == "causal-lm":
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForImageClassification


def build_config(
    section: ArchitectureSection,
    *,
    labels: Labels | None = None,
    special: Mapping[str, int | None] | None = None,
    frames: int = 1,
) -> Any:
    """The transformers configuration of a model built from nothing.

    `labels` are a classifier's classes or the keypoints; `special` the ids of a language model's
    special tokens by their field name (`pad_token_id`, `eos_token_id`, `vocab_size`); `frames` how
    many images a heatmap model sees at once.

    Raises:
        Unsupported: a vision model without labels.
    """
    transformers = require("transformers", "train")
    shared = {
        "hidden_size": section.hidden_size,
        "num_hidden_layers": section.layers,
        "num_attention_heads": section.heads,
        "intermediate_size": section.intermediate_size,
    }
    if section.model_type in ("vit", "vitpose") and labels is None:
        raise Unsupported(f"a {section.model_type} needs the class names of its data")
    if section.model_type == "vitpose":
        assert labels is not None
        patch = (section.patch_size, section.patch_size)
        return vitpose_config(shared, section.image_shape, patch, labels, 3 * frames)
    if section.model_type == "vit":
        assert labels is not None
        sizes = {"image_size": section.image_size, "patch_size": section.patch_size}
        return transformers.ViTConfig(**shared, **sizes, **labels.as_config())
    return transformers.LlamaConfig(
        **shared,
        num_key_value_heads=section.kv_heads or section.heads,
        max_position_embeddings=section.max_length,
        tie_word_embeddings=False,
        **{"bos_token_id": None, "vocab_size": section.vocab_size, **(special or {})},
    )


def vitpose_config(
    shared: Mapping[str, Any],
    image: tuple[int, int],
    patch: tuple[int, int],
    labels: Labels,
    channels: int,
) -> Any:
    """A ViTPose configuration with the simple head, by the field names of a ViT's.

    `image` and `patch` are (height, width). The whole last layer's output feeds the head, which makes
    4 × 4 cells of each patch.
    """
    transformers = require("transformers", "train")
    fields = dict(shared)
    ratio = fields.pop("intermediate_size") // fields["hidden_size"]
    backbone = transformers.VitPoseBackboneConfig(
        **fields,
        mlp_ratio=ratio,
        image_size=list(image),
        patch_size=list(patch),
        num_channels=channels,
        out_indices=[fields["num_hidden_layers"]],
    )
    return transformers.VitPoseConfig(backbone_config=backbone, **labels.as_config())


def image_shape(config: Any) -> tuple[int, int, int]:
    """Channels, height and width of what a vision model takes."""
    config = getattr(config, "backbone_config", None) or config
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return config.num_channels, height, width


def heatmap_grid(config: Any) -> tuple[int, int]:
    """(height, width) in cells of the heatmaps that a ViTPose model makes.

    The simple head enlarges the grid of patches by `scale_factor`, the classic one by 4.
    """
    _, *sides = image_shape(config)
    scale = config.scale_factor if config.use_simple_decoder else 4
    patch = config.backbone_config.patch_size
    height, width = (side // cut * scale for side, cut in zip(sides, patch, strict=True))
    return height, width


def build_model(task: Task, config: Any, *, seed: int) -> "nn.Module":
    """A model with fresh fp32 weights; the same seed gives the same weights."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = auto_class(task).from_config(config, dtype=torch.float32)
    if task == "heatmap":
        quiet_head(model)
    return model


def quiet_head(model: Any) -> None:
    """Let a fresh heatmap head say of every cell that it is probably nothing (p = 0.02).

    Without that, the first steps of a training go into learning that most cells are empty (Lin et
    al. 2017, Focal Loss for Dense Object Detection, §3.3).
    """
    model.head.conv.bias.data.fill_(-math.log((1 - _PRIOR) / _PRIOR))
