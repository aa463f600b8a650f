"""The small files of a merged model: configuration, tokenizer, preprocessor, probe."""

import shutil
from collections import Counter
from pathlib import Path

from qlx.checkpoint import Checkpoint, canonical_json, load_object
from qlx.errors import CorruptCheckpoint
from qlx.merging.plan import FLOATS, MergePlan

__all__ = [
    "COMPANION_FILES",
    "carry_probe",
    "copy_companions",
    "float_name",
    "main_dtype",
    "raw_config",
    "write_config",
]

COMPANION_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""Files that a model directory may carry beside its weights, by the ecosystem's names."""


def copy_companions(target: Path, *sources: Path) -> None:
    """Copy the companions of each source to `target`; a later source wins over an earlier one."""
    for source in sources:
        for name in COMPANION_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)


def raw_config(directory: Path) -> dict[str, object]:
    """The `config.json` of a model directory as it is, to be carried over.

    Raises:
        CorruptCheckpoint: it is missing or not an object.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise CorruptCheckpoint(f"{path}: there is no model configuration")
    return load_object(path)


def write_config(
    directory: Path,
    config: dict[str, object],
    dtype: str,
    quantization: dict[str, object] | None = None,
) -> None:
    """Write `config.json` for weights of `dtype` (such as float32) and, if any, their quantization."""
    old = ("quantization_config", "torch_dtype", "dtype")
    fields = {key: value for key, value in config.items() if key not in old}
    fields["dtype"] = dtype
    if quantization is not None:
        fields["quantization_config"] = quantization
    (directory / "config.json").write_bytes(canonical_json(fields))


def main_dtype(plan: MergePlan) -> str:
    """The dtype that most parameters of the merged model have, as `config.json` calls it."""
    counts: Counter[str] = Counter()
    for name, info in plan.weights.items():
        counts[plan.dtype_of(name)] += info.count
    return float_name(counts.most_common(1)[0][0])


def float_name(dtype: str) -> str:
    """A safetensors float dtype as `config.json` and the commands call it; float32 for any other."""
    named = {short: name for name, short in FLOATS.items()}
    return named.get(dtype, "float32")


def carry_probe(checkpoint: Checkpoint, target: Path) -> None:
    """Copy the probe file of `checkpoint`, if it has one."""
    record = checkpoint.manifest.probe
    if record is not None:
        shutil.copyfile(checkpoint.path / record.file, target / record.file)
