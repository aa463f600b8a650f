"""Reading a PEFT adapter directory without PEFT: every tensor is understood or refused by name."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from qlx.adapters.config import AdapterConfig, read_config
from qlx.adapters.exact import ExactUpdate, read_exact
from qlx.adapters.formula import Kind, LoraDelta, TokenRows, vera_delta
from qlx.checkpoint import AdapterSpec
from qlx.errors import CorruptCheckpoint, InputRefused, Mismatch, UnsafeInput, Unsupported
from qlx.weights import read_tensors

__all__ = ["WEIGHTS_FILE", "AdapterWeights", "read_adapter", "read_recorded"]

WEIGHTS_FILE = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte")
_WRAPPER = ".base_layer"
# Targeted parameters of one module in the order in which PEFT wraps them: the last one is outermost.
_WRAPPED = ("gate_up_proj", "down_proj")

# Ending of a tensor's name -> the part of a module's update that it holds.
_PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.bias": "bias",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".token_adapter.trainable_tokens_delta": "rows",
    ".vera_lambda_d": "inner",
    ".vera_lambda_b": "outer",
}
_FACTORS = (".lora_A.weight", ".lora_B.weight")
# The two tensors that all modules of a VeRA adapter share.
_PROJECTIONS = ("base_model.vera_A", "base_model.vera_B")


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter: its configuration, an update per module, parameters saved whole, embedding rows.

    `deltas` and `rows` by module name (that of the parameter itself for fused experts), `saved` by
    parameter name, all as in the model in memory; `exact` are updates of packed weights, by module. A
    saved parameter replaces the base's before any delta is added to it.
    """

    config: AdapterConfig
    deltas: dict[str, LoraDelta]
    saved: dict[str, Tensor]
    rows: dict[str, TokenRows] = field(default_factory=dict)
    exact: dict[str, ExactUpdate] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Number of trained values in the adapter."""
        parts = [p for d in self.deltas.values() for p in (d.a, d.b, d.magnitude, d.bias)]
        whole = [*self.saved.values(), *(rows.values for rows in self.rows.values())]
        return sum(p.numel() for p in (*parts, *whole) if p is not None)

    def without_effect(self) -> list[str]:
        """Modules whose update is exactly zero (an untrained adapter: B is zero)."""
        return [name for name, delta in self.deltas.items() if delta.empty]


def read_recorded(directory: Path, spec: AdapterSpec) -> AdapterWeights:
    """Read the adapter of a checkpoint: a PEFT directory, or a packed-exact adapter, whose record says the rest.

    Raises:
        As `read_adapter` and `read_exact`.
    """
    if spec.type != "exact":
        return read_adapter(directory)
    found = read_exact(directory, spec)
    config = AdapterConfig(rank=spec.rank or 0, alpha=spec.alpha or 0.0)
    return AdapterWeights(config, {}, found.saved, exact=found.updates)


def read_adapter(directory: Path) -> AdapterWeights:
    """Read a PEFT directory: LoRA, rsLoRA, DoRA or VeRA, parameters saved whole, single trained tokens.

    The layers may be linear, embeddings or 2-d convolutions, bare parameters or fused experts; VeRA's are
    linear.

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
    tensors = read_tensors(path)
    shared = _projections(path, config, tensors) if config.kind == "vera" else None
    for key, tensor in tensors.items():
        _check_tensor(path, key, tensor)
        tensor = tensor.float() if tensor.dtype == torch.int8 else tensor
        name = key.removeprefix(_PREFIX)
        ending = next((e for e in _PARTS if name.endswith(e)), None)
        if ending is None:
            whole[name] = tensor
        else:
            parts.setdefault(name.removesuffix(ending), {})[_PARTS[ending]] = tensor
    if not parts and not whole:
        raise CorruptCheckpoint(f"{path} holds no tensor")
    rowed = [module for module, found in parts.items() if "rows" in found]
    rows = {module: _rows(path, config, module, parts.pop(module)) for module in rowed}
    updates = [
        _delta(path, config, module, found)
        if shared is None
        else _vera(path, config, module, found, shared)
        for module, found in parts.items()
    ]
    deltas = {delta.module: delta for delta in updates}
    if len(deltas) != len(updates):
        raise CorruptCheckpoint(f"{path}: two updates are for the same module or parameter")
    for field_name, wanted, there in (
        ("trainable_token_indices", config.token_indices, rows),
        ("target_parameters", config.target_parameters, _of_parameters(deltas)),
    ):
        if wanted and not there:
            raise Mismatch(f"{path}: {field_name} is {', '.join(wanted)!r}, but none is stored")
    return AdapterWeights(config, deltas, _saved(path, config, deltas, whole), rows)


def _of_parameters(deltas: Mapping[str, LoraDelta]) -> list[str]:
    return [name for name, delta in deltas.items() if delta.kind in ("parameter", "experts")]


def _check_tensor(path: Path, key: str, tensor: Tensor) -> None:
    if not key.startswith(_PREFIX):
        raise Unsupported(f"{path}: tensor {key!r} is not named as PEFT names LoRA weights")
    factor = tensor.dtype == torch.int8 and key.endswith(_FACTORS)  # see `compact`
    if tensor.dtype not in _FLOATS and not factor:
        raise Unsupported(f"{path}: tensor {key!r} has dtype {tensor.dtype}, expected a float")
    if not bool(torch.isfinite(tensor).all()):
        raise InputRefused(f"{path}: tensor {key!r} holds NaN or infinite values")


def _projections(
    path: Path, config: AdapterConfig, tensors: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """A [r, widest in] and B [widest out, r] of a VeRA adapter, taken out of its tensors."""
    missing = [name for name in _PROJECTIONS if name not in tensors]
    if missing:
        raise CorruptCheckpoint(f"{path}: tensor {missing[0]!r} is missing")
    a, b = (tensors.pop(name) for name in _PROJECTIONS)
    for name, tensor, rank in zip(_PROJECTIONS, (a, b), (a.shape[:1], b.shape[1:]), strict=True):
        _check_tensor(path, name.replace("base_model.", _PREFIX), tensor)
        if tensor.dim() != 2 or rank != (config.rank,):
            raise Mismatch(
                f"{path}: {name!r} is {list(tensor.shape)}, the configuration says rank {config.rank}"
            )
    return a, b


def _vera(
    path: Path,
    config: AdapterConfig,
    module: str,
    parts: Mapping[str, Tensor],
    shared: tuple[Tensor, Tensor],
) -> LoraDelta:
    where = f"{path}: module {module!r}"
    if set(parts) != {"inner", "outer"}:
        raise CorruptCheckpoint(f"{where} does not have exactly the two vectors of VeRA")
    inner, outer = parts["inner"], parts["outer"]
    if inner.shape != (config.rank,) or outer.dim() != 1 or len(outer) > len(shared[1]):
        raise Mismatch(
            f"{where}: vectors {list(inner.shape)} and {list(outer.shape)} do not fit the projections of rank "
            f"{config.rank} and {len(shared[1])} outputs"
        )
    return vera_delta(module, *shared, inner, outer, fan_in_fan_out=config.fan_in_fan_out)


def _rows(path: Path, config: AdapterConfig, module: str, parts: Mapping[str, Tensor]) -> TokenRows:
    where, values, indices = f"{path}: module {module!r}", parts["rows"], config.tokens_of(module)
    if len(parts) > 1:
        raise Unsupported(
            f"{where}: single trained tokens and LoRA on one embedding are not handled"
        )
    if indices is None or values.dim() != 2 or values.shape[0] != len(indices):
        named = "no tokens" if indices is None else f"{len(indices)} tokens"
        raise Mismatch(
            f"{where}: {list(values.shape)} trained rows, trainable_token_indices names {named}"
        )
    return TokenRows(module, indices, values)


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
    module, parameter = _target(where, config, module)
    full = module if parameter is None else f"{module}.{parameter}"  # patterns match this
    fused = parameter not in (None, "weight")
    experts = _experts(where, config, full, a) if fused else 1
    if a.shape[0] != config.rank_of(full) * experts:
        raise Mismatch(
            f"{where}: A has rank {a.shape[0]}, the configuration says {config.rank_of(full)}"
        )
    kind: Kind = "embedding" if embedding else "conv2d" if conv else "linear"
    if parameter is not None:
        kind = "experts" if fused else "parameter"
    return LoraDelta(
        module=full if fused else module,
        a=a,
        b=b,
        scaling=config.scaling_for(full),
        magnitude=_magnitude(where, config, parts, b.shape[0]),
        bias=_lora_bias(where, config, parts, b.shape[0]),
        kind=kind,
        fan_in_fan_out=config.fan_in_fan_out and kind == "linear",
        experts=experts,
    )


def _target(where: str, config: AdapterConfig, module: str) -> tuple[str, str | None]:
    """The module of an update, and the parameter of it that is meant if it is not the module itself.

    PEFT wraps a module once for each of its targeted parameters; the inner ones lie under
    `base_layer`.
    """
    depth, owner = module.count(_WRAPPER), module.replace(_WRAPPER, "")
    parameters = config.parameters_of(owner)
    if not parameters and depth == 0:
        return owner, None
    ordered = [name for name in _WRAPPED if name in parameters]
    if len(parameters) == 1 and depth == 0:
        return owner, parameters[0]
    if sorted(ordered) != sorted(parameters) or depth >= len(ordered):
        raise Unsupported(
            f"{where}: which of the target_parameters it belongs to ({', '.join(parameters) or 'none'}) is not known"
        )
    return owner, ordered[len(ordered) - 1 - depth]


def _experts(where: str, config: AdapterConfig, name: str, a: Tensor) -> int:
    """How many experts share a fused parameter, from the rows of A."""
    count, rest = divmod(a.shape[0], config.rank_of(name))
    if rest or a.dim() != 2:
        raise Mismatch(
            f"{where}: A {list(a.shape)} is not of rank {config.rank_of(name)} for each expert"
        )
    return count


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
