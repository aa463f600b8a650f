"""Putting adapters into a model with PEFT, for training and for running, and writing them out.

PEFT is imported inside: it takes seconds. Where PEFT warns or is silent (a pattern that matches
nothing, a key that is not loaded, a target that is not there) these functions refuse.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from qlx.adapters.config import CONFIG_FILE, pattern_matches
from qlx.adapters.exact import (
    Original,
    attach_exact,
    exact_layers,
    save_exact,
)
from qlx.adapters.initial import (
    doubled,
    frozen_part,
    is_frozen_part,
    start_loftq,
    start_pissa,
)
from qlx.adapters.joined import join_products
from qlx.adapters.reader import WEIGHTS_FILE, read_adapter
from qlx.adapters.vocabulary import start_rows, token_targets, widen_for
from qlx.checkpoint import AdapterSpec, canonical_json
from qlx.errors import Mismatch, Unsupported, require
from qlx.quant import head_modules, names_part, packed_modules, packed_of_module
from qlx.recipe import AdapterSection
from qlx.weights import read_tensors, write_tensors

__all__ = [
    "OWN_BIASES",
    "adapted_modules",
    "adapter_spec",
    "attach_adapter",
    "auto_targets",
    "load_adapter",
    "lora_config",
    "parameter_counts",
    "save_adapter",
]

_MISFIT = re.compile(
    r"size mismatch for (\S+): .*?torch\.Size\((\[.*?\])\).*?torch\.Size\((\[.*?\])\)"
)
_TASKS = {"causal-lm": "CAUSAL_LM", "image-classification": None, "heatmap": None, None: None}


OWN_BIASES = "own_biases"
"""Attribute of a `PeftModel` whose adapter trains biases of the base in place: their values before, by name."""


def _with_own_biases(with_adapter: Any, before: Mapping[int, torch.Tensor], bias: str) -> Any:
    """Keep the base's own biases, by identity of the parameter in `before`, where the adapter has others."""
    named = with_adapter.named_parameters() if bias != "none" else ()
    found = {name: before[id(value)] for name, value in named if id(value) in before}
    setattr(with_adapter, OWN_BIASES, found)
    return with_adapter


def _biases(model: nn.Module, bias: str) -> dict[int, torch.Tensor]:
    """Copies of a model's biases by the identity of the parameter; none where they stay as they are."""
    named = model.named_parameters() if bias != "none" else ()
    return {id(value): value.detach().clone() for name, value in named if name.endswith("bias")}


def auto_targets(model: nn.Module, modules_to_save: Iterable[str] = ()) -> tuple[str, ...]:
    """Name endings of all linear layers, heads and modules trained whole left out, sorted.

    GPT-2's layers, which store their weights transposed (`Conv1D`), are linear ones, too.

    Raises:
        Unsupported: there is none, or an ending also names a layer that is left out.
    """
    saved, heads = tuple(modules_to_save), head_modules(model)
    kinds = (nn.Linear, require("transformers.pytorch_utils", "train").Conv1D)
    linear = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    left_out = {n for n in linear if n in heads or any(names_part(n, entry) for entry in saved)}
    endings = {name.rpartition(".")[2] for name in linear if name not in left_out}
    clash = sorted(endings & {name.rpartition(".")[2] for name in left_out})
    if not endings or clash:
        what = f"{clash[0]!r} names a head, too" if clash else "the model has no linear layer"
        raise Unsupported(f"target_modules: auto does not work here: {what}; list them instead")
    return tuple(sorted(endings))


def lora_config(
    section: AdapterSection, targets: Iterable[str] | None = None, *, task: str | None = None
) -> Any:
    """The `peft.LoraConfig` of a recipe's adapter section; `targets` replaces `auto`.

    PiSSA and LoftQ begin as plain LoRA here: PEFT would change the base's weights for them.
    """
    peft = require("peft", "train")
    return peft.LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        bias=section.bias,
        use_rslora=section.use_rslora,
        use_dora=section.use_dora,
        init_lora_weights="gaussian" if section.initialisation == "gaussian" else True,
        rank_pattern=dict(section.rank_pattern),
        alpha_pattern=dict(section.alpha_pattern),
        **_common(section, targets, task),
    )


def _vera_config(section: AdapterSection, targets: Iterable[str], task: str | None) -> Any:
    """The `peft.VeraConfig` of a recipe's adapter section; the projections are stored, not drawn anew."""
    peft = require("peft", "train")
    return peft.VeraConfig(
        r=section.rank,
        vera_dropout=section.dropout,
        d_initial=section.d_initial,
        projection_prng_key=section.projection_prng_key,
        save_projection=True,
        bias="vera_only" if section.bias == "lora_only" else section.bias,
        **_common(section, targets, task),
    )


def _common(
    section: AdapterSection, targets: Iterable[str] | None, task: str | None
) -> dict[str, Any]:
    return {
        "target_modules": list(section.target_modules if targets is None else targets),
        "modules_to_save": list(section.modules_to_save) or None,
        "task_type": _TASKS[task],
    }


def attach_adapter(
    model: nn.Module,
    section: AdapterSection,
    *,
    task: str | None = None,
    original: Original | None = None,
    new_ids: Sequence[int] = (),
) -> Any:
    """A `PeftModel` around `model` (changed in place) with a fresh adapter to train; `model` itself if exact.

    `original` gives the weight of a module before it was quantized, for `loftq` and `exact`. `new_ids` are those
    of the recipe's new tokens: their rows are trained, and added where the model has none for them.

    Raises:
        Unsupported: a target, a module to save or a pattern matches nothing, two patterns give
            one module different values, or the adapter cannot begin as the section says.
    """
    automatic = section.target_modules == "auto"
    targets = auto_targets(model, section.modules_to_save) if automatic else section.target_modules
    names = [name for name, _ in model.named_modules()]
    _check_named("target_modules", targets, names)
    _check_named("modules_to_save", section.modules_to_save, names)
    _check_no_counters(model, section.modules_to_save)
    adapted = [n for n in names if any(f".{n}".endswith(f".{target}") for target in targets)]
    _check_rank(model, section, adapted)
    _check_patterns("rank_pattern", section.rank_pattern, adapted)
    _check_patterns("alpha_pattern", section.alpha_pattern, adapted)
    if section.exact:
        assert original is not None
        return attach_exact(model, section, targets, original)
    peft = require("peft", "train")
    biases = _biases(model, section.bias)
    if section.type == "vera":
        wrapped = peft.get_peft_model(model, _vera_config(section, targets, task))
        return _with_own_biases(wrapped, biases, section.bias)
    config = lora_config(section, targets, task=task)
    if new_ids:
        widen_for(model, new_ids)
        config.trainable_token_indices = token_targets(model, section, targets, new_ids)
    with_adapter = _with_own_biases(peft.get_peft_model(model, config), biases, section.bias)
    start_rows(with_adapter, new_ids)
    if section.initialisation == "pissa":
        start_pissa(with_adapter, section.svd_iterations)
    if section.initialisation == "loftq":
        assert original is not None
        start_loftq(with_adapter, lambda module: _known(original(module)))
    join_products(with_adapter)
    return with_adapter


def _known(weight: torch.Tensor | None) -> torch.Tensor:
    assert weight is not None
    return weight


def _check_named(field: str, entries: Iterable[str], names: list[str]) -> None:
    """Each entry must be the ending of a module's name, at a dot (PEFT's modules_to_save is not)."""
    for entry in entries:
        if not any(f".{name}".endswith(f".{entry}") for name in names):
            raise Unsupported(f"adapter.{field}: {entry!r} names no part of this model")
        wider = [n for n in names if n.endswith(entry) and not f".{n}".endswith(f".{entry}")]
        if wider and field == "modules_to_save":
            raise Unsupported(f"adapter.{field}: PEFT would also train {wider[0]!r} for {entry!r}")


def _check_no_counters(model: nn.Module, saved: Iterable[str]) -> None:
    """An adapter carries weights; batch normalisation would change its base's statistics and count batches."""
    for name, module in model.named_modules():
        parts = name.split(".")
        inside = [part for part in saved if f".{part}." in f".{name}."]
        if inside and isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise Unsupported(
                f"adapter.modules_to_save: {inside[0]!r} holds batch normalisation ({parts[-1]}), whose statistics an "
                "adapter cannot carry; name the layers beside it, such as head.conv"
            )


def _check_rank(model: nn.Module, section: AdapterSection, adapted: Iterable[str]) -> None:
    """A LoRA of a rank that no target has is larger than what it changes; VeRA's rank costs next to nothing."""
    sizes = {name: _full_rank(model.get_submodule(name)) for name in adapted}
    largest = max((size for size in sizes.values() if size), default=None)
    if section.type != "vera" and largest is not None and section.rank > largest:
        raise Unsupported(
            f"adapter.rank: {section.rank} is more than any target's matrix has ({largest}); give a smaller rank"
        )


def _full_rank(module: nn.Module) -> int | None:
    """Of a linear layer, also of transformers' transposed `Conv1D`; None of other modules."""
    sides = [getattr(module, name, None) for name in ("in_features", "out_features", "nx", "nf")]
    known = [side for side in sides if isinstance(side, int)]
    return min(known) if len(known) == 2 else None


def _check_patterns(field: str, patterns: Mapping[str, float], adapted: list[str]) -> None:
    """PEFT only warns of a pattern that matches nothing, and forgets the order of those that overlap."""
    for key in patterns:
        if not any(pattern_matches(key, name) for name in adapted):
            raise Unsupported(f"adapter.{field}: {key!r} matches no adapted module")
    for name in adapted:
        values = {value for key, value in patterns.items() if pattern_matches(key, name)}
        if len(values) > 1:
            raise Unsupported(f"adapter.{field}: several entries match {name!r} with other values")


def adapted_modules(peft_model: nn.Module) -> list[str]:
    """Names, in the base model, of the modules that carry an adapter."""
    if exact := exact_layers(peft_model):
        return list(exact)
    base: Any = peft_model
    named = base.get_base_model().named_modules()
    return [name for name, module in named if isinstance(module, _adapter_layers())]


def _adapter_layers() -> tuple[type, ...]:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.vera import VeraLayer

    return LoraLayer, VeraLayer


def load_adapter(model: nn.Module, directory: Path, *, trainable: bool = False) -> Any:
    """A `PeftModel` around `model` with the adapter of a directory, in eval mode unless trainable.

    The directory is read strictly first; then every tensor in it must be in the model, bit for bit,
    and every adapter layer of the model must come from it.

    Raises:
        Mismatch: a tensor found no place, a layer got no tensor, or no layer was adapted.
        InputRefused: as `read_adapter`.
    """
    peft = require("peft", "train")
    directory = Path(directory)
    adapter = read_adapter(directory)
    _require_same_shapes(model, adapter.saved, directory)
    widen_for(model, [index for rows in adapter.rows.values() for index in rows.indices])
    biases = _biases(model, adapter.config.bias)
    try:
        loaded = peft.PeftModel.from_pretrained(
            model, str(directory), is_trainable=trainable, autocast_adapter_dtype=True
        )
    except (ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise Mismatch(
            f"{directory}: the adapter does not fit this base model: {_misfit(error)}"
        ) from error
    _check_loaded(loaded, directory)
    join_products(loaded)
    return _with_own_biases(loaded, biases, adapter.config.bias).train(trainable)


def _misfit(error: Exception) -> str:
    """The tensors that do not fit, with both shapes, from what torch says; else its first line."""
    found = _MISFIT.findall(str(error))
    if not found:
        return str(error).strip().partition("\n")[0] or type(error).__name__
    name, stored, there = found[0]
    others = f" (and {len(found) - 1} more tensors)" if len(found) > 1 else ""
    return f"{name!r} is {stored} in the adapter and {there} in the model{others}"


def _require_same_shapes(
    model: nn.Module, saved: Mapping[str, torch.Tensor], directory: Path
) -> None:
    """Check that the parameters the adapter brings whole have the shapes of the base's."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for name, value in saved.items():
        if name in shapes and shapes[name] != value.shape:
            raise Mismatch(
                f"{directory}: {name!r} is {list(value.shape)} here and {list(shapes[name])} in the base: "
                "the vocabulary or head was resized before training; resize the base alike and give that one"
            )


def _check_loaded(peft_model: Any, directory: Path) -> None:
    stored = read_tensors(directory / WEIGHTS_FILE)
    whole = {k: v for k, v in peft_model.state_dict().items() if k in stored}  # embeddings
    present = whole | _adapter_state(peft_model)
    if not adapted_modules(peft_model):
        raise Mismatch(f"{directory}: none of its targets is in this base model")
    lost, empty = sorted(stored.keys() - present.keys()), sorted(present.keys() - stored.keys())
    if lost or empty:
        what = f"{lost[0]!r} has no place in" if lost else f"nothing for {empty[0]!r} of"
        raise Mismatch(f"{directory}: {what} this base model; the adapter is for another one")
    for name, tensor in stored.items():
        if not torch.equal(tensor, present[name].to("cpu", tensor.dtype)):
            raise Mismatch(f"{directory}: tensor {name!r} was not loaded as it is stored")


def _adapter_state(peft_model: Any) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    state: dict[str, torch.Tensor] = get_peft_model_state_dict(
        peft_model, save_embedding_layers=False
    )
    return state


def _stored(peft_model: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The fields and tensors of an adapter as its files hold them; PiSSA's two halves are one there."""
    fields = _json_fields(peft_model.peft_config["default"].to_dict())
    state = _adapter_state(peft_model)
    if frozen := frozen_part(peft_model):
        fields, state = doubled(fields, state, frozen)
    return fields, {key: value.detach().cpu() for key, value in state.items()}


def save_adapter(peft_model: Any, directory: Path, *, base_name: str | None = None) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, or an exact adapter's own file.

    The same adapter gives the same bytes every time.

    `base_name` becomes `base_model_name_or_path`; an absolute path never does, nor does the name
    of a class to import. The result is read back strictly.

    Raises:
        Unsupported: the adapter uses a feature that qlx could not read again.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if exact_layers(peft_model):
        save_exact(peft_model, directory)
        return
    fields, state = _stored(peft_model)
    name = base_name if base_name is not None else fields.get("base_model_name_or_path")
    fields |= {
        "auto_mapping": None,
        "base_model_name_or_path": None if not name or os.path.isabs(name) else name,
        "inference_mode": True,
    }
    (directory / CONFIG_FILE).write_bytes(canonical_json(fields))
    write_tensors(directory / WEIGHTS_FILE, state, metadata={"format": "pt"})
    read_adapter(directory)


def _json_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's fields with sets as sorted lists and enumerations as their values."""
    plain = {}
    for key, value in fields.items():
        value = getattr(value, "value", value)
        plain[key] = sorted(value) if isinstance(value, set | frozenset) else value
    return plain


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters; a packed weight counts with the values it stands for.

    PiSSA's frozen half takes away what the trained one begins at, and is none of the model's.
    """
    trained = total = 0
    packed = {
        id(module.weight): packed_of_module(module).count for _, module in packed_modules(model)
    }
    total += sum(layer.grid.packed.count for layer in exact_layers(model).values())
    for name, parameter in model.named_parameters():
        if is_frozen_part(name):
            continue
        count = packed.get(id(parameter), parameter.numel())
        total += count
        trained += count if parameter.requires_grad else 0
    return trained, total


def _adapted_weights(peft_model: Any) -> list[str]:
    """Names of the modules whose `weight` carries an adapter, fused experts left out."""
    from peft.tuners.lora.layer import ParamWrapper

    found: dict[str, None] = {}
    for name, module in peft_model.get_base_model().named_modules():
        bare = isinstance(module, ParamWrapper) and module.parameter_name != "weight"
        if isinstance(module, _adapter_layers()) and not bare:
            found[name.replace(".base_layer", "")] = None
    return list(found)


def _tied_copies(peft_model: Any) -> list[str]:
    """Names of weights that the base does not store, because they are another one's: a tied head."""
    base = peft_model.get_base_model()
    tied = getattr(getattr(base, "config", None), "tie_word_embeddings", False)
    return list(getattr(base, "_tied_weights_keys", None) or ()) if tied else []


def adapter_spec(
    peft_model: Any,
    names: Mapping[str, str],
    *,
    initialized: Literal["gaussian", "pissa", "loftq"] | None = None,
    new_tokens: Sequence[str] = (),
) -> AdapterSpec:
    """What the manifest says about an adapter.

    `names` maps parameters of the base model in memory to tensors in the base's files
    (`qlx.models.tensor_names`); those of the adapted modules are recorded, but for fused experts,
    which have no tensor of their own (`split_experts` finds theirs).

    Raises:
        Mismatch: `names` lacks the weight of an adapted module.
    """
    modules = _adapted_weights(peft_model)
    names = {**{name: name for name in _tied_copies(peft_model)}, **names}
    missing = [module for module in modules if f"{module}.weight" not in names]
    if missing:
        raise Mismatch(f"adapted module {missing[0]!r} has no weight in the base's files")
    trained, total = parameter_counts(peft_model)
    fields, _ = _stored(peft_model)
    targets, started = fields["target_modules"], bool(frozen_part(peft_model))
    vera = fields["peft_type"] == "VERA"
    return AdapterSpec(
        type="vera" if vera else "lora",
        rank=fields["r"],
        alpha=None if vera else fields["lora_alpha"],
        dropout=fields["vera_dropout" if vera else "lora_dropout"],
        use_rslora=fields.get("use_rslora", False),
        use_dora=fields.get("use_dora", False),
        bias=fields["bias"].replace("vera", "lora"),
        targets=(targets,) if isinstance(targets, str) else tuple(sorted(targets or ())),
        tensors={module: names[f"{module}.weight"] for module in modules},
        rank_pattern=fields.get("rank_pattern", {}),
        alpha_pattern=fields.get("alpha_pattern", {}),
        modules_to_save=tuple(sorted(fields["modules_to_save"] or ())),
        trained_parameters=trained,
        total_parameters=total,
        initialized=initialized,
        trained_rank=peft_model.peft_config["default"].r if started else None,
        new_tokens=tuple(new_tokens),
    )
