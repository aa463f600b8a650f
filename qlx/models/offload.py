"""Models whose weights stay on disk: mapped when they are loaded, lent to each layer while it runs.

A weight of the base is a part of its own safetensors file, mapped into memory: the kernel reads pages when
they are touched and may drop them at any time. What has no such place (codes that are made on loading,
weights in another dtype) is written once to a folder and mapped from there. `lend_layers` then takes every
frozen weight out of its layer and lets a hook of accelerate bring it to the device of the inputs for the
length of a forward pass.

The hook is our own, since accelerate's `AlignDevicesHook` is made for inference: it moves the scales of a
4-bit layer to the meta device, where they are lost; it takes all of a layer's parameters, trained biases
too; and it does not give weights back when torch ends a forward early, as it does where layers are
computed again in the backward pass (gradient checkpointing) and their weights lent again.
"""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlx.errors import require
from qlx.quant import head_modules
from qlx.weights import WeightSet, read_tensor, torch_dtype

__all__ = ["MappedWeights", "lend_layers"]


@dataclass(frozen=True)
class MappedWeights:
    """The tensors of a model directory, without memory of their own; `folder` is where copies go."""

    weights: WeightSet
    folder: Path
    _open: dict[Path, torch.UntypedStorage] = field(default_factory=dict)

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """Tensor `name`, floats in `dtype`: a part of the file itself if that is how it is stored."""
        info = self.weights[name]
        stored = torch_dtype(info.dtype)
        offset, rest = divmod(info.begin, stored.itemsize)
        if rest or (stored.is_floating_point and stored != dtype) or not info.count:
            tensor = read_tensor(self.weights, name)
            return self.keep(name, tensor.to(dtype) if stored.is_floating_point else tensor)
        storage = self._storage(self.weights.path_of(name))
        return _part(storage, stored, offset, info.shape)

    def keep(self, name: str, tensor: Tensor) -> Tensor:
        """The same values, written to the folder and mapped from there."""
        if tensor.numel() == 0:
            return tensor
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{name}.bin"
        tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tofile(file)
        return _part(self._storage(file), tensor.dtype, 0, tuple(tensor.shape))

    def _storage(self, file: Path) -> torch.UntypedStorage:
        """All bytes of a file; writing to them never changes the file."""
        if file not in self._open:
            size = file.stat().st_size
            storage: Any = torch.UntypedStorage.from_file(str(file), shared=False, nbytes=size)
            self._open[file] = storage
        return self._open[file]


def _part(
    storage: torch.UntypedStorage, dtype: torch.dtype, offset: int, shape: tuple[int, ...]
) -> Tensor:
    """A contiguous tensor in some bytes, from value `offset` of `dtype` on."""
    strides = [math.prod(shape[at + 1 :]) for at in range(len(shape))]
    return torch.empty(0, dtype=dtype).set_(storage, offset, torch.Size(shape), strides)


def lend_layers(model: nn.Module, weights: Iterable[nn.Parameter]) -> int:
    """Take the frozen ones of `weights` out of their layers, to be lent during each forward; returns how many.

    To be called last, when adapters are in their place; `weights` are the base's parameters, taken before.
    Adapters and what else is trained stay where they are, and so do buffers, scales, and heads, whose weight
    TRL's loss reads without running the layer. A parameter that is out is on the meta device, with its shape
    and dtype; with another dtype there (`computing_in`), it is lent in that.
    """
    heads = (model.get_submodule(name) for name in head_modules(model))
    stay = {id(parameter) for head in heads for parameter in head.parameters(recurse=False)}
    lent = {id(parameter) for parameter in weights if not parameter.requires_grad} - stay
    hook_class, add = _lending_hook()
    for module in model.modules():
        own = module.named_parameters(recurse=False)
        kept = {name: parameter for name, parameter in own if id(parameter) in lent}
        if kept:
            for name, parameter in kept.items():
                place = torch.empty_like(parameter.data, device="meta")
                module._parameters[name] = nn.Parameter(place, requires_grad=False)
            add(module, hook := hook_class(kept), append=True)
            _always_give_back(module, hook)
            _stay_when_moved(module, tuple(kept))
    return len(lent)


@functools.cache
def _lending_hook() -> tuple[Any, Callable[..., nn.Module]]:
    """The class of the hooks, and the function that adds one to a module."""
    hooks = require("accelerate.hooks", "train")

    class Lend(hooks.ModelHook):  # type: ignore[name-defined,misc]
        """Brings some parameters of one module before its forward and takes them back afterwards."""

        def __init__(self, kept: dict[str, nn.Parameter]) -> None:
            self.kept = kept
            self.out: dict[str, nn.Parameter] = {}

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            device = _device_of(args, kwargs)
            if getattr(module, "quant_state", None) is not None:
                module.quant_state.to(device)
            for name, parameter in self.kept.items():
                self.out[name] = place = module._parameters[name]
                value = parameter.data.to(device, place.dtype)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
            return args, kwargs

        def post_forward(self, module: Any, output: Any) -> Any:
            module._parameters.update(self.out)
            self.out.clear()
            return output

    return Lend, hooks.add_hook_to_module


def _always_give_back(module: Any, hook: Any) -> None:
    """Run the end of the hook also when a forward ends by an exception, which accelerate does not."""
    forward = module.forward

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        finally:
            hook.post_forward(module, None)

    module.forward = run


def _device_of(args: Any, kwargs: Any) -> torch.device:
    """The device of the first tensor among a module's inputs; the CPU if there is none."""
    found = require("accelerate.utils", "train").find_device([args, kwargs])
    return torch.device("cpu") if found is None else found


def _stay_when_moved(module: nn.Module, names: tuple[str, ...]) -> None:
    """Keep `.to(device)` from a module's lent parameters, which are nowhere."""
    applied: Callable[..., nn.Module] = module._apply

    def apply(fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        places = {name: module._parameters.pop(name) for name in names}
        try:
            return applied(fn, recurse)
        finally:
            module._parameters.update(places)

    target: Any = module
    target._apply = apply
