"""Models built without memory for their weights, to be given them one by one."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from qlx.weights import WeightSet

__all__ = ["fill", "parameters_on_meta", "without_tensor"]


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Let modules be made with parameters that have no memory, and with real buffers."""
    modules: Any = nn.Module
    register = modules.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.data.to("meta"), requires_grad=False)
        register(module, name, parameter)

    modules.register_parameter = on_meta
    try:
        yield
    finally:
        modules.register_parameter = register


def without_tensor(
    model: nn.Module, names: Mapping[str, str], weights: WeightSet, coded: frozenset[str]
) -> list[str]:
    """Parameters that have no tensor of their own and shape in the files, nor codes there.

    `names` maps parameters and buffers to tensors (`tensor_names`), `coded` holds the tensors kept as
    codes. A tied parameter has the tensor of the one it is tied to.
    """
    parameters = list(model.named_parameters(remove_duplicate=False))
    known = {
        id(parameter)
        for name, parameter in parameters
        if names.get(name) in coded
        or (names.get(name) in weights and weights[names[name]].shape == tuple(parameter.shape))
    }
    return [name for name, parameter in parameters if id(parameter) not in known]


def fill(model: nn.Module, names: Mapping[str, str], read: Callable[[str], Tensor]) -> None:
    """Give each parameter and buffer of `names` its tensor, as `read` gives it by its name, ties kept, in place."""
    places = dict(model.named_parameters(remove_duplicate=False))
    shared: dict[int, list[str]] = {}
    for name, parameter in places.items():
        shared.setdefault(id(parameter), []).append(name)
    buffers = dict(model.named_buffers())
    for name, stored in names.items():
        tensor = read(stored)
        if name in buffers:
            buffers[name].data = tensor.to(buffers[name].dtype)
            continue
        parameter = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        for place in shared[id(places[name])]:
            module, _, leaf = place.rpartition(".")
            setattr(model.get_submodule(module), leaf, parameter)
