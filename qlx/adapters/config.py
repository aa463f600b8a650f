"""`adapter_config.json` of a LoRA adapter as PEFT writes it, read strictly into a typed record.

Every field is used, known to be harmless, or refused by name: a feature that changes what the
adapter computes must never be ignored.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from qlx.adapters.formula import scaling_of
from qlx.checkpoint import load_json
from qlx.errors import CorruptCheckpoint, InputRefused, UnsafeInput, Unsupported
from qlx.recipe import refused_pattern

__all__ = ["CONFIG_FILE", "AdapterConfig", "pattern_matches", "read_config", "read_peft_type"]

CONFIG_FILE = "adapter_config.json"

# Fields that do not change what a trained adapter computes, or that only say how it was made.
_HARMLESS = {
    "auto_mapping", "eva_config", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config",
}  # fmt: skip

# Why a field, when it is set, keeps the adapter from being used.
_REFUSED = {
    "alora_invocation_tokens": "it is active for some tokens only, so it cannot be merged or checked",
    "arrow_config": "Arrow routes each token to other experts",
    "corda_config": "CorDA changed the base weights; convert it with PEFT's "
    "path_initial_model_for_weight_conversion first",
    "ensure_weight_tying": "adapters tied to an embedding are not handled",
    "kasa_config": "KaSA changes the base weights",
    "layer_replication": "it repeats layers of the base",
    "loftq_config": "LoftQ changed the base weights",
    "lora_ga_config": "LoRA-GA changed the base weights",
    "megatron_config": "Megatron's sharded layers are not handled",
    "monteclora_config": "its weights are random variables",
    "use_bdlora": "block-diagonal factors are not handled",
    "use_qalora": "pooled inputs (QA-LoRA) are not handled",
    "velora_config": "VeLoRA layers are not handled",
}

# Initialisations after which the base is still the original one.
_BASE_UNTOUCHED = (True, False, None, "gaussian", "eva", "orthogonal", "mica")

T = TypeVar("T", int, float)


@dataclass(frozen=True)
class AdapterConfig:
    """A LoRA or VeRA configuration. `target_modules` is a regular expression or a tuple of name endings.

    `rank_pattern` and `alpha_pattern` map a module's name, its ending, or a regular expression for
    it to another rank or alpha, in the order of the file; the first that matches counts.
    `token_indices` maps the ending of an embedding's name ("" for the input embedding, whatever it
    is called) to the rows that were trained alone. VeRA's vectors scale by themselves: alpha is the rank.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    target_modules: str | tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    token_indices: dict[str, tuple[int, ...]] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    task_type: str | None = None
    base_model: str | None = None
    kind: Literal["lora", "vera"] = "lora"

    def rank_of(self, module: str) -> int:
        """The rank that applies to a module, given its full name in the base model."""
        return _pick(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """The alpha that applies to a module, given its full name in the base model."""
        return _pick(self.alpha_pattern, module, self.alpha)

    def scaling_for(self, module: str) -> float:
        """The factor on B @ A for a module."""
        alpha, rank = self.alpha_of(module), self.rank_of(module)
        return scaling_of(alpha, rank, use_rslora=self.use_rslora)

    def parameters_of(self, module: str) -> tuple[str, ...]:
        """Names of the parameters of `module` itself that are targets, as opposed to the module.

        A target without an owner, as PEFT writes them for a mixture of experts, is the experts'.
        """
        named = (target.rpartition(".") for target in self.target_parameters)
        return tuple(
            name for owner, _, name in named if f".{module}".endswith(f".{owner or 'experts'}")
        )

    def tokens_of(self, module: str) -> tuple[int, ...] | None:
        """The rows of an embedding that were trained alone; None if the file names none for it."""
        for ending, indices in self.token_indices.items():
            if not ending or f".{module}".endswith(f".{ending}"):
                return indices
        return None


def pattern_matches(key: str, module: str) -> bool:
    """Whether a pattern key applies to a module.

    PEFT's rule: the key is a regular expression for the whole name or for its dotted ending.
    """
    return re.match(rf"(.*\.)?({key})$", module) is not None


def _pick(patterns: Mapping[str, T], module: str, default: T) -> T:
    """The value of the first matching key.

    PEFT sorts the keys when it saves, so if two match with different values, the one that was
    trained with cannot be known any more.
    """
    matches = {key: value for key, value in patterns.items() if pattern_matches(key, module)}
    if len(set(matches.values())) > 1:
        raise InputRefused(
            f"module {module!r}: the patterns {', '.join(map(repr, matches))} all match it with "
            "different values; PEFT does not keep their order, so make them exclusive"
        )
    return next(iter(matches.values()), default)


def read_config(directory: Path) -> AdapterConfig:
    """Read `adapter_config.json` of LoRA or VeRA in an adapter directory.

    Raises:
        CorruptCheckpoint: the file is missing, is not JSON, or a field has the wrong type.
        Unsupported: another PEFT method, or a feature that qlx does not handle (named, with why).
        UnsafeInput: a pattern that could make matching take for ever.
    """
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise CorruptCheckpoint(f"{path} is missing; a PEFT adapter directory has one")
    raw = load_json(path)
    if not isinstance(raw, dict):
        raise CorruptCheckpoint(f"{path}: not a JSON object")
    reader = _Reader(path, raw)
    kind = reader.take("peft_type", str, "LORA")
    if kind not in ("LORA", "VERA"):
        raise Unsupported(
            f"{path}: an adapter of type {kind}; only LORA and VERA ones are kept apart from their "
            "base, fold this one into it with `qlx merge`"
        )
    config = reader.config() if kind == "LORA" else reader.vera_config()
    reader.refuse_the_rest()
    return config


def read_peft_type(directory: Path) -> str:
    """The kind of adapter that a PEFT directory holds, by PEFT's name; LORA where it does not say.

    Raises:
        CorruptCheckpoint: `adapter_config.json` is missing, is not JSON, or the field is no name.
    """
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise CorruptCheckpoint(f"{path} is missing; a PEFT adapter directory has one")
    raw = load_json(path)
    if not isinstance(raw, dict):
        raise CorruptCheckpoint(f"{path}: not a JSON object")
    kind: str = _Reader(path, raw).take("peft_type", str, "LORA")
    return kind


class _Reader:
    """Takes typed fields out of the JSON object; what is left at the end is harmless or refused."""

    def __init__(self, path: Path, raw: dict[str, Any]) -> None:
        self.path, self.rest = path, dict(raw)

    def take(self, name: str, kind: type | tuple[type, ...], default: Any) -> Any:
        """The value of a field; absent or null means the default."""
        value = self.rest.pop(name, None)
        if value is None:
            return default
        wrong_bool = isinstance(value, bool) and kind is not bool
        if wrong_bool or not isinstance(value, kind):
            raise CorruptCheckpoint(f"{self.path}: {name} is {value!r}, which is not allowed there")
        return value

    def config(self) -> AdapterConfig:
        """The record, with every field that it holds taken."""
        self._check_initialisation()
        return AdapterConfig(
            rank=self._positive("r", self.take("r", int, 8)),
            alpha=self._positive("lora_alpha", self.take("lora_alpha", (int, float), 8)),
            dropout=self.take("lora_dropout", (int, float), 0.0),
            bias=self._one_of("bias", ("none", "all", "lora_only")),
            use_rslora=self.take("use_rslora", bool, False),
            use_dora=self.take("use_dora", bool, False),
            lora_bias=self.take("lora_bias", bool, False),
            fan_in_fan_out=self.take("fan_in_fan_out", bool, False),
            target_modules=self._names("target_modules"),
            target_parameters=self._parameters(),
            token_indices=self._tokens(),
            modules_to_save=tuple(self._names("modules_to_save")),
            rank_pattern=self._patterns("rank_pattern", int),
            alpha_pattern=self._patterns("alpha_pattern", (int, float)),
            task_type=self.take("task_type", str, None),
            base_model=self.take("base_model_name_or_path", str, None) or None,
        )

    def vera_config(self) -> AdapterConfig:
        """The same of VeRA (arXiv 2310.11454), whose projections must be stored with it."""
        for name in ("d_initial", "projection_prng_key", "init_weights"):
            self.rest.pop(name, None)  # how it began; the values are all stored
        if not self.take("save_projection", bool, True):
            raise Unsupported(
                f"{self.path}: its random projections are not stored (save_projection), and another version of torch "
                "may draw other ones; save it with them, or fold it into its base with `qlx merge`"
            )
        rank = self._positive("r", self.take("r", int, 256))
        return AdapterConfig(
            rank=rank,
            alpha=rank,
            dropout=self.take("vera_dropout", (int, float), 0.0),
            bias=self._one_of("bias", ("none", "all", "vera_only")).replace("vera", "lora"),
            fan_in_fan_out=self.take("fan_in_fan_out", bool, False),
            target_modules=self._names("target_modules"),
            modules_to_save=tuple(self._names("modules_to_save")),
            task_type=self.take("task_type", str, None),
            base_model=self.take("base_model_name_or_path", str, None) or None,
            kind="vera",
        )

    def _positive(self, name: str, value: Any) -> Any:
        if isinstance(value, bool) or not 0 < value < 1e9:
            raise CorruptCheckpoint(f"{self.path}: {name} is {value!r}, expected a number above 0")
        return value

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> str:
        value: str = self.take(name, str, allowed[0])
        if value not in allowed:
            raise Unsupported(f"{self.path}: {name} {value!r} is not one of {', '.join(allowed)}")
        return value

    def _names(self, name: str) -> Any:
        value = self.take(name, (str, list), [])
        entries = [value] if isinstance(value, str) else value
        if not all(isinstance(entry, str) for entry in entries):
            raise CorruptCheckpoint(f"{self.path}: {name} holds something that is not a name")
        return value if isinstance(value, str) else tuple(sorted(entries))

    def _parameters(self) -> tuple[str, ...]:
        found: tuple[str, ...] = tuple(self._names("target_parameters"))
        if "weight" in found:
            raise Unsupported(
                f"{self.path}: target_parameters has 'weight' without the module it belongs to"
            )
        return found

    def _tokens(self) -> dict[str, tuple[int, ...]]:
        value = self.take("trainable_token_indices", (list, dict), {})
        named = {"": value} if value and isinstance(value, list) else dict(value)
        for module, indices in named.items():
            whole = isinstance(indices, list) and all(type(i) is int and i >= 0 for i in indices)
            if not whole or not indices or len(set(indices)) != len(indices):
                raise CorruptCheckpoint(
                    f"{self.path}: trainable_token_indices[{module!r}] is {str(indices)[:60]}, expected "
                    "different token numbers"
                )
        return {module: tuple(indices) for module, indices in named.items()}

    def _patterns(self, name: str, kind: type | tuple[type, ...]) -> dict[str, Any]:
        value: dict[str, Any] = self.take(name, dict, {})
        for key, number in value.items():
            if (why := refused_pattern(key)) is not None:
                raise UnsafeInput(f"{self.path}: {name} key {key[:80]!r}: {why}")
            if isinstance(number, bool) or not isinstance(number, kind):
                raise CorruptCheckpoint(f"{self.path}: {name}[{key!r}] is {number!r}")
            self._positive(f"{name}[{key!r}]", number)
        return value

    def _check_initialisation(self) -> None:
        value = self.rest.pop("init_lora_weights", True)
        if value not in _BASE_UNTOUCHED:
            raise Unsupported(
                f"{self.path}: init_lora_weights {value!r} changed the base weights at the start; "
                "convert it with PEFT's path_initial_model_for_weight_conversion first"
            )

    def refuse_the_rest(self) -> None:
        """Raise for the first field that is set and neither harmless nor known."""
        for name, value in self.rest.items():
            if name in _HARMLESS or not value:
                continue
            why = _REFUSED.get(name, "qlx does not know what it changes")
            raise Unsupported(f"{self.path}: {name} is set: {why}")
