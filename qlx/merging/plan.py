"""What a merge will do to every tensor of the base, decided and checked before a byte is written.

A tensor that is in no `Change` is copied. Every adapter tensor ends up in exactly one change, and
every change names a tensor that fits; anything else is refused here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import torch

from qlx.adapters import (
    AdapterWeights,
    ExactUpdate,
    LoraDelta,
    TokenRows,
    delta_bias,
    delta_shape,
    disk_names,
    fitted,
    split_experts,
    widened,
)
from qlx.checkpoint import AdapterSpec, Manifest, QuantSpec
from qlx.errors import CheckFailed, Mismatch, Unsupported
from qlx.merging.change import Change
from qlx.merging.coded import CodedWeights
from qlx.merging.tied import EMBEDDINGS, HEAD, Tied, check_vocabulary, settle, tied_embedding
from qlx.models import STORED_DTYPE, stores_transposed
from qlx.weights import WeightSet, torch_dtype_name

__all__ = ["FLOATS", "NO_EFFECT", "Change", "MergePlan", "Onto", "choose_onto", "plan_merge"]

T = TypeVar("T")
Onto = Literal["as-trained", "original"]
FLOATS: Mapping[str, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""The dtypes a merge can write: names as the command takes them, to names in safetensors."""
NO_EFFECT = (
    "the adapter changes no tensor: every update in it is zero, as in one that was never trained; "
    "give another --adapter"
)
"""What is said of an adapter without any effect."""


@dataclass(frozen=True)
class MergePlan:
    """A checked merge: the base's files, the changes by tensor name, and the dtype of all floats.

    `cast` is the safetensors dtype that every float tensor is written in, None to keep each one's;
    `head_cast` is that of a language model's head where it is to have another one.
    `config` holds the fields of `config.json` that the merge changes. `untouched` names the tensors
    whose update in the adapter is exactly zero: they are in no change of the adapter's.
    """

    weights: WeightSet
    spec: QuantSpec
    onto: Onto
    changes: Mapping[str, Change]
    cast: str | None
    config: Mapping[str, object] = field(default_factory=dict)
    untouched: tuple[str, ...] = ()
    head_cast: str | None = None

    def dtype_of(self, name: str) -> str:
        """The safetensors dtype that tensor `name` is written in."""
        if name in self.changes:
            return self.changes[name].dtype
        cast = self.cast if name != HEAD else self.head_cast or self.cast
        return _cast(self.weights[name].dtype, cast)

    @property
    def in_place(self) -> bool:
        """Whether every tensor keeps its dtype and shape, so that the files can be patched."""
        return (
            not isinstance(self.weights, CodedWeights)
            and all(
                name in self.weights and self.weights[name].shape == change.shape
                for name, change in self.changes.items()
            )
            and all(self.dtype_of(name) == info.dtype for name, info in self.weights.items())
        )

    @property
    def moves_codes(self) -> bool:
        """Whether the adapter is one inside the rounding, whose result lies on the grid of training."""
        return any(change.exact is not None for change in self.changes.values())

    @property
    def exact(self) -> bool:
        """Whether the merged model computes what training saw: right base, nothing rounded."""
        return (self.onto == "as-trained" or not self.spec.quantized) and not self.rounds

    @property
    def rounds(self) -> bool:
        """Whether a tensor that the adapter changes, or the head, is written in less than 32 bits."""
        changed = any(change.dtype != "F32" for change in self.changes.values())
        return changed or self.head_cast not in (None, "F32")


def _cast(dtype: str, cast: str | None) -> str:
    return cast if cast is not None and dtype in FLOATS.values() else dtype


def choose_onto(spec: QuantSpec, asked: Onto | None, recorded: bool) -> Onto:
    """The base values to merge onto: those training saw, wherever a record says what they were.

    Raises:
        Unsupported: `as-trained` is asked for, but nothing records how the base was quantized.
    """
    if asked == "as-trained" and not recorded:
        raise Unsupported(
            "the adapter has no record of how its base was quantized, so --onto as-trained is not "
            "possible; use --onto original"
        )
    if asked is not None:
        return asked
    return "as-trained" if spec.quantized or recorded else "original"


def plan_merge(
    weights: WeightSet,
    manifest: Manifest,
    adapter: AdapterWeights,
    *,
    onto: Onto,
    dtype: str | None,
    config: Mapping[str, object],
    head_dtype: str | None = None,
    to_pack: bool = False,
) -> MergePlan:
    """Decide what happens to each tensor of the base.

    `dtype` is float32, bfloat16, float16 or None (each tensor keeps its own), `head_dtype` the same
    for the head of a language model alone; `config` is the base's `config.json`. `to_pack` says that codes are
    to be written, of which layers that round their inputs can be made again.

    Raises:
        Mismatch: a target is not in the base, has another shape, or the adapter lacks a module
            that its record lists.
        Unsupported: an update whose meaning is not known, an unknown dtype, or one for a head that
            has no tensor of its own.
        CheckFailed: every update in the adapter is zero.
    """
    cast, head_cast = _float(dtype), _float(head_dtype)
    if manifest.adapter is None:
        raise Mismatch(f"checkpoint {manifest.tag!r} holds no adapter to merge")
    if onto == "original" and manifest.adapter.initialized == "loftq":
        raise Unsupported(
            "the adapter began as what quantization took from the base (loftq), so it belongs to the quantized one; "
            "leave --onto original out"
        )
    if onto == "original" and manifest.adapter.type == "exact":
        raise Unsupported(
            "the adapter moves the codes of the quantized base, so it belongs to that; leave --onto original out"
        )
    kept = to_pack and manifest.adapter.type == "exact"
    if manifest.quantization.activation_bits is not None and not kept:
        raise Unsupported(
            "the adapter was trained on layers that round their inputs, which merged weights cannot "
            "express; keep it separate, pack it if it is exact, or train it without activation_bits"
        )
    as_trained = onto == "as-trained"
    seen = _seen_otherwise(weights, manifest.quantization) if as_trained else frozenset()
    model_type, tied = str(config.get("model_type")), _tied(weights, config)
    base = _Base(weights, manifest.adapter, model_type, tied, manifest.quantization.group_size)
    updates = _updates(base, adapter)
    if not updates.names:
        raise CheckFailed(NO_EFFECT)
    changes = {
        name: updates.change(name, base, cast if name != HEAD else head_cast or cast, as_trained)
        for name in sorted({*seen, *updates.names})
    }
    if base.tied is not None:
        changes = settle(changes, base.tied, head_stored=HEAD in weights)
    if head_cast is not None and HEAD not in {*weights, *changes}:
        raise Unsupported(
            f"there is no tensor {HEAD!r} of its own to write as {head_dtype}: the model is no language model, or "
            "its head is its input embedding; leave --head-dtype out"
        )
    fields = _config_fields(weights, changes)
    spec, untouched = manifest.quantization, updates.untouched
    return MergePlan(weights, spec, onto, changes, cast, fields, untouched, head_cast)


def _float(dtype: str | None) -> str | None:
    if dtype is not None and dtype not in FLOATS:
        raise Unsupported(f"dtype {dtype!r} is not one of {', '.join(FLOATS)}")
    return None if dtype is None else FLOATS[dtype]


@dataclass(frozen=True)
class _Base:
    """The base as an adapter's names find their way into it."""

    weights: WeightSet
    spec: AdapterSpec
    model_type: str
    tied: Tied | None
    group_size: int | None

    def stored(self, name: str) -> tuple[str, tuple[int, ...]] | None:
        """Dtype and shape of a tensor; those of the embedding for a head that has none of its own."""
        if name in self.weights:
            return self.weights[name].dtype, self.weights[name].shape
        if name == HEAD and self.tied is not None:
            return self.tied.dtype, self.tied.shape
        return None

    def name_of(self, parameter: str) -> str:
        """The tensor of a parameter that is named as in memory; a new head keeps that name."""
        module, _, leaf = parameter.rpartition(".")
        if module in self.spec.tensors:
            return f"{self.spec.tensors[module].removesuffix('.weight')}.{leaf}"
        if parameter == HEAD and self.tied is not None:
            return HEAD
        if parameter.split(".")[0] in self.spec.modules_to_save and parameter not in self.weights:
            return parameter
        return disk_names([parameter], self.weights)[parameter]


@dataclass(frozen=True)
class _Updates:
    """Everything an adapter brings, by tensor name."""

    values: Mapping[str, torch.Tensor]
    rows: Mapping[str, TokenRows]
    deltas: Mapping[str, LoraDelta]
    addends: Mapping[str, torch.Tensor]
    exact: Mapping[str, ExactUpdate]
    untouched: tuple[str, ...]

    @property
    def names(self) -> set[str]:
        return {*self.values, *self.rows, *self.deltas, *self.addends, *self.exact}

    def change(self, name: str, base: _Base, cast: str | None, as_trained: bool) -> Change:
        value, stored = self.values.get(name), base.stored(name)
        own = torch_dtype_name(_known(value).dtype) if stored is None else stored[0]
        shape = _known(stored)[1] if value is None else tuple(value.shape)
        if name in self.rows:
            shape = widened(shape, self.rows[name])
        return Change(
            name=name,
            dtype=_cast(own, cast),
            shape=shape,
            as_trained=as_trained and value is None,
            value=value,
            delta=self.deltas.get(name),
            addend=self.addends.get(name),
            rows=self.rows.get(name),
            exact=self.exact.get(name),
            copy_of=_known(base.tied).embedding
            if name not in base.weights and value is None
            else None,
        )


def _known(value: T | None) -> T:
    assert value is not None
    return value


def _tied(weights: WeightSet, config: Mapping[str, object]) -> Tied | None:
    name = tied_embedding(weights, config)
    return None if name is None else Tied(name, weights[name].dtype, weights[name].shape)


def _config_fields(weights: WeightSet, changes: Mapping[str, Change]) -> dict[str, object]:
    """What `config.json` must say of a model that came untied or got another vocabulary."""
    fields: dict[str, object] = {}
    tables = [name for name in {*weights, *changes} if name.endswith((*EMBEDDINGS, HEAD))]
    rows = {
        name: changes[name].shape[0] if name in changes else weights[name].shape[0]
        for name in tables
    }
    check_vocabulary(rows)
    if HEAD in changes and changes[HEAD].copy_of is not None:
        fields["tie_word_embeddings"] = False
    if any(name in weights and weights[name].shape[0] != count for name, count in rows.items()):
        fields["vocab_size"] = next(iter(rows.values()))
    return fields


def _updates(base: _Base, adapter: AdapterWeights) -> _Updates:
    values = _saved(base, adapter)
    rows = {base.name_of(f"{module}.weight"): found for module, found in adapter.rows.items()}
    placed = {} if adapter.exact else _deltas(base, adapter, values)
    moves = _exact(base, adapter)
    still = [name for name, delta in placed.items() if delta.empty]
    still += [name for name, update in moves.items() if update.empty]
    untouched = tuple(sorted(still))
    exact = {name: update for name, update in moves.items() if name not in untouched}
    deltas = {name: delta for name, delta in placed.items() if name not in untouched}
    both = sorted(set(rows) & {*deltas, *values})
    if both:
        raise Unsupported(
            f"{both[0]!r}: trained tokens beside another update of it are not handled"
        )
    addends = _addends(base.weights, deltas, values)
    return _Updates(values, rows, deltas, addends, exact, untouched)


def _exact(base: _Base, adapter: AdapterWeights) -> dict[str, ExactUpdate]:
    """The moves of codes, by tensor name."""
    found = {}
    for module, update in adapter.exact.items():
        name = base.spec.tensors[module]
        shape = update.shape(base.group_size)
        if name not in base.weights or base.weights[name].shape != shape:
            raise Mismatch(
                f"{base.weights.directory}: no tensor {name!r} of shape {[*shape]}, which the adapter moves codes of"
            )
        found[name] = update
    return found


def _seen_otherwise(weights: WeightSet, spec: QuantSpec) -> frozenset[str]:
    """The tensors whose values in training were not those of the base's files."""
    if spec.quantized and not spec.tensors:
        raise Mismatch(
            "the record says the base was quantized but lists no tensors; make the adapter again"
        )
    missing = [name for name in spec.tensors if name not in weights]
    if missing:
        raise Mismatch(
            f"{weights.directory}: the tensor {missing[0]!r}, quantized in training, is missing"
        )
    stored = FLOATS[str(spec.extras.get(STORED_DTYPE, "float32"))]
    narrowed = (name for name, info in weights.items() if _narrows(info.dtype, stored))
    return frozenset((*spec.tensors, *narrowed))


def _narrows(dtype: str, stored: str) -> bool:
    return stored != "F32" and dtype in FLOATS.values() and dtype != stored


def _deltas(
    base: _Base, adapter: AdapterWeights, values: Mapping[str, torch.Tensor]
) -> dict[str, LoraDelta]:
    """The delta of each weight, by tensor name; every recorded module must have one."""
    lost = sorted(set(base.spec.tensors) - set(adapter.deltas))
    if lost:
        raise Mismatch(
            f"the adapter's file has no tensors for module {lost[0]!r}, which its record lists"
        )
    found: dict[str, LoraDelta] = {}
    for delta in adapter.deltas.values():
        for name, part in _placed(base, delta).items():
            _check_fits(base, name, part, values)
            if name in found:
                raise Mismatch(f"two modules of the adapter change the tensor {name!r}")
            found[name] = part
    return found


def _placed(base: _Base, delta: LoraDelta) -> dict[str, LoraDelta]:
    """A module's delta by the tensor or, for fused experts, the tensors that it belongs to.

    PEFT keeps one `fan_in_fan_out` for all modules and flips it as it meets them, so the flag it
    saves is that of the last one; which layers are stored transposed follows from the model alone.
    """
    if delta.kind == "experts":
        return split_experts(delta, {name: info.shape for name, info in base.weights.items()})
    name = base.spec.tensors.get(delta.module)
    if name is None or base.stored(name) is None:
        raise Mismatch(
            f"{base.weights.directory}: no tensor of the base belongs to the adapted module {delta.module!r}"
        )
    flipped = stores_transposed(base.model_type, delta.module)
    if delta.kind == "linear" and delta.fan_in_fan_out != flipped:
        delta = replace(delta, fan_in_fan_out=flipped)
    return {name: fitted(delta, _known(base.stored(name))[1][0 if flipped else -1])}


def _check_fits(
    base: _Base, name: str, delta: LoraDelta, values: Mapping[str, torch.Tensor]
) -> None:
    dtype, shape = _known(base.stored(name))
    shape = tuple(values[name].shape) if name in values else shape
    if shape != delta_shape(delta) or dtype not in FLOATS.values():
        raise Mismatch(
            f"{base.weights.directory}: tensor {name!r} is {dtype} {list(shape)}, "
            f"the adapter's delta for it is {list(delta_shape(delta))}"
        )


def _saved(base: _Base, adapter: AdapterWeights) -> dict[str, torch.Tensor]:
    """The parameters trained whole, by tensor name; a new head keeps its name in memory."""
    named: dict[str, torch.Tensor] = {}
    for parameter, value in adapter.saved.items():
        name = base.name_of(parameter)
        if name in named:
            raise Mismatch(f"two parameters that the adapter saves whole are the tensor {name!r}")
        named[name] = value
    return named


def _addends(
    weights: WeightSet, deltas: Mapping[str, LoraDelta], values: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What is added to the biases of adapted modules (LoRA with `lora_bias`), by tensor name."""
    found = {}
    for name, delta in deltas.items():
        addend = delta_bias(delta)
        if addend is None:
            continue
        bias = f"{name.removesuffix('.weight')}.bias"
        if bias not in weights and bias not in values:
            raise Unsupported(
                f"module {delta.module!r}: the adapter adds a bias, but the base has none there"
            )
        found[bias] = addend
    return found
