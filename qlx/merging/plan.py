"""What a merge will do to every tensor of the base, decided and checked before a byte is written.

A tensor that is in no `Change` is copied. Every adapter tensor ends up in exactly one change, and
every change names a tensor that fits; anything else is refused here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from qlx.adapters import AdapterWeights, LoraDelta, delta_bias, delta_shape, disk_names
from qlx.checkpoint import AdapterSpec, Manifest, QuantSpec
from qlx.errors import Mismatch, Unsupported
from qlx.models import STORED_DTYPE
from qlx.weights import WeightSet, torch_dtype_name

__all__ = ["FLOATS", "Change", "MergePlan", "Onto", "choose_onto", "plan_merge"]

Onto = Literal["as-trained", "original"]
FLOATS: Mapping[str, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""The dtypes a merge can write: names as the command takes them, to names in safetensors."""

_TIED = ("embed_tokens.weight", "lm_head.weight", "wte.weight", "embed_out.weight")


@dataclass(frozen=True)
class Change:
    """One tensor of the merged model that differs from the base's.

    `dtype` is the safetensors name it is written in, `shape` its shape. In this order: `value`, a
    tensor that was trained whole, replaces the base's, which otherwise is taken as training saw it
    (`as_trained`: loaded in training's dtype and through its codec) or as it is; then the weight's
    `delta` or, for a bias, `addend` is added.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    as_trained: bool = False
    value: torch.Tensor | None = None
    delta: LoraDelta | None = None
    addend: torch.Tensor | None = None

    @property
    def adapted(self) -> bool:
        """Whether the adapter changes this tensor, as opposed to the codec alone."""
        return self.value is not None or self.delta is not None or self.addend is not None


@dataclass(frozen=True)
class MergePlan:
    """A checked merge: the base's files, the changes by tensor name, and the dtype of all floats.

    `cast` is the safetensors dtype that every float tensor is written in, None to keep each one's.
    """

    weights: WeightSet
    spec: QuantSpec
    onto: Onto
    changes: Mapping[str, Change]
    cast: str | None

    def dtype_of(self, name: str) -> str:
        """The safetensors dtype that tensor `name` is written in."""
        if name in self.changes:
            return self.changes[name].dtype
        return _cast(self.weights[name].dtype, self.cast)

    @property
    def in_place(self) -> bool:
        """Whether every tensor keeps its dtype and shape, so that the files can be patched."""
        return all(
            name in self.weights and self.weights[name].shape == change.shape
            for name, change in self.changes.items()
        ) and all(self.dtype_of(name) == info.dtype for name, info in self.weights.items())

    @property
    def exact(self) -> bool:
        """Whether the merged model computes what training saw: right base, nothing rounded."""
        return (self.onto == "as-trained" or not self.spec.quantized) and not self.rounds

    @property
    def rounds(self) -> bool:
        """Whether any tensor that the adapter changes is written in less than 32 bits."""
        return any(change.dtype != "F32" for change in self.changes.values())


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
    tied: bool,
) -> MergePlan:
    """Decide what happens to each tensor of the base.

    `dtype` is float32, bfloat16, float16 or None (each tensor keeps its own); `tied` says that the
    model's input and output embeddings are one tensor.

    Raises:
        Mismatch: a target is not in the base, has another shape, or the adapter lacks a module
            that its record lists.
        Unsupported: a tied embedding would be changed on one side only, or an unknown dtype.
    """
    if dtype is not None and dtype not in FLOATS:
        raise Unsupported(f"dtype {dtype!r} is not one of {', '.join(FLOATS)}")
    if manifest.adapter is None:
        raise Mismatch(f"checkpoint {manifest.tag!r} holds no adapter to merge")
    as_trained = onto == "as-trained"
    seen = _seen_otherwise(weights, manifest.quantization) if as_trained else frozenset()
    values = _saved(weights, manifest.adapter, adapter)
    deltas = _deltas(weights, manifest.adapter, adapter, values)
    addends = _addends(weights, deltas, values)
    cast = None if dtype is None else FLOATS[dtype]
    changes = {}
    for name in sorted({*seen, *values, *deltas, *addends}):
        value = values.get(name)
        own = weights[name].dtype if name in weights else torch_dtype_name(_known(value).dtype)
        shape = weights[name].shape if value is None else tuple(value.shape)
        changes[name] = Change(
            name=name,
            dtype=_cast(own, cast),
            shape=shape,
            as_trained=as_trained and value is None,
            value=value,
            delta=deltas.get(name),
            addend=addends.get(name),
        )
    if tied:
        _refuse_tied(changes)
    return MergePlan(weights, manifest.quantization, onto, changes, cast)


def _known(value: torch.Tensor | None) -> torch.Tensor:
    assert value is not None
    return value


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
    weights: WeightSet,
    spec: AdapterSpec,
    adapter: AdapterWeights,
    values: Mapping[str, torch.Tensor],
) -> dict[str, LoraDelta]:
    """The delta of each weight, by tensor name; every recorded module must have one."""
    lost = sorted(set(spec.tensors) - set(adapter.deltas))
    if lost:
        raise Mismatch(
            f"the adapter's file has no tensors for module {lost[0]!r}, which its record lists"
        )
    found: dict[str, LoraDelta] = {}
    for module, delta in adapter.deltas.items():
        name = spec.tensors.get(module)
        if name is None or name not in weights:
            raise Mismatch(
                f"{weights.directory}: no tensor of the base belongs to the adapted module {module!r}"
            )
        shape = tuple(values[name].shape) if name in values else weights[name].shape
        if shape != delta_shape(delta) or weights[name].dtype not in FLOATS.values():
            raise Mismatch(
                f"{weights.directory}: tensor {name!r} is {weights[name].dtype} {list(shape)}, "
                f"the adapter's delta for it is {list(delta_shape(delta))}"
            )
        if name in found:
            raise Mismatch(f"two modules of the adapter change the tensor {name!r}")
        found[name] = delta
    return found


def _saved(
    weights: WeightSet, spec: AdapterSpec, adapter: AdapterWeights
) -> dict[str, torch.Tensor]:
    """The parameters trained whole, by tensor name; a new head keeps its name in memory."""
    named: dict[str, torch.Tensor] = {}
    for parameter, value in adapter.saved.items():
        name = _file_name(parameter, spec, weights)
        if name in named:
            raise Mismatch(f"two parameters that the adapter saves whole are the tensor {name!r}")
        named[name] = value
    return named


def _file_name(parameter: str, spec: AdapterSpec, weights: WeightSet) -> str:
    module, _, leaf = parameter.rpartition(".")
    if module in spec.tensors:
        return f"{spec.tensors[module].removesuffix('.weight')}.{leaf}"
    if parameter.split(".")[0] in spec.modules_to_save and parameter not in weights:
        return parameter
    return disk_names([parameter], weights)[parameter]


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


def _refuse_tied(changes: Mapping[str, Change]) -> None:
    touched = [name for name, change in changes.items() if name.endswith(_TIED) and change.adapted]
    if touched:
        raise Unsupported(
            f"the adapter changes {touched[0]!r}, but the base ties input and output embeddings; "
            "untie them in the base before training"
        )
