"""Directories that qlx did not write: what they are, and the command that takes them in."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlx.checkpoint import load_object, read_config
from qlx.errors import InputRefused
from qlx.weights import read_header

if TYPE_CHECKING:
    from rich.console import Console


def describe(directory: Path) -> dict[str, Any]:
    """`kind`, `what`, `advice` and details of a plain PEFT, transformers or ONNX directory.

    Raises:
        InputRefused: it is none of these.
        CorruptCheckpoint: the header of its weights does not fit them.
    """
    if (directory / "adapter_config.json").is_file():
        return _peft(directory)
    if (directory / "config.json").is_file():
        return _transformers(directory)
    if graphs := sorted(path.name for path in directory.glob("*.onnx")):
        return {
            "path": str(directory),
            "kind": "plain-onnx",
            "what": f"an ONNX directory that qlx did not export ({', '.join(graphs)})",
            "advice": "export it again from its checkpoint with `qlx export-onnx`",
        }
    raise InputRefused(
        f"{directory}: not a qlx checkpoint (no qlx.json) and neither a PEFT nor a transformers "
        "directory (no adapter_config.json, no config.json)"
    )


def _peft(directory: Path) -> dict[str, Any]:
    config = load_object(directory / "adapter_config.json")
    if (weights := directory / "adapter_model.safetensors").is_file():
        read_header(weights)
    base = config.get("base_model_name_or_path") or "BASE"
    advice = f"take it in with `qlx save-adapter {directory} -o DIR --base {base}`"
    details = ("peft_type", "task_type", "r", "lora_alpha", "use_rslora", "use_dora", "bias")
    return {
        "path": str(directory),
        "kind": "plain-peft",
        "what": "a plain PEFT adapter",
        "advice": advice,
        "base": config.get("base_model_name_or_path"),
        "adapter": {name: config[name] for name in details if name in config},
    }


def _transformers(directory: Path) -> dict[str, Any]:
    from qlx.planning import format_count, shape_from_config
    from qlx.weights import open_weights

    config = load_object(file := directory / "config.json")
    weights = open_weights(directory)
    count = sum(math.prod(info.shape) for info in weights.values())
    named = config.get("architectures") or config.get("model_type")
    architectures = ", ".join(map(str, named if isinstance(named, list) else [named]))
    advice, sizes = "use it as it is: name it as --base, or as base.path in a recipe", {}
    try:
        read_config(directory)
        shape = shape_from_config(config, str(file))
        sizes = {"layers": shape.layers, "hidden_size": shape.hidden}
    except InputRefused as error:
        advice = f"it cannot be used as a base: {error}"
    return {
        "path": str(directory),
        "kind": "plain-transformers",
        "what": f"a plain transformers model ({architectures}, {format_count(count)} parameters)",
        "advice": advice,
        "architectures": architectures,
        "parameters": count,
        "tensors": len(weights),
        "dtypes": sorted({info.dtype for info in weights.values()}),
        **sizes,
    }


def print_description(console: "Console", data: Mapping[str, Any]) -> None:
    """The description as lines."""
    console.print(f"{data['path']}: {data['what']}")
    for name, value in data.items():
        if name not in ("path", "kind", "what", "advice"):
            console.print(f"  {name.replace('_', ' ')}: {value}")
    console.print(data["advice"])
