"""Looking inside a torch model: what passes through its layers, and the weights as they act.

Both are by the plain model's names, so that an unmerged, a merged and a packed model can be compared
layer by layer and weight by weight.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlx.checkpoint import Task
from qlx.errors import Unsupported
from qlx.models.names import plain_names
from qlx.models.predict import forward_logits

__all__ = ["Trace", "acting_weights", "adapter_off", "layer_stack", "trace_layers"]

_PROBE_ROWS = 1024

Array = NDArray[Any]


@dataclass
class Trace:
    """One batch on its way through a model: what each layer got and gave, f32 [n, T, hidden], and the logits."""

    names: tuple[str, ...]
    given: list[Tensor] = field(default_factory=list)
    made: list[Tensor] = field(default_factory=list)
    logits: Array = field(default_factory=lambda: np.empty(0, np.float32))

    def states(self) -> list[Array]:
        """What entered the first layer, then what left each one."""
        return [_array(tensor) for tensor in (self.given[0], *self.made)]


def _array(tensor: Tensor) -> Array:
    return np.asarray(tensor.detach().float().cpu().numpy())


def layer_stack(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks that a transformer is a stack of, in order, by the plain model's names.

    Raises:
        Unsupported: the model has no such stack.
    """
    names = plain_names(model)
    modules = model.named_modules()
    stacks = [
        (name, module)
        for name, module in modules
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    if not stacks:
        raise Unsupported(
            f"a {type(model).__name__} is no stack of layers, so they cannot be looked at one by one"
        )
    path, stack = max(
        stacks, key=lambda item: sum(weight.numel() for weight in item[1].parameters())
    )
    return {f"{names[path]}.{at}": layer for at, layer in enumerate(stack)}


def trace_layers(
    model: nn.Module, task: Task, inputs: Mapping[str, Array], *, fed: Trace | None = None
) -> Trace:
    """Run one batch of at most 16 rows and keep what enters and leaves every layer.

    With `fed`, each layer gets what it got in that trace instead of what the layer before it made,
    and the head gets what the last layer made there: the difference that each part makes by itself.

    Raises:
        Unsupported: the layers differ from those of `fed`, or one of them runs more than once.
    """
    layers = layer_stack(model)
    if fed is not None and fed.names != tuple(layers):
        raise Unsupported(
            f"the models are stacks of different layers: {len(fed.names)} and {len(layers)}"
        )
    found = Trace(tuple(layers))
    with _watched(list(layers.values()), found, fed):
        found.logits = forward_logits(model, task, inputs)
    if len(found.made) != len(layers):
        raise Unsupported(
            f"{len(layers)} layers ran {len(found.made)} times; give at most 16 rows, and no layer twice"
        )
    return found


@contextmanager
def _watched(layers: list[nn.Module], found: Trace, fed: Trace | None) -> Iterator[None]:
    handles = []
    for at, layer in enumerate(layers):
        last = at == len(layers) - 1
        handles.append(layer.register_forward_pre_hook(_before(found, fed, at), with_kwargs=True))
        handles.append(
            layer.register_forward_hook(_after(found, fed.made[at] if fed and last else None))
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _before(found: Trace, fed: Trace | None, at: int) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
        state = args[0] if args else options["hidden_states"]
        found.given.append(state.detach().clone())
        if fed is not None:
            state = fed.given[at]
        return (
            ((state, *args[1:]), options) if args else (args, {**options, "hidden_states": state})
        )

    return hook


def _after(found: Trace, instead: Tensor | None) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        whole = isinstance(output, Tensor)
        found.made.append((output if whole else output[0]).detach().clone())
        if instead is None:
            return None
        return instead if whole else (instead, *output[1:])

    return hook


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """The adapter switched off for the time being, where the model has one."""
    if not hasattr(model, "disable_adapter"):
        yield
        return
    with model.disable_adapter():
        yield


def acting_weights(model: nn.Module) -> dict[str, Callable[[], Array]]:
    """Every weight as it acts now, fp32, by the plain model's in-memory name; computed when called.

    An adapted or quantized layer is asked itself: its answers to the unit vectors, less that to
    zero, are its weight, and that to zero its bias. No formula of a delta or of a codec is used. What
    cannot be asked that way (adapted convolutions, fused experts) is left out.
    """
    names = plain_names(model)
    found: dict[str, Callable[[], Array]] = {}
    inside: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}.") for outer in inside):
            continue
        if hasattr(module, "base_layer") or _quantized(module):
            inside.append(path)
            found |= _asked(names[path], module)
        elif hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
            inside.append(path)
            saved = module.original_module.named_parameters()
            found |= {_join(names[path], name): _saved(module, name) for name, _ in saved}
        else:
            own = module.named_parameters(recurse=False)
            found |= {_join(names[path], name): _plain(weight) for name, weight in own}
    return found


def _join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def _plain(weight: Tensor) -> Callable[[], Array]:
    return lambda: _array(weight)


def _saved(wrapper: Any, name: str) -> Callable[[], Array]:
    """A parameter of a module that was trained whole: the trained one, or with the adapter off the other."""

    def current() -> Array:
        off = wrapper.disable_adapters
        active = (
            wrapper.original_module if off else wrapper.modules_to_save[wrapper.active_adapters[0]]
        )
        return _array(active.get_parameter(name))

    return current


def _quantized(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if hasattr(module, "in_features") and weight is None:
        return True
    return (
        isinstance(weight, Tensor)
        and hasattr(module, "in_features")
        and not weight.is_floating_point()
    )


def _asked(name: str, layer: Any) -> dict[str, Callable[[], Array]]:
    inner = layer
    while hasattr(inner, "base_layer"):
        inner = inner.base_layer
    if isinstance(inner, nn.Embedding):
        return {f"{name}.weight": lambda: _array(_run(layer, torch.arange(inner.num_embeddings)))}
    if isinstance(inner, nn.Conv2d) or not (hasattr(inner, "in_features") or hasattr(inner, "nf")):
        return {}
    transposed = not hasattr(inner, "in_features")  # transformers' Conv1D stores [in, out]
    width = int(inner.weight.shape[0]) if transposed else int(inner.in_features)
    found = {f"{name}.weight": lambda: _operator(layer, width, transposed)}
    if getattr(inner, "bias", None) is not None:
        found[f"{name}.bias"] = lambda: _array(_run(layer, torch.zeros(1, width))[0])
    return found


def _run(layer: nn.Module, values: Tensor) -> Tensor:
    device = next(layer.parameters(), torch.empty(0)).device
    with torch.inference_mode():
        answer: Tensor = layer(values.to(device))
    return answer


def _operator(layer: nn.Module, width: int, transposed: bool) -> Array:
    """The matrix [out, in] (or [in, out]) of an affine layer, from its answers to the unit vectors."""
    zero = _run(layer, torch.zeros(1, width))
    units = torch.eye(width)
    rows = torch.cat(
        [_run(layer, units[at : at + _PROBE_ROWS]) - zero for at in range(0, width, _PROBE_ROWS)]
    )
    return _array(rows if transposed else rows.T)
