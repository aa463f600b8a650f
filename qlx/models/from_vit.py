"""A heatmap model that begins as a plain ViT: the same backbone under other names, with a new head.

Training of all weights may start so. An adapter may not: its base has to exist as files that
transformers loads, which the model made here does once it has been trained (or saved) as a run.
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qlx.errors import InputRefused, Unsupported, require
from qlx.models.architectures import (
    Labels,
    build_model,
    image_shape,
    read_config,
    vitpose_config,
)
from qlx.weights import read_tensors

__all__ = ["config_from_vit", "is_plain_vit", "vitpose_from_vit"]

_PROJECTION = "embeddings.patch_embeddings.projection.weight"
_RENAMED = {
    "mlp.fc1.": "intermediate.dense.",
    "mlp.fc2.": "output.dense.",
}


def is_plain_vit(directory: Path) -> bool:
    """Whether a directory holds a plain ViT, of any head, rather than a heatmap model."""
    return bool(read_config(directory)["model_type"] == "vit")


def vitpose_from_vit(directory: Path, labels: Labels, frames: int, *, seed: int) -> nn.Module:
    """A ViTPose model in fp32 with the backbone of a plain ViT and a fresh head, in evaluation mode.

    The files' `vit.` (or no) prefix becomes `backbone.`. The class token is left out; its position
    embedding stays, and is added to every patch, which is how ViTPose uses it. A ViT sees one image:
    for several frames the patch projection is repeated and divided by their number, so that a still
    scene gives what the image gave (inflation; Carreira and Zisserman 2017). ViTPose pads images by
    2 pixels, so that patches lie 2 pixels to the left and above; training has to make up for that.

    Raises:
        InputRefused: a tensor is missing or of another shape; the message names it.
        Unsupported: as `config_from_vit`.
    """
    model = build_model("heatmap", config_from_vit(directory, labels, frames), seed=seed)
    stored = _without_prefix(read_tensors(directory))
    state = model.state_dict()
    for name in state:
        if name.startswith("backbone."):
            state[name] = _tensor(
                name.removeprefix("backbone."), state[name], stored, frames, directory
            )
    model.load_state_dict(state)
    return model.eval()


def config_from_vit(directory: Path, labels: Labels, frames: int) -> Any:
    """The configuration of a heatmap model with the backbone of a plain ViT.

    Raises:
        Unsupported: sizes that ViTPose cannot have.
    """
    raw = read_config(directory, "image-classification")
    vit = require("transformers", "train").ViTConfig.from_dict(raw)
    channels, *image = image_shape(vit)
    patch = vit.patch_size if isinstance(vit.patch_size, list | tuple) else (vit.patch_size,) * 2
    if vit.intermediate_size % vit.hidden_size or channels != 3 or min(patch) < 5:
        raise Unsupported(
            f"{directory}/config.json: a heatmap model needs 3 channels, patches of 5 pixels or more, and an "
            "intermediate_size that is a multiple of hidden_size"
        )
    shared = {
        name: getattr(vit, name)
        for name in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "hidden_act",
            "layer_norm_eps",
            "qkv_bias",
        )
    }
    return vitpose_config(shared, (image[0], image[1]), tuple(patch), labels, 3 * frames)


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("vit."): tensor for name, tensor in tensors.items()}


def _tensor(
    name: str, like: Tensor, stored: dict[str, Tensor], frames: int, directory: Path
) -> Tensor:
    source = name
    for new, old in _RENAMED.items():
        source = source.replace(new, old)
    found = stored.get(source)
    if found is not None and name == _PROJECTION:
        found = found.float().repeat(1, frames, 1, 1) / frames
    if found is None or found.shape != like.shape:
        state = "is missing" if found is None else f"is {list(found.shape)}, not {list(like.shape)}"
        raise InputRefused(
            f"{directory}: tensor {source!r} {state}, so the backbone cannot start from this ViT"
        )
    return found.to(like.dtype)
