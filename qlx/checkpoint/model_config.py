"""`config.json` of a model directory: which architectures are loaded, and what it may not say.

It is data. It may choose among the classes of transformers listed here; it may not name code,
attention kernels or remote files. Read here before any library interprets it, without importing one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlx.checkpoint.manifest import Task
from qlx.checkpoint.strict_json import load_object
from qlx.errors import InputRefused, UnsafeInput, Unsupported

__all__ = ["CONFIG_FILE", "KNOWN", "read_config"]

CONFIG_FILE = "config.json"

KNOWN: Mapping[Task, tuple[str, ...]] = {
    "image-classification": ("vit", "deit", "dinov2"),
    "heatmap": ("vitpose",),
    "causal-lm": (
        "llama",
        "qwen2",
        "qwen3",
        "mistral",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "opt",
        "phi3",
        "mixtral",
        "qwen3_moe",
        "bitnet",
    ),
}
"""Model types that are loaded, by task."""

_HARMLESS = frozenset(
    (
        "_name_or_path",
        "_commit_hash",
        "_attn_implementation_autoset",
        "_load_in_4bit",  # bitsandbytes' own, beside the public fields of the same names
        "_load_in_8bit",
        "_remove_final_layer_norm",  # a switch of OPT, as transformers saves it
        "_sliding_window_pattern",  # a number of Gemma 3, likewise
    )
)
_NAMES_CODE = frozenset(
    ("auto_map", "attn_implementation", "trust_remote_code", "custom_pipelines", "custom_generate")
)


def read_config(directory: Path, task: Task | None = None) -> dict[str, Any]:
    """`config.json` of a model directory, checked before any library interprets it.

    Raises:
        InputRefused: there is none.
        CorruptCheckpoint: not a configuration.
        UnsafeInput: it names code (`auto_map`, an attention kernel, unknown private fields).
        Unsupported: an architecture that is not known, or not for `task`.
    """
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise InputRefused(
            f"{path}: missing; a model directory holds config.json and safetensors weights"
        )
    config = load_object(path)
    _refuse_code(config, path)
    model_type = config.get("model_type")
    wanted = KNOWN[task] if task else [name for names in KNOWN.values() for name in names]
    if model_type not in wanted:
        what = f"for task {task}" if task else "at all"
        raise Unsupported(
            f"{path}: model_type {model_type!r} is not supported {what}; known: {', '.join(wanted)}"
        )
    if model_type == "vitpose":
        _check_backbone(config, path)
    return config


def _check_backbone(config: Mapping[str, Any], path: Path) -> None:
    """A ViTPose model names its backbone, which could be any; only its own kind, with one expert, is run."""
    backbone = config.get("backbone_config")
    found = backbone.get("model_type", "vitpose_backbone") if isinstance(backbone, dict) else None
    foreign = [name for name in ("backbone", "use_timm_backbone") if config.get(name)]
    if found != "vitpose_backbone" or foreign:
        what = foreign[0] if foreign else "backbone_config.model_type"
        raise Unsupported(f"{path}: {what}: the backbone must be a vitpose_backbone described here")
    assert isinstance(backbone, dict)
    experts = backbone.get("num_experts", 1)
    if experts != 1:
        raise Unsupported(
            f"{path}: backbone_config.num_experts is {experts}; ViTPose++ with several experts is not supported, "
            "take a checkpoint with one"
        )


def _refuse_code(value: Any, path: Path) -> None:
    if isinstance(value, list):
        for item in value:
            _refuse_code(item, path)
    if not isinstance(value, dict):
        return
    for key, inner in value.items():
        if key in _NAMES_CODE or (key.startswith("_") and key not in _HARMLESS):
            raise UnsafeInput(
                f"{path}: field {key!r} can name code to run; qlx loads known architectures only, remove it"
            )
        _refuse_code(inner, path)
