"""Reading a PEFT adapter directory without PEFT: every tensor is understood or refused by name."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qlx.adapters.config import AdapterConfig, read_config
from qlx.adapters.formula import LoraDelta
from qlx.errors import CorruptCheckpoint, InputRefused, Mismatch, UnsafeInput, Unsupported
from qlx.weights import read_tensors

__all__ = ["WEIGHTS_FILE", "AdapterWeights", "read_adapter"]

WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_EMBEDDINGS = ("embed_tokens", "lm_head")

# Ending of a tensor's name -> the part of a module's update that it holds.
_PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.bias": "bias",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter: its configuration, an update per module, and parameters saved whole.

    `deltas` by module name and `saved` by parameter name, both as in the model in memory.
    A saved parameter replaces the base's before any delta is added to it.
    """

    config: AdapterConfig
    deltas: dict[str, LoraDelta]
    saved: dict[str, Tensor]

    @property
    def parameters(self) -> int:
        """Number of trained values in the adapter."""
        parts = [p for d in self.deltas.values() for p in (d.a, d.b, d.magnitude, d.bias)]
        return sum(p.numel() for p in (*parts, *self.saved.values()) if p is not None)

    def without_effect(self) -> list[str]:
        """Modules whose update is exactly zero (an untrained adapter: B is zero)."""
        return [
            name
            for name, delta in self.deltas.items()
            if delta.magnitude is None
            and delta.bias is None
            and not (bool(delta.a.any()) and bool(delta.b.any()))
        ]


def read_adapter(directory: Path) -> AdapterWeights:
    """Read a PEFT LoRA directory (LoRA, rsLoRA, DoRA, on linear, embedding and conv2d layers).

    Raises:
        CorruptCheckpoint: a file is missing or malformed, or a tensor's partner is missing.
        Mismatch: a tensor contradicts the configuration (rank, DoRA, biases, saved modules).
        Unsupported: a feature or a tensor that qlx does not handle, by name and with the reason.
        InputRefused: NaN or infinite values.
        UnsafeInput: weights in a pickle file.
    """
    directory = Path(directory)
    config = read_config(directory)
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        if (directory / "adapter_model.bin").exists():
            raise UnsafeInput(f"{directory}: adapter_model.bin is a pickle; save it as safetensors")
        raise CorruptCheckpoint(f"{path} is missing")
    parts: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in read_tensors(path).items():
        _check_tensor(path, key, tensor)
        name = key.removeprefix(_PREFIX)
        ending = next((e for e in _PARTS if name.endswith(e)), None)
        if ending is None:
            whole[name] = tensor
        else:
            parts.setdefault(name.removesuffix(ending), {})[_PARTS[ending]] = tensor
    if not parts and not whole:
        raise CorruptCheckpoint(f"{path} holds no tensor")
    deltas = {module: _delta(path, config, module, found) for module, found in parts.items()}
    return AdapterWeights(config, deltas, _saved(path, config, deltas, whole))


def _check_tensor(path: Path, key: str, tensor: Tensor) -> None:
    if not key.startswith(_PREFIX):
        raise Unsupported(f"{path}: tensor {key!r} is not named as PEFT names LoRA weights")
    if tensor.dtype not in _FLOATS:
        raise Unsupported(f"{path}: tensor {key!r} has dtype {tensor.dtype}, expected a float")
    if not bool(torch.isfinite(tensor).all()):
        raise InputRefused(f"{path}: tensor {key!r} holds NaN or infinite values")


def _delta(
    path: Path, config: AdapterConfig, module: str, parts: Mapping[str, Tensor]
) -> LoraDelta:
    where = f"{path}: module {module!r}"
    embedding = "embedding_a" in parts or "embedding_b" in parts
    names = ("embedding_a", "embedding_b") if embedding else ("a", "b")
    missing = [name for name in names if name not in parts]
    if missing or (embedding and {"a", "b", "bias"} & parts.keys()):
        raise CorruptCheckpoint(f"{where} does not have exactly one A and one B")
    a, b = (parts[name] for name in names)
    conv = a.dim() == 4
    if a.dim() not in (2, 4) or b.dim() != a.dim() or a.shape[0] != b.shape[1]:
        raise CorruptCheckpoint(f"{where}: A {list(a.shape)} and B {list(b.shape)} do not fit")
    if conv and tuple(b.shape[2:]) != (1, 1):
        raise Unsupported(f"{where}: B of a convolution has kernel {list(b.shape[2:])}, not 1 x 1")
    if a.shape[0] != config.rank_of(module):
        raise Mismatch(
            f"{where}: A has rank {a.shape[0]}, the configuration says {config.rank_of(module)}"
        )
    return LoraDelta(
        module=module,
        a=a,
        b=b,
        scaling=config.scaling_for(module),
        magnitude=_magnitude(where, config, parts, b.shape[0]),
        bias=_lora_bias(where, config, parts, b.shape[0]),
        kind="embedding" if embedding else "conv2d" if conv else "linear",
        fan_in_fan_out=config.fan_in_fan_out and not embedding and not conv,
    )


def _magnitude(
    where: str, config: AdapterConfig, parts: Mapping[str, Tensor], outputs: int
) -> Tensor | None:
    magnitude = parts.get("magnitude")
    if (magnitude is not None) != config.use_dora:
        raise Mismatch(f"{where}: a DoRA magnitude is {'there' if magnitude is not None else 'missing'}"
                       f" but use_dora is {config.use_dora}")  # fmt: skip
    if magnitude is not None and magnitude.numel() != outputs:
        raise CorruptCheckpoint(f"{where}: {magnitude.numel()} magnitudes for {outputs} outputs")
    return None if magnitude is None else magnitude.reshape(-1)


def _lora_bias(
    where: str, config: AdapterConfig, parts: Mapping[str, Tensor], outputs: int
) -> Tensor | None:
    bias = parts.get("bias")
    if bias is not None and (not config.lora_bias or tuple(bias.shape) != (outputs,)):
        raise Mismatch(f"{where}: the bias of B does not agree with the configuration or with B")
    if bias is None and config.lora_bias and "a" in parts:
        raise Mismatch(f"{where}: lora_bias is set, but B has no bias")
    if bias is not None and config.use_dora:
        raise Unsupported(f"{where}: DoRA together with lora_bias is not handled")
    return bias


def _saved(
    path: Path,
    config: AdapterConfig,
    deltas: Mapping[str, LoraDelta],
    whole: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Parameters stored whole, by parameter name; each must be one the configuration asks for."""
    saved = {}
    for key, tensor in whole.items():
        name = key.replace(".base_layer.", ".")
        if not _expected(config, deltas.keys(), name):
            raise Unsupported(
                f"{path}: tensor {_PREFIX + key!r} belongs to no LoRA layer, saved module or "
                "trained bias; it would be lost"
            )
        if name in saved:
            raise CorruptCheckpoint(f"{path}: parameter {name!r} is stored twice")
        saved[name] = tensor
    if config.modules_to_save and not saved:
        raise Mismatch(
            f"{path}: modules_to_save is {', '.join(config.modules_to_save)}, but none is stored"
        )
    return saved


def _expected(config: AdapterConfig, modules: Iterable[str], name: str) -> bool:
    module, _, parameter = name.rpartition(".")
    parts = module.split(".")
    owners = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    if any(owner.endswith(config.modules_to_save) for owner in owners):  # PEFT's rule, not at dots
        return True
    if parameter == "bias":
        return config.bias == "all" or (config.bias == "lora_only" and module in modules)
    return parameter == "weight" and module.rpartition(".")[2] in _EMBEDDINGS
