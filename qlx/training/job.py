"""A training made ready: base resolved, data prepared, model loaded, quantized and adapted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlx.adapters import attach_adapter
from qlx.checkpoint import QuantSpec, Source, canonical_json, resolve_source
from qlx.errors import Unsupported
from qlx.models import (
    CONFIG_FILE,
    STORED_DTYPE,
    Labels,
    build_config,
    build_model,
    is_plain_vit,
    lend_layers,
    load_base,
    original_weights,
    read_config,
    stored_codes,
    tensor_names,
    torch_float,
    vitpose_from_vit,
    with_quantized_names,
)
from qlx.quant import SCALE_DTYPE
from qlx.recipe import QuantizationSection, Recipe
from qlx.training.distributed import this_process
from qlx.training.material import (
    GENERATION_FILE,
    KeypointMaterial,
    Material,
    TextMaterial,
    load_material,
    material_digest,
)
from qlx.training.progress import Reporter
from qlx.training.trainable import require_only_adapter
from qlx.training.work import OFFLOADED

__all__ = ["Job", "model_again", "new_head", "prepare", "quant_spec", "starts_from_vit"]


@dataclass
class Job:
    """Everything a training needs and what its manifest will say.

    `names` maps in-memory parameter names of the base to tensors in its files; `config` are the
    bytes of the result's `config.json`; `folder` is where a base that is offloaded to disk has its copies.
    """

    recipe: Recipe
    model: nn.Module
    material: Material
    source: Source | None
    quantization: QuantSpec
    names: dict[str, str]
    config: bytes
    folder: Path | None = None

    def release(self) -> None:
        """Let go of the model, so that its memory can be used to read back what was written."""
        self.model = nn.Identity()

    @property
    def belongs_to(self) -> str:
        """Identity of the training: the recipe, what it starts from and reads, the number of processes.

        The recipe comes first, so that it can be compared before anything is loaded.
        """
        start = "" if self.source is None else self.source.fingerprint
        read = material_digest(self.material)
        return f"{self.recipe.digest} {start} {this_process().count} {read}"


def quant_spec(section: QuantizationSection | None, stored_dtype: str) -> QuantSpec:
    """The QuantSpec of a recipe's quantization section; `stored_dtype` is the base's on loading."""
    if section is None:
        return QuantSpec(extras={STORED_DTYPE: stored_dtype})
    return QuantSpec(
        method="qlora",
        weight_bits=section.weight_bits,
        activation_bits=section.activation_bits,
        scheme=section.quant_type,
        group_size=section.values_per_scale,
        symmetric=section.symmetric,
        double_quant=section.double_quant,
        compute_dtype=section.compute_dtype,
        skip_modules=section.skip_modules,
        mode=section.mode,
        backend=section.backend,
        extras={STORED_DTYPE: stored_dtype} | _scales(section),
    )


def base_quantization(recipe: Recipe, base: Path) -> QuantSpec:
    """How the base is quantized in training: as the recipe says, or as it already is in its files.

    Raises:
        Unsupported: the recipe would quantize codes again, or train them without an adapter.
    """
    stored = stored_codes(base)
    if stored is None:
        return quant_spec(recipe.quantization, recipe.base.dtype)
    if recipe.quantization is not None or recipe.adapter is None:
        what = "leave out the section quantization" if recipe.adapter else "add the section adapter"
        raise Unsupported(
            f"{base}: its weights are {stored.method} codes already and stay as they are; {what}"
        )
    dtype = recipe.base.dtype
    return stored.spec(compute_dtype=dtype, extras={STORED_DTYPE: dtype})


def _scales(section: QuantizationSection) -> dict[str, str]:
    return {} if section.scale_dtype == "float32" else {SCALE_DTYPE: section.scale_dtype}


def prepare(recipe: Recipe, work: Path, report: Reporter) -> Job:
    """Read the data, load the base (or build one) and put the adapter in.

    Raises:
        InputRefused: the base or the data cannot be used; the message says which and why.
        CheckFailed: something other than the adapter would be trained.
    """
    source = (
        None if recipe.base.path is None else resolve_source(recipe.base.path, recipe.base.revision)
    )
    material = load_material(recipe, None if source is None else source.path, work)
    report(f"data: {material.counts[0]:,} examples to train on, {material.counts[1]:,} held out")
    if source is None:
        return _from_scratch(recipe, material)
    if recipe.base.offload != "none" and this_process().count > 1:
        raise Unsupported("base.offload is for one process; leave it out, or train without --nproc")
    return _from_base(recipe, material, source, work / OFFLOADED)


def model_again(job: Job) -> nn.Module:
    """The model of a job as it was before the first step."""
    if job.source is None:
        return _from_scratch(job.recipe, job.material).model
    return _from_base(job.recipe, job.material, job.source, job.folder or Path()).model


def _from_scratch(recipe: Recipe, material: Material) -> Job:
    section = recipe.base.from_scratch
    assert section is not None
    if not isinstance(material, TextMaterial):
        config = build_config(section, labels=material.labels, frames=recipe.data.frames)
    else:
        codec = material.codec
        special = {
            "pad_token_id": codec.pad_id,
            "eos_token_id": codec.end_id,
            "vocab_size": codec.tokenizer.get_vocab_size(),
        }
        config = build_config(section, special=special)
    model: Any = build_model(recipe.task, config, seed=recipe.training.seed)
    if isinstance(material, TextMaterial):
        material.files[GENERATION_FILE] = canonical_json(_generation(model.generation_config))
    return Job(
        recipe,
        model,
        material,
        None,
        quant_spec(None, "float32"),
        tensor_names(model),
        _config_bytes(model),
    )


def _from_base(recipe: Recipe, material: Material, source: Source, offloaded: Path) -> Job:
    if isinstance(material, KeypointMaterial) and starts_from_vit(recipe, source.path):
        return _from_plain_vit(recipe, material, source)
    labels = None if isinstance(material, TextMaterial) else material.labels
    head = None if labels is None else new_head(recipe, labels, source.path)
    quantization = base_quantization(recipe, source.path)
    model = load_base(
        source.path,
        recipe.task,
        dtype=torch_float(recipe.base.dtype),
        quant=quantization,
        new_head=head,
        folder=(folder := offloaded if recipe.base.offload == "disk" else None),
    )
    if quantization.quantized:
        quantization = with_quantized_names(model, quantization, source.path)
    names = tensor_names(model, source.path)
    config = (
        (source.path / CONFIG_FILE).read_bytes()
        if head is None and recipe.adapter
        else _config_bytes(model)
    )
    if recipe.adapter is not None:
        weights = list(model.parameters())
        new_ids = material.new_ids if isinstance(material, TextMaterial) else ()
        original = original_weights(source.path, names, torch_float(recipe.base.dtype))
        model = _adapted(model, recipe, original, new_ids)
        require_only_adapter(model, recipe.adapter)
        if recipe.base.offload != "none":
            lend_layers(model, weights)
    return Job(recipe, model, material, source, quantization, names, config, folder)


def starts_from_vit(recipe: Recipe, base: Path) -> bool:
    """Whether a heatmap model is to begin as a plain ViT.

    Raises:
        Unsupported: it would get an adapter, whose base would exist nowhere.
    """
    if recipe.task != "heatmap" or not is_plain_vit(base):
        return False
    if recipe.adapter is not None:
        raise Unsupported(
            f"{base}: a plain ViT makes no heatmaps, so an adapter for them has no base here; first train all weights "
            "from it (the same recipe without the sections adapter and quantization), then give that run as base.path"
        )
    return True


def _from_plain_vit(recipe: Recipe, material: KeypointMaterial, source: Source) -> Job:
    model = vitpose_from_vit(
        source.path, material.labels, recipe.data.frames, seed=recipe.training.seed
    )
    names, config = tensor_names(model), _config_bytes(model)
    return Job(recipe, model, material, source, quant_spec(None, "float32"), names, config)


def _adapted(
    model: nn.Module,
    recipe: Recipe,
    original: Callable[[str], torch.Tensor | None],
    new_ids: Sequence[int],
) -> nn.Module:
    assert recipe.adapter is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.training.seed)
        adapted: nn.Module = attach_adapter(
            model, recipe.adapter, task=recipe.task, original=original, new_ids=new_ids
        )
    return adapted


def _generation(config: Any) -> dict[str, Any]:
    """The fields of a generation configuration that are set."""
    return {
        key: value
        for key, value in config.to_diff_dict().items()
        if value is not None and not key.startswith("_")
    }


def new_head(recipe: Recipe, labels: Labels, base: Path) -> Labels | None:
    """The data's classes where they are not the base's own; then a new head has to be trained.

    Raises:
        Unsupported: the classes differ, and the adapter does not train the head.
    """
    config = read_config(base, recipe.task)
    known = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    names = tuple(str(known[key]) for key in sorted(known, key=int))
    if names == labels.names:
        return None
    heads = {"heatmap": ("head.conv", "head")}.get(recipe.task, ("classifier",))
    if recipe.adapter is not None and not {*heads} & {*recipe.adapter.modules_to_save}:
        raise Unsupported(
            f"the base tells {len(names)} other classes apart than the data's {len(labels.names)}; "
            f"add adapter.modules_to_save: [{heads[0]}], so that a new head is trained"
        )
    return labels


def _config_bytes(model: Any) -> bytes:
    """`config.json` of a model, without what depends on where it was loaded from."""
    fields = {
        key: value for key, value in model.config.to_dict().items() if not key.startswith("_")
    }
    fields["architectures"] = [type(model).__name__]
    fields["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    fields.pop("quantization_config", None)
    return canonical_json(fields)
