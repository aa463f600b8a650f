"""`qlx train --dry-run`: everything about a recipe that can be checked without loading weights."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qlx.checkpoint import QuantSpec, Source, hub_name, resolve_source
from qlx.errors import Unsupported, require
from qlx.inputs import (
    TOKENIZER_FILE,
    ImagePreprocessor,
    ImageSplit,
    KeypointSplit,
    Loaded,
    TextCodec,
    TextSplit,
    load_split,
    with_tokens,
)
from qlx.models import (
    Labels,
    auto_class,
    build_config,
    config_from_vit,
    empty_model,
    read_config,
    stored_codes,
    tensor_names,
)
from qlx.recipe import AdapterSection, Recipe
from qlx.training.job import base_quantization, new_head, quant_spec, starts_from_vit
from qlx.training.material import frame_preprocessor, given_template, require_room
from qlx.training.progress import check_reporting
from qlx.training.tags import tag_of
from qlx.training.trainers import check_optimizer
from qlx.weights import open_weights

__all__ = ["DryRun", "check"]


@dataclass(frozen=True)
class DryRun:
    """What a dry run found out.

    `base` is the base's name, None when the model is built from nothing. `base_found` says whether
    its files are here; without them the fields about the model are None or empty, and `unchecked`
    says what could not be looked at. `adapted` and `quantized` name modules. Training and held-out
    examples are counted as images or documents, before token blocks, up to the recipe's limits.
    """

    recipe: str
    task: str
    tag: str
    base: str | None
    base_found: bool
    train_examples: int
    eval_examples: int
    adapted: tuple[str, ...]
    quantized: tuple[str, ...]
    trained_parameters: int | None
    total_parameters: int | None
    unchecked: tuple[str, ...]


@dataclass(frozen=True)
class _Findings:
    adapted: tuple[str, ...] = ()
    quantized: tuple[str, ...] = ()
    trained: int | None = None
    total: int | None = None


def check(recipe: Recipe) -> DryRun:
    """Check a recipe's data, base configuration, target and skip modules; no weight is read.

    A hub base is looked for in the local cache only.

    Raises:
        InputRefused: the data are missing, the base is not a model, or a tokenizer is missing.
        Unsupported: the architecture is not known, a module name matches nothing, or the optimizer needs a GPU.
        MissingExtra: something that the recipe asks for is not installed.
    """
    check_optimizer(recipe.training)
    check_reporting(recipe.training)
    train, held_out = load_split(recipe.data, "train"), load_split(recipe.data, "eval")
    source = _local_base(recipe)
    found = recipe.base.path is None or source is not None
    spec = quant_spec(recipe.quantization, recipe.base.dtype)
    if source is not None:
        spec = base_quantization(recipe, source.path)
    model = _Findings()
    if found:
        model = _check_model(recipe, None if source is None else source.path, train, spec)
    missing = f"base {recipe.base.path} not found locally; target modules and tokenizer not checked"
    return DryRun(
        recipe=recipe.name,
        task=recipe.task,
        tag=tag_of(recipe, recipe.base.path, spec),
        base=recipe.base.path,
        base_found=found,
        train_examples=min(len(train), recipe.data.train_limit or len(train)),
        eval_examples=min(len(held_out), recipe.data.eval_limit or len(held_out)),
        adapted=model.adapted,
        quantized=model.quantized,
        trained_parameters=model.trained,
        total_parameters=model.total,
        unchecked=() if found else (missing,),
    )


def _local_base(recipe: Recipe) -> Source | None:
    """The base, if its files are on this machine: a directory, or a hub model in the cache."""
    name = recipe.base.path
    if name is None:
        return None
    if Path(name).is_dir():
        return resolve_source(name, recipe.base.revision)
    repo, revision = hub_name(name, recipe.base.revision)
    hub = require("huggingface_hub", "train")
    cached = hub.try_to_load_from_cache(repo, "config.json", revision=revision)
    return Source(Path(cached).parent, repo, revision) if isinstance(cached, str) else None


def _check_model(recipe: Recipe, base: Path | None, train: Loaded, spec: QuantSpec) -> _Findings:
    """What becomes of the recipe's architecture, quantized as `spec` says, on a model without memory."""
    from qlx.adapters import adapted_modules, attach_adapter, parameter_counts
    from qlx.quant import eligible_modules

    model: Any = _model(recipe, base, train)
    section = recipe.quantization
    quantized: tuple[str, ...] = ()
    stored = None if base is None else stored_codes(base)
    if base is not None and stored is not None:
        names = {disk: memory for memory, disk in tensor_names(model, base).items()}
        weights = stored.weight_names(open_weights(base))
        quantized = tuple(names[name].removesuffix(".weight") for name in weights if name in names)
    elif section is not None:
        quantized = tuple(eligible_modules(model, section.skip_modules, section.values_per_scale))
    adapted: tuple[str, ...] = ()
    if recipe.adapter is not None and base is not None:
        plain = recipe.adapter.model_copy(update={"exact": False})  # on weights without values
        model = attach_adapter(
            model,
            plain,
            task=recipe.task,
            original=_unread,
            new_ids=_new_ids(recipe, base),
        )
        adapted = tuple(adapted_modules(model))
    trained, total = parameter_counts(model)
    if recipe.adapter is not None and recipe.adapter.exact:
        scales = _learned_scales(model, recipe.adapter, spec, adapted, quantized)
        trained, total = trained + scales, total + scales
    return _Findings(adapted, quantized, trained, total)


def _learned_scales(
    model: Any,
    adapter: AdapterSection,
    spec: QuantSpec,
    adapted: Iterable[str],
    quantized: Iterable[str],
) -> int:
    """How many parameters an exact adapter has more than a LoRA: scales, and zero points; a folded A is narrower.

    Raises:
        Unsupported: it would move the codes of a layer that has none.
    """
    from qlx.adapters import not_quantized

    plain = sorted(set(adapted) - set(quantized))
    if plain:
        raise Unsupported(not_quantized(plain[0]))
    if spec.scheme == "nf4":
        return 0
    group, inner = spec.group_size, model.get_base_model()
    layers = {name: inner.get_submodule(name) for name in adapted}
    shapes = {name: layer.get_base_layer().weight.shape for name, layer in layers.items()}
    whole = group is None and spec.scheme == "ternary"
    scales = sum(
        1 if whole else rows * (columns // (group or columns)) for rows, columns in shapes.values()
    )
    learned: int = scales if adapter.learned_scales else 0
    if not adapter.folded:
        return learned * (2 if spec.symmetric is False else 1)
    narrower = (
        layer.r["default"] * (columns - columns // (group or columns))
        for layer, (_, columns) in zip(layers.values(), shapes.values(), strict=True)
    )
    return learned - int(sum(narrower))


def _new_ids(recipe: Recipe, base: Path) -> tuple[int, ...]:
    tokens = recipe.adapter.new_tokens if recipe.adapter else ()
    files = {TOKENIZER_FILE: (base / TOKENIZER_FILE).read_bytes()} if tokens else {}
    return with_tokens(files, tokens)[1]


def _unread(module: str) -> torch.Tensor:
    """Models on the meta device have no values to compare a weight's with."""
    raise AssertionError(module)


def _model(recipe: Recipe, base: Path | None, train: Loaded) -> Any:
    """The recipe's architecture on torch's meta device; a base's preprocessing files are read, too."""
    labels = Labels(train.classes) if isinstance(train, ImageSplit) else None
    if isinstance(train, KeypointSplit):
        labels = Labels(train.names)
    config, frames = None, recipe.data.frames
    if base is None:
        assert recipe.base.from_scratch is not None
        if isinstance(train, TextSplit) and not recipe.training.packing:
            require_room(recipe, base, recipe.data.max_length)
        config = build_config(recipe.base.from_scratch, labels=labels, frames=frames)
    elif labels is not None and starts_from_vit(recipe, base):
        config = config_from_vit(base, labels, frames)
    if config is not None:
        with torch.device("meta"):
            return auto_class(recipe.task).from_config(config)
    assert base is not None
    read_config(base, recipe.task)
    if isinstance(train, TextSplit):
        if not recipe.training.packing:
            require_room(recipe, base, recipe.data.max_length)
        _check_template(recipe, TextCodec.from_directory(base), train)
    elif isinstance(train, KeypointSplit):
        frame_preprocessor(recipe, base)
    else:
        ImagePreprocessor.from_directory(base)
    if labels is not None:
        new_head(recipe, labels, base)
    return empty_model(base, recipe.task)


def _check_template(recipe: Recipe, codec: TextCodec, train: TextSplit) -> None:
    """Let the chat template, the recipe's or the base's, write the first example."""
    for content in given_template(recipe).values():
        codec = replace(codec, template=content.decode())
    data, only = recipe.data, recipe.training.completion_only
    codec.encode(train.examples[0], data.max_length, completion_only=only, answers=data.answers)
