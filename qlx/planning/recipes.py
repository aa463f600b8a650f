"""From a recipe to a plan: the base's shape, and the setup that the recipe's sections describe."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlx.checkpoint import load_object
from qlx.errors import InputRefused, Unsupported
from qlx.planning.memory import Plan, Setup, WeightFormat, plan_shape, weight_format
from qlx.planning.shapes import (
    ATTENTION,
    MLP,
    PUBLIC_SHAPES,
    Shape,
    roles_of,
    shape_from_config,
)
from qlx.recipe import AdapterSection, Recipe
from qlx.recipe.schema import ArchitectureSection, BaseSection

_WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}
_WHOLE = (
    4096  # values a scale serves where it serves a whole row or tensor: the cost is next to none
)


def plan_recipe(recipe: Recipe, *, device: str = "cuda") -> Plan:
    """The plan of one training; reads at most the base's config.json.

    Raises:
        InputRefused: the base is neither a directory with a config.json nor a known public model.
        Unsupported: a target module or architecture whose size is not known.
    """
    return plan_shape(base_shape(recipe.base), recipe_setup(recipe, device))


def base_shape(base: BaseSection) -> Shape:
    """The shape of a recipe's base.

    Raises:
        InputRefused: nothing local by that name, and no public model that is known here.
    """
    if base.from_scratch is not None:
        return _scratch_shape(base.from_scratch)
    name = str(base.path)
    config = Path(name) / "config.json"
    if config.is_file():
        return shape_from_config(load_object(config), name)
    public = PUBLIC_SHAPES.get(name.partition("@")[0])
    if public is None:
        raise InputRefused(
            f"{name}: no config.json there, and not among the public models whose shape is known; "
            "plan by size instead (qlx plan --params 7B)"
        )
    return public


def _stored_format(base: BaseSection) -> WeightFormat | None:
    """How a base that comes as codes is stored, from its config.json; None for plain weights."""
    config = Path(str(base.path)) / "config.json"
    section = load_object(config).get("quantization_config") if config.is_file() else None
    if not isinstance(section, dict):
        return None
    method, group = section.get("quant_method"), section.get("group_size")
    if method == "bitsandbytes" and section.get("load_in_4bit"):
        double = bool(section.get("bnb_4bit_use_double_quant"))
        return weight_format(section.get("bnb_4bit_quant_type", "fp4"), double_quant=double)
    if method == "compressed-tensors":
        return _compressed_format(section)
    if method in ("gptq", "awq"):
        size = group if isinstance(group, int) and group > 0 else _WHOLE
        return weight_format(f"int{section.get('bits', 4)}", group_size=size)
    return weight_format("ternary", group_size=_WHOLE) if method == "bitnet" else None


def _compressed_format(section: Mapping[str, Any]) -> WeightFormat | None:
    groups: Mapping[str, Any] = section.get("config_groups") or {}
    first: Any = next(iter(groups.values()), {})
    weights: Mapping[str, Any] = first.get("weights") or {}
    two = "ternary" if weights.get("symmetric", True) else "int2"
    scheme = {"2": two, "4": "int4", "8": "int8"}.get(str(weights.get("num_bits")))
    block = weights.get("block_structure") or (1, None)
    size = weights.get("group_size") or block[1] or _WHOLE
    return None if scheme is None else weight_format(scheme, group_size=size)


def _scratch_shape(section: ArchitectureSection) -> Shape:
    vision = section.model_type != "llama"
    config: dict[str, object] = {
        "hidden_size": section.hidden_size,
        "num_hidden_layers": section.layers,
        "num_attention_heads": section.heads,
        "num_key_value_heads": section.kv_heads or section.heads,
        "intermediate_size": section.intermediate_size,
    }
    if vision:
        config |= {"image_size": section.image_shape, "patch_size": section.patch_size}
    else:
        config |= {"vocab_size": section.vocab_size, "tie_word_embeddings": False}
    return shape_from_config(config, f"{section.model_type} from scratch")


def _kind(adapter: AdapterSection | None) -> str:
    if adapter is None or adapter.type == "vera":
        return "lora" if adapter is None else "vera"
    if adapter.exact:
        return "exact"
    return "pissa" if adapter.initialisation == "pissa" else "lora"


def recipe_setup(recipe: Recipe, device: str = "cuda") -> Setup:
    """What the recipe's sections say about memory.

    Raises:
        Unsupported: a target module whose size is not known.
    """
    adapter, quantization, training = recipe.adapter, recipe.quantization, recipe.training
    dtype = quantization.compute_dtype if quantization else recipe.base.dtype
    if quantization:
        weights = weight_format(
            quantization.quant_type,
            group_size=quantization.values_per_scale or _WHOLE,
            scale_bytes=_WIDTH[quantization.scale_dtype],
            double_quant=quantization.double_quant,
        )
    else:
        weights = _stored_format(recipe.base) or weight_format(recipe.base.dtype)
    roles: tuple[str, ...] = (*ATTENTION, *MLP)
    if adapter and adapter.target_modules != "auto":
        roles = roles_of(adapter.target_modules)
    if adapter and not roles:
        raise Unsupported(f"recipe {recipe.name!r}: adapter.target_modules is empty")
    return Setup(
        weights=weights,
        rank=adapter.rank if adapter else 0,
        adapter=_kind(adapter),
        roles=roles,
        tokens=recipe.data.max_length,
        batch=training.batch_size,
        checkpointing=training.gradient_checkpointing,
        optimizer=training.optimizer,
        compute_bytes=_WIDTH[dtype],
        device=device,
        offloaded=recipe.base.offload == "disk" or (recipe.base.offload, device) == ("cpu", "cuda"),
        joined=_kind(adapter) in ("lora", "pissa") and not (adapter and adapter.use_dora),
        fused_loss=recipe.task == "causal-lm",
    )
