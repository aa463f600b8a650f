"""From a recipe to a plan: the base's shape, and the setup that the recipe's sections describe."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlx.checkpoint import load_object
from qlx.errors import InputRefused, Unsupported
from qlx.planning.families import ATTENTION, MLP
from qlx.planning.memory import Plan, plan_shape
from qlx.planning.public import PUBLIC_SHAPES
from qlx.planning.setup import Setup, WeightFormat, weight_format
from qlx.planning.shapes import Shape, roles_of, shape_from_config
from qlx.recipe import AdapterSection, Recipe
from qlx.recipe.schema import ArchitectureSection, BaseSection, QuantizationSection

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
        symmetric = method == "gptq" and bool(section.get("sym", True))
        name = f"int{section.get('bits', 4)}"
        return weight_format(name, group_size=size, symmetric=symmetric)
    return weight_format("ternary", group_size=_WHOLE) if method == "bitnet" else None


def _compressed_format(section: Mapping[str, Any]) -> WeightFormat | None:
    groups: Mapping[str, Any] = section.get("config_groups") or {}
    first: Any = next(iter(groups.values()), {})
    weights: Mapping[str, Any] = first.get("weights") or {}
    symmetric = bool(weights.get("symmetric", True))
    two = "ternary" if symmetric else "int2"
    scheme = {"2": two, "4": "int4", "8": "int8"}.get(str(weights.get("num_bits")))
    block = weights.get("block_structure") or (1, None)
    size = weights.get("group_size") or block[1] or _WHOLE
    return None if scheme is None else weight_format(scheme, group_size=size, symmetric=symmetric)


def _scratch_shape(section: ArchitectureSection) -> Shape:
    config: dict[str, object] = {
        "hidden_size": section.hidden_size,
        "num_hidden_layers": section.layers,
        "num_attention_heads": section.heads,
        "num_key_value_heads": section.kv_heads or section.heads,
        "intermediate_size": section.intermediate_size,
    }
    if section.model_type == "llama":
        config |= {"vocab_size": section.vocab_size, "tie_word_embeddings": False}
    else:
        config |= {"image_size": section.image_shape, "patch_size": section.patch_size}
    if section.model_type == "vitpose":
        config = {"backbone_config": config}
    name = f"{section.model_type} from scratch"
    return shape_from_config({"model_type": section.model_type, **config}, name)


def _kind(adapter: AdapterSection) -> str:
    if adapter.type == "vera":
        return "vera"
    if adapter.exact:
        return "fold" if adapter.folded else "exact"
    return "pissa" if adapter.initialisation == "pissa" else "lora"


def _joined(adapter: AdapterSection, dtype: str) -> bool:
    """Whether its products are added in place: of a plain LoRA whose dtype is the base's, or autocast's."""
    return _kind(adapter) in ("lora", "pissa") and not adapter.use_dora and dtype != "float16"


def _width(recipe: Recipe) -> int:
    """Bytes of a value of the base as it is loaded; what training starts from nothing or from a plain ViT is fp32."""
    base = recipe.base
    if base.from_scratch is not None:
        return 4
    made = recipe.task == "heatmap" and base_shape(base).family == "vit"
    return 4 if made else _WIDTH[base.dtype]


def _weights(recipe: Recipe) -> WeightFormat:
    """How the base's linear weights are stored while it is trained."""
    section = recipe.quantization
    if section is None:
        return _stored_format(recipe.base) or weight_format(recipe.base.dtype)
    return weight_format(
        section.quant_type,
        group_size=section.values_per_scale or _WHOLE,
        scale_bytes=_WIDTH[section.scale_dtype],
        double_quant=section.double_quant,
        symmetric=section.symmetric,
    )


def _learned_scales(adapter: AdapterSection, section: QuantizationSection | None) -> int:
    """Values that an exact adapter trains for each group: its scale and, unless a fold moves it, its zero point."""
    if not adapter.exact or not adapter.learned_scales or section is None:
        return 0
    if section.quant_type == "nf4":
        return 0
    return 1 if section.symmetric or adapter.folded else 2


def _of_adapter(recipe: Recipe) -> dict[str, Any]:
    """The fields of a setup that say what the recipe's adapter trains; rank 0 where it has none.

    Raises:
        Unsupported: a target module whose size is not known.
    """
    adapter = recipe.adapter
    if adapter is None:
        return {"rank": 0, "roles": (*ATTENTION, *MLP)}
    roles: tuple[str, ...] = (*ATTENTION, *MLP)
    if adapter.target_modules != "auto":
        roles = roles_of(adapter.target_modules)
    if not roles:
        raise Unsupported(f"recipe {recipe.name!r}: adapter.target_modules is empty")
    return {
        "rank": adapter.rank,
        "adapter": _kind(adapter),
        "roles": roles,
        "saved": adapter.modules_to_save,
        "new_tokens": len(adapter.new_tokens),
        "bias": adapter.bias,
        "rank_pattern": dict(adapter.rank_pattern),
        "dora": adapter.use_dora,
        "learned_scales": _learned_scales(adapter, recipe.quantization),
    }


def recipe_setup(recipe: Recipe, device: str = "cuda") -> Setup:
    """What the recipe's sections say about memory; reads at most the base's config.json.

    Layers return the dtype that they are given, so activations are as wide as the base's embeddings are:
    `quantization.compute_dtype` is the dtype of a weight that is made from its codes, and of nothing else.

    Raises:
        Unsupported: a target module whose size is not known.
    """
    adapter, quantization, training = recipe.adapter, recipe.quantization, recipe.training
    width = _width(recipe)
    return Setup(
        weights=_weights(recipe),
        **_of_adapter(recipe),
        tokens=recipe.data.max_length,
        batch=training.batch_size,
        checkpointing=training.gradient_checkpointing,
        optimizer=training.optimizer,
        compute_bytes=width,
        made_bytes=_WIDTH[quantization.compute_dtype] if quantization else None,
        whole_bytes=width,
        device=device,
        offloaded=recipe.base.offload == "disk" or (recipe.base.offload, device) == ("cpu", "cuda"),
        joined=adapter is None or _joined(adapter, recipe.base.dtype),
        fused_loss=recipe.task == "causal-lm",
    )
