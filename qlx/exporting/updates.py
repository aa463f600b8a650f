"""Adapters as the low-rank updates that a graph's adapter inputs take, computed from a base's own weights.

LoRA, rsLoRA and VeRA are A and B with the scaling multiplied in. DoRA rescales the outputs as well; a
linear layer that was trained whole is its difference from the base's, as a product with the identity; a
trained bias is what it adds. What else an adapter may hold is refused, by name and with the reason.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from torch import Tensor, nn

from qlx.adapters import LoraDelta, delta_bias, delta_shape, dora_factor, fitted, read_adapter
from qlx.errors import Mismatch, Unsupported, require
from qlx.quant import dequantize_tensor, packed_modules, packed_of_module

__all__ = ["Update", "adapter_updates", "write_adapter_file"]

_ALONE = "merge it, or export it alone: without --adapter"


@dataclass(frozen=True)
class Update:
    """What an adapter does to one linear layer: x ↦ (1 + scale) · W x + (x · a) · b + bias.

    `a` [in, r] and `b` [r, out], `scale` and `bias` [out], all float32. None is nothing.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    scale: Tensor | None = None
    bias: Tensor | None = None

    def inputs(self, module: str) -> dict[str, Tensor]:
        """The graph's inputs by name, each for one row: [1, in, r], [1, r, out] and [1, 1, out]."""
        parts = {"lora_A": self.a, "lora_B": self.b}
        parts |= {"lora_scale": self.scale, "lora_bias": self.bias}
        return {
            f"{module}.{name}": (part if part.dim() == 2 else part[None])[None].contiguous()
            for name, part in parts.items()
            if part is not None
        }


class _Base:
    """The linear layers of a loaded base, packed or not, and their weights in float32."""

    def __init__(self, model: nn.Module) -> None:
        conv1d = require("transformers.pytorch_utils", "export").Conv1D
        self._packed = dict(packed_modules(model))
        self._modules: dict[str, Any] = dict(model.named_modules())
        self._linear = (nn.Linear, conv1d)
        names = (name for name, _ in model.named_parameters(remove_duplicate=False))
        owners: dict[int, list[str]] = {}
        for name in names:
            owners.setdefault(id(model.get_parameter(name)), []).append(name)
        self._tied = {name for same in owners.values() if len(same) > 1 for name in same}

    def linear(self, name: str) -> Any:
        """The layer of that name, None if there is none or it is not linear."""
        module = self._modules.get(name)
        return module if name in self._packed or isinstance(module, self._linear) else None

    def weight(self, name: str) -> Tensor:
        """[out, in] (of Conv1D [in, out]), as it acts."""
        if name in self._packed:
            return dequantize_tensor(packed_of_module(self._packed[name]), torch.float32)
        weight: Tensor = self._modules[name].weight.detach().float()
        return weight

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of `weight`."""
        if name in self._packed:
            return tuple(packed_of_module(self._packed[name]).shape)
        return tuple(self._modules[name].weight.shape)

    def parameter(self, name: str) -> Tensor | None:
        """A parameter that is stored as it is, None if there is none of that name."""
        module, _, leaf = name.rpartition(".")
        found = getattr(self._modules.get(module), leaf, None)
        if not isinstance(found, Tensor) or (module in self._packed and leaf == "weight"):
            return None
        return found.detach().float()

    def tied(self, name: str) -> bool:
        """Whether a parameter is another one, too."""
        return name in self._tied


def adapter_updates(model: nn.Module, directory: Path) -> dict[str, Update]:
    """The updates of an adapter directory by the module's name, for the base `model` it was trained on.

    Args:
        model: the base as training saw it, quantized layers packed and not yet replaced for export.
        directory: in PEFT's layout.

    Raises:
        Mismatch: a module is not in the base, or is of another shape.
        Unsupported: the adapter changes something that is not a linear layer.
        InputRefused: as `read_adapter`.
    """
    adapter, base = read_adapter(directory), _Base(model)
    if adapter.rows:
        raise Unsupported(
            f"{directory}: trains tokens of {next(iter(adapter.rows))!r}, which are rows of the base's own "
            f"embedding and cannot be swapped; {_ALONE}"
        )
    found = {name: _low_rank(directory, base, delta) for name, delta in adapter.deltas.items()}
    for module in sorted({name.rpartition(".")[0] for name in adapter.saved}):
        update = _whole(directory, base, module, adapter.saved)
        if update is not None:
            found[module] = _together(directory, module, found.get(module), update)
    return found


def _low_rank(directory: Path, base: _Base, delta: LoraDelta) -> Update:
    where = f"{directory}: module {delta.module!r}"
    if delta.kind != "linear":
        raise Unsupported(f"{where}: an update of {_KINDS[delta.kind]} cannot be swapped; {_ALONE}")
    if base.linear(delta.module) is None:
        raise Mismatch(f"{where} is no linear layer of the base; the adapter is for another model")
    shape = base.shape(delta.module)
    delta = fitted(delta, shape[0] if delta.fan_in_fan_out else shape[-1])
    if delta_shape(delta) != shape:
        raise Mismatch(
            f"{where}: the base's weight is {list(shape)}, the adapter is for {list(delta_shape(delta))}"
        )
    a, b = delta.a.float().T, delta.b.float().T * delta.scaling
    if delta.magnitude is None:
        return Update(a, b, bias=delta_bias(delta))
    factor = dora_factor(base.weight(delta.module), delta)
    assert factor is not None
    return Update(a, b * factor, scale=factor - 1)


_KINDS = {
    "embedding": "an embedding",
    "conv2d": "a convolution",
    "parameter": "a bare parameter",
    "experts": "fused experts",
}


def _whole(directory: Path, base: _Base, module: str, saved: Mapping[str, Tensor]) -> Update | None:
    """The update that makes a layer the one that was trained whole; None where nothing was changed."""
    changed = {
        name: value.float() - before
        for name, value in saved.items()
        if name.rpartition(".")[0] == module
        and (before := _original(directory, base, name, value)) is not None
        and not torch.equal(value.float(), before)
    }
    if not changed:
        return None
    weight, bias = changed.pop(f"{module}.weight", None), changed.pop(f"{module}.bias", None)
    layer = base.linear(module)
    if layer is None or changed or (weight is not None and not isinstance(layer, nn.Linear)):
        name = next(iter(changed), module)
        raise Unsupported(
            f"{directory}: trains {name!r} whole, which is no plain linear layer and cannot be swapped; {_ALONE}"
        )
    if weight is None:
        return Update(bias=bias)
    if base.tied(f"{module}.weight"):
        raise Unsupported(
            f"{directory}: trains {module!r} whole, which shares its weight with another layer and cannot be "
            f"swapped; {_ALONE}"
        )
    outputs, inputs = weight.shape
    if outputs <= inputs:
        return Update(weight.T, torch.eye(outputs), bias=bias)
    return Update(torch.eye(inputs), weight.T, bias=bias)


def _original(directory: Path, base: _Base, name: str, value: Tensor) -> Tensor:
    before = base.parameter(name)
    if before is None or before.shape != value.shape:
        there = "none" if before is None else list(before.shape)
        raise Unsupported(
            f"{directory}: trains {name!r} {list(value.shape)} whole, of which the base has {there}, so that "
            f"it cannot be swapped; {_ALONE}"
        )
    return before


def _together(directory: Path, module: str, low: Update | None, whole: Update) -> Update:
    """A trained bias beside a low-rank update; the rest excludes each other."""
    if low is None:
        return whole
    if whole.a is not None or low.bias is not None or low.scale is not None:
        raise Unsupported(
            f"{directory}: {module!r} is trained whole and adapted, too, which cannot be swapped; {_ALONE}"
        )
    return Update(low.a, low.b, bias=whole.bias)


def write_adapter_file(path: Path, updates: Mapping[str, Update]) -> None:
    """Write an `.onnx_adapter`, onnxruntime's own format; the same updates give the same bytes."""
    tensors = [update.inputs(module) for module, update in sorted(updates.items())]
    values = {  # they share the memory of `tensors`, and the file's writer holds on to neither
        name: ort.OrtValue.ortvalue_from_numpy(tensor.numpy())
        for inputs in tensors
        for name, tensor in inputs.items()
    }
    file = ort.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters(values)
    file.export_adapter(str(path))
