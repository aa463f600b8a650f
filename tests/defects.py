"""Checkpoints with one numeric defect each: everything that a conversion is known to get wrong.

A defect is written into the weights of a copy, which is sealed again, so that digests are in order
and only what the model computes is wrong. Each has a name and one line of text; docs/verify.md
lists them all.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qlx.checkpoint import QuantSpec, open_checkpoint, read_manifest, seal
from qlx.merging import merge
from qlx.packing import pack
from qlx.quant import dequantize_tensor, packed_entries, packed_from_entries, quantize_tensor
from qlx.weights import read_tensors, write_tensors
from tests.adapter_support import NF4, Case, make_adapter, make_base

ADAPTER, MODEL = "adapter_model.safetensors", "model.safetensors"

DRAWN = {"vit": {"modules_to_save": ("classifier",)}, "llama": {}}
"""Families with drawn adapters, and the options of those; the first has a saved head."""

TRAINED = {
    "vit-nf4": ("vit", "digits_base", "digits_run"),
    "vitpose-nf4": ("vitpose", "tennis_base", "tennis_run"),
    "llama-nf4": ("llama", "python_base", "python_run"),
    "vit-fp4": ("vit", "digits_base", "digits_run_fp4"),
    "llama-fp4": ("llama", "python_base", "python_run_fp4"),
}
"""Families of really trained adapters: architecture, and the fixtures of base and run."""


ENDINGS = {
    "vit": {},
    "llama": {"fc1": "up_proj"},
    "vitpose": {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output.dense"},
}
"""What the projections are called, where it is not q_proj, k_proj, v_proj, o_proj and fc1."""

VISION = {
    "vit": ("vit.embeddings", "classifier.weight"),
    "vitpose": ("backbone.embeddings", "head.conv.weight"),
}
"""Names of the embeddings and of the head of models that see pictures."""


class Family:
    """A base and everything made from it; `copy` gives a directory of one kind to spoil."""

    def __init__(self, root: Path, kind: str, base: Path, adapter: Path) -> None:
        self.kind, self.root, self.base = kind, root, base
        self.other_base = make_base(root / "other_base", kind, seed=9)
        shutil.copytree(adapter, root / "adapter")
        self.adapter = open_checkpoint(root / "adapter")
        self.merged = merge(self.base, [self.adapter.path], root / "merged")
        merge(self.base, [self.adapter.path], root / "merged16", dtype="bfloat16")
        pack(self.merged.path, root / "packed", to="nf4", min_retention=0.5)
        self.names = self.adapter.manifest.adapter.tensors
        self.deltas = read_tensors(self.adapter.path / ADAPTER)
        stored = read_tensors(self.base)
        spec = self.adapter.manifest.quantization
        self.before = {
            name: dequantize_tensor(quantize_tensor(stored[name], spec), torch.float32)
            for name in spec.tensors
        }
        self.stored, self.spec = stored, spec

    def copy(self, kind: str, target: Path) -> Path:
        return shutil.copytree(self.root / kind, target / kind)

    def weight(self, leaf: str, layer: int = 0) -> str:
        return self.names[self.module(leaf, layer)]

    def pair(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, in] and B [out, r] of an adapted module."""
        found = (self.deltas[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
        return tuple(found)

    @property
    def scaling(self) -> float:
        """Alpha / r."""
        spec = self.adapter.manifest.adapter
        return spec.alpha / spec.rank

    def module(self, leaf: str, layer: int = 0) -> str:
        """The adapted module with that ending, which is a ViT's; other models have their own."""
        ending = ENDINGS[self.kind].get(leaf, leaf)
        return next(m for m in self.names if _in_layer(m, layer) and m.endswith(ending))

    def layer(self, number: int) -> list[str]:
        """Weights that are adapted in one layer, in an order that is the same in each."""
        return sorted(name for module, name in self.names.items() if _in_layer(module, number))


def _in_layer(module: str, number: int) -> bool:
    return f"layers.{number}." in module or f"layer.{number}." in module


def family_of(request: Any, root: Path, name: str) -> Family:
    """The family of that name, from the session's trained runs or drawn here."""
    if name in TRAINED:
        kind, *fixtures = TRAINED[name]
        base, run = (request.getfixturevalue(fixture) for fixture in fixtures)
        return Family(root, kind, base, run)
    base = make_base(root / "base", name)
    made = make_adapter(base, root / "made", Case(name, NF4, options=DRAWN[name]))
    return Family(root, name, base, made.path)


def spoil(path: Path, change) -> Path:
    """Apply `change` to the tensors of a checkpoint's weight file and seal it again."""
    file = path / (ADAPTER if (path / ADAPTER).exists() else MODEL)
    tensors = read_tensors(file)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    assert any(not torch.equal(tensors[name], before[name]) for name in before), "no defect"
    write_tensors(file, tensors)
    manifest, _ = read_manifest(path)
    seal(path, manifest)
    open_checkpoint(path)
    return path


@dataclass(frozen=True)
class Defect:
    """One thing that goes wrong: what, in words, and how to do it to tensors."""

    name: str
    text: str
    change: Callable[[Family, dict[str, torch.Tensor]], None]
    kinds: tuple[str, ...] = tuple(ENDINGS)


Change = Callable[[Family, dict[str, torch.Tensor]], None]
MERGED: list[Defect] = []
IN_ADAPTER: list[Defect] = []
PACKED: list[Defect] = []


def _defect(found: list[Defect], text: str, *kinds: str) -> Callable[[Change], Change]:
    def add(change: Change) -> Change:
        name = change.__name__.strip("_").replace("_", " ")
        found.append(Defect(name, text, change, kinds or tuple(ENDINGS)))
        return change

    return add


def _delta(family, w, name):
    return w[name] - family.before[name]


# --- Merged weights: the delta


@_defect(MERGED, "one delta subtracted instead of added")
def _sign(family, w):
    name = family.weight("q_proj")
    w[name] = family.before[name] - _delta(family, w, name)


@_defect(MERGED, "every delta added twice")
def _scaling_doubled(family, w):
    for name in family.names.values():
        w[name] = w[name] + _delta(family, w, name)


@_defect(MERGED, "one delta added twice, as when its alpha_pattern is ignored")
def _one_scaling_doubled(family, w):
    name = family.weight("fc1")
    w[name] = w[name] + _delta(family, w, name)


@_defect(MERGED, "every scaling 0.1 % too large")
def _scaling_off_by_a_thousandth(family, w):
    for name in family.names.values():
        w[name] = w[name] + 0.001 * _delta(family, w, name)


@_defect(MERGED, "alpha / √r in place of alpha / r")
def _root_scaling(family, w):
    root = family.adapter.manifest.adapter.rank**0.5
    for name in family.names.values():
        w[name] = family.before[name] + root * _delta(family, w, name)


@_defect(MERGED, "alpha left out: B·A added as it is")
def _scaling_left_out(family, w):
    for name in family.names.values():
        w[name] = family.before[name] + _delta(family, w, name) / family.scaling


@_defect(MERGED, "the delta of a square weight transposed")
def _delta_transposed(family, w):
    name = family.weight("q_proj")
    w[name] = family.before[name] + _delta(family, w, name).T


@_defect(MERGED, "A read as if stored [in, r]")
def _a_read_across(family, w):
    module = family.module("q_proj")
    a, b = family.pair(module)
    across = a.reshape(a.shape[1], a.shape[0]).T
    name = family.names[module]
    w[name] = family.before[name] + family.scaling * (b @ across)


@_defect(MERGED, "the last rank component left out, as when rank_pattern is ignored")
def _rank_cut(family, w):
    module = family.module("v_proj")
    a, b = family.pair(module)
    w[family.names[module]] -= family.scaling * (b[:, -1:] @ a[-1:])


@_defect(MERGED, "A of one module with B of another")
def _mixed_pair(family, w):
    (a, _), (_, b) = (family.pair(family.module("q_proj", layer)) for layer in (0, 1))
    name = family.weight("q_proj")
    w[name] = family.before[name] + family.scaling * (b @ a)


@_defect(MERGED, "one delta left out")
def _one_delta_dropped(family, w):
    name = family.weight("o_proj", 1)
    w[name] = family.before[name].clone()


@_defect(MERGED, "the last layer's deltas left out")
def _layer_without_deltas(family, w):
    for name in family.layer(1):
        w[name] = family.before[name].clone()


@_defect(MERGED, "the deltas of two layers exchanged")
def _deltas_of_layers_exchanged(family, w):
    for first, second in zip(family.layer(0), family.layer(1), strict=True):
        one, two = _delta(family, w, first), _delta(family, w, second)
        w[first], w[second] = family.before[first] + two, family.before[second] + one


@_defect(MERGED, "the first layer's deltas in the second as well")
def _deltas_of_a_layer_repeated(family, w):
    for first, second in zip(family.layer(0), family.layer(1), strict=True):
        w[second] = family.before[second] + _delta(family, w, first)


# --- Merged weights: places


@_defect(MERGED, "one weight of two layers exchanged")
def _weights_exchanged(family, w):
    first, second = family.weight("q_proj", 0), family.weight("q_proj", 1)
    w[first], w[second] = w[second], w[first]


@_defect(MERGED, "two whole layers exchanged")
def _layers_exchanged(family, w):
    for first, second in zip(family.layer(0), family.layer(1), strict=True):
        w[first], w[second] = w[second], w[first]


@_defect(MERGED, "one weight of a layer in the next one as well")
def _weight_duplicated(family, w):
    w[family.weight("v_proj", 1)] = w[family.weight("v_proj", 0)].clone()


@_defect(MERGED, "a whole layer in the next one's place as well")
def _layer_duplicated(family, w):
    for first, second in zip(family.layer(0), family.layer(1), strict=True):
        w[second] = w[first].clone()


@_defect(MERGED, "query and key exchanged (as far as the smaller goes)")
def _query_and_key_exchanged(family, w):
    query, key = w[family.weight("q_proj")], w[family.weight("k_proj")]
    rows = min(len(query), len(key))
    saved = query[:rows].clone()
    query[:rows], key[:rows] = key[:rows], saved


@_defect(MERGED, "query and output projection exchanged")
def _projections_exchanged(family, w):
    first, second = family.weight("q_proj"), family.weight("o_proj")
    w[first], w[second] = w[second], w[first]


@_defect(MERGED, "rows of one weight one too far")
def _rows_off_by_one(family, w):
    name = family.weight("v_proj", 1)
    w[name] = w[name].roll(1, 0)


@_defect(MERGED, "one input column zero")
def _column_lost(family, w):
    w[family.weight("v_proj")][:, 3] = 0


# --- Merged weights: the base and its quantization


@_defect(MERGED, "merged onto the base before quantization")
def _original_base(family, w):
    for name in family.names.values():
        w[name] = family.stored[name] + _delta(family, w, name)


@_defect(MERGED, "one weight merged onto the base before quantization")
def _one_weight_on_the_original(family, w):
    name = family.weight("v_proj")
    w[name] = family.stored[name] + _delta(family, w, name)


@_defect(MERGED, "merged onto another model of the same shape")
def _other_base(family, w):
    other = read_tensors(family.other_base)
    for name in family.names.values():
        if other[name].shape == w[name].shape:
            w[name] = other[name] + _delta(family, w, name)


@_defect(MERGED, "the merged weights quantized once more")
def _quantized_again(family, w):
    for name in family.names.values():
        w[name] = dequantize_tensor(quantize_tensor(w[name], family.spec))


@_defect(MERGED, "quantized base values one block too far")
def _block_off_by_one(family, w):
    name = family.weight("v_proj")
    base = family.before[name]
    w[name] = _delta(family, w, name) + base.reshape(-1).roll(64).reshape(base.shape)


@_defect(MERGED, "scales one block too far")
def _scales_off_by_one(family, w):
    _replace_base(family, w, lambda packed: replace(packed, absmax=packed.absmax.roll(1)))


@_defect(MERGED, "the scale of a single block halved")
def _one_scale_halved(family, w):
    def change(packed):
        absmax = packed.absmax.clone()
        absmax[5] /= 2
        return replace(packed, absmax=absmax)

    _replace_base(family, w, change)


@_defect(MERGED, "the offset of double-quantized scales left out (plain scales: 5 % too large)")
def _offset_left_out(family, w):
    def change(packed):
        if packed.nested is None:
            return replace(packed, absmax=packed.absmax * 1.05)
        return replace(packed, absmax=packed.absmax - packed.nested.offset)

    _replace_base(family, w, change)


@_defect(MERGED, "NF4 codes read by the FP4 table, or the other way round")
def _other_code_table(family, w):
    other = {"nf4": "fp4", "fp4": "nf4"}
    _replace_base(family, w, lambda packed: replace(packed, scheme=other[packed.scheme]))


@_defect(MERGED, "the halves of each byte of codes exchanged")
def _halves_exchanged(family, w):
    def change(packed):
        return replace(packed, codes=(packed.codes << 4) | (packed.codes >> 4))

    _replace_base(family, w, change)


def _replace_base(family, w, change):
    """Dequantize one weight's base wrongly."""
    name = family.weight("v_proj")
    packed = quantize_tensor(family.stored[name], family.spec)
    wrong = dequantize_tensor(change(packed), torch.float32)
    w[name] = wrong + _delta(family, w, name)


@_defect(MERGED, "weights rounded through bfloat16 in a checkpoint recorded as fp32")
def _rounded_to_bfloat16(family, w):
    for name in family.names.values():
        w[name] = w[name].bfloat16().float()


@_defect(MERGED, "weights rounded through float16 in a checkpoint recorded as fp32")
def _rounded_to_float16(family, w):
    for name in family.names.values():
        w[name] = w[name].half().float()


# --- Merged weights: what the adapter does not touch


def _head(family):
    return VISION.get(family.kind, ("", "lm_head.weight"))[1]


@_defect(MERGED, "a trained head left as in the base (where none was trained: 10 % smaller)")
def _stale_head(family, w):
    saved = family.adapter.manifest.adapter.modules_to_save
    w[_head(family)] = family.stored[_head(family)] * (1.0 if saved else 0.9)


@_defect(
    MERGED,
    "the head's rows one too far, as when a vocabulary or label list is shifted",
    "vit",
    "llama",
)
def _head_off_by_one(family, w):
    w[_head(family)] = w[_head(family)].roll(1, 0)


@_defect(MERGED, "an untied head tied to the embedding", "llama")
def _head_tied(family, w):
    w["lm_head.weight"] = w["model.embed_tokens.weight"].clone()


@_defect(MERGED, "a bias left out", *VISION)
def _bias_dropped(family, w):
    name = family.weight("fc1").replace(".weight", ".bias")
    w[name] = torch.zeros_like(w[name])


@_defect(MERGED, "one normalization weight 1 % too large")
def _norm_touched(family, w):
    name = next(name for name in sorted(w) if "norm" in name and name.endswith("weight"))
    w[name] = w[name] * 1.01


@_defect(MERGED, "embeddings one row too far")
def _embeddings_off_by_one(family, w):
    if family.kind in VISION:
        name = f"{VISION[family.kind][0]}.position_embeddings"
        w[name] = w[name].roll(1, 1)
    else:
        w["model.embed_tokens.weight"] = w["model.embed_tokens.weight"].roll(1, 0)


@_defect(MERGED, "embeddings rounded through the base's codec, as when every matrix is")
def _embeddings_quantized(family, w):
    name = "model.embed_tokens.weight"
    if family.kind in VISION:
        name = f"{VISION[family.kind][0]}.patch_embeddings.projection.weight"
    flat = w[name].reshape(-1, 64)
    w[name] = dequantize_tensor(quantize_tensor(flat, family.spec)).reshape(w[name].shape)


@_defect(MERGED, "the sign bit of the largest value of one weight")
def _one_large_bit(family, w):
    flat = w[family.weight("v_proj")].reshape(-1)
    flat[int(flat.abs().argmax())] *= -1


@_defect(MERGED, "one NaN")
def _one_nan(family, w):
    w[family.weight("q_proj")].view(-1)[3] = float("nan")


@_defect(MERGED, "one infinity in the head")
def _one_infinity(family, w):
    w[_head(family)].view(-1)[0] = float("inf")


# --- Adapters


def _key(family, part, leaf="q_proj", layer=0):
    return f"base_model.model.{family.module(leaf, layer)}.lora_{part}.weight"


@_defect(IN_ADAPTER, "one B negated")
def _b_negated(family, w):
    w[_key(family, "B")] *= -1


@_defect(IN_ADAPTER, "one B zero")
def _b_zero(family, w):
    w[_key(family, "B", "o_proj", 1)] *= 0


@_defect(IN_ADAPTER, "one A doubled")
def _a_doubled(family, w):
    w[_key(family, "A", "v_proj")] *= 2


@_defect(IN_ADAPTER, "A and B of two layers exchanged")
def _layers_of_the_adapter_exchanged(family, w):
    for part in "AB":
        first, second = _key(family, part), _key(family, part, layer=1)
        w[first], w[second] = w[second], w[first]


@_defect(IN_ADAPTER, "the rows of one A in reverse")
def _a_reversed(family, w):
    w[_key(family, "A")] = w[_key(family, "A")].flip(0)


@_defect(IN_ADAPTER, "adapter weights rounded through bfloat16")
def _adapter_rounded(family, w):
    for name in w:
        w[name] = w[name].bfloat16().float()


CONFIGURED = {
    "alpha doubled": {"lora_alpha": 2.0},
    "alpha 0.1 % too small": {"lora_alpha": 0.999},
    "rsLoRA's scaling where it was not trained": {"use_rslora": True},
}
"""Changes of `adapter_config.json`; a number multiplies what is there."""


# --- Packed weights


@_defect(PACKED, "codes one byte too far")
def _codes_off_by_one(family, w):
    name = family.weight("q_proj")
    w[name] = w[name].roll(1, 0)


@_defect(PACKED, "the halves of each byte of packed codes exchanged")
def _packed_halves_exchanged(family, w):
    name = family.weight("q_proj")
    w[name] = (w[name] << 4) | (w[name] >> 4)


@_defect(PACKED, "scales 5 % too large")
def _scales_too_large(family, w):
    name = family.weight("v_proj")
    packed = packed_from_entries(w, name)
    spec = QuantSpec(scheme="nf4", group_size=64, double_quant=packed.nested is not None)
    w.update(packed_entries(quantize_tensor(dequantize_tensor(packed) * 1.05, spec), name))


@_defect(PACKED, "scales (or their codes) one block too far")
def _packed_scales_off_by_one(family, w):
    name = f"{family.weight('v_proj')}.absmax"
    w[name] = w[name].roll(1, 0)


@_defect(PACKED, "two packed weights exchanged")
def _packed_weights_exchanged(family, w):
    first, second = family.weight("q_proj", 0), family.weight("q_proj", 1)
    w[first], w[second] = w[second], w[first]


ROUNDED = [
    defect
    for defect in MERGED
    if defect.name
    in (
        "sign",
        "one delta dropped",
        "one scaling doubled",
        "norm touched",
        "one nan",
        "layers exchanged",
    )
]
"""Defects of a merge that is in bfloat16, found by its own recorded outputs."""


def spoil_config(path: Path, changes: dict[str, Any]) -> Path:
    """Change fields of an adapter's configuration and seal it again; numbers multiply."""
    file = path / "adapter_config.json"
    config = json.loads(file.read_text())
    for name, value in changes.items():
        config[name] = value if isinstance(value, bool) else config[name] * value
    file.write_text(json.dumps(config))
    seal(path, read_manifest(path)[0])
    return path
