"""A model that is run one layer of its stack at a time, with no more than that layer's weights in memory.

The architecture is built without weights. What lies outside the stack (embeddings, norms, the head) is
written to a folder once and mapped from there; a layer of the stack is filled when its turn comes and
emptied again, or it stays, in files, and leaves memory when its turn is over. To run one layer, the
model itself is called: the layers before it hand on what they are given and the run ends behind it, so
that masks and position embeddings are those of the model, whatever its architecture.
"""

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlx.checkpoint import Task
from qlx.errors import Unsupported
from qlx.models import auto_class, model_config, tensor_names
from qlx.models.trace import layer_stack
from qlx.models.unfilled import fill, parameters_on_meta
from qlx.packing.healing.paged import Pages, Resting, release
from qlx.packing.source import Weights

__all__ = ["Inputs", "LayeredModel", "Stop"]

Inputs = Mapping[str, Tensor]
"""One batch of model inputs."""


class Stop(Exception):
    """Ends a forward pass when what was wanted of it is known."""


class LayeredModel:
    """A model of `task` whose configuration lies in `companions` and whose weights are `weights`.

    Raises:
        Unsupported: it is no stack of layers, or a parameter is not one tensor of the weights.
    """

    def __init__(self, weights: Weights, companions: Path, task: Task, folder: Path) -> None:
        with parameters_on_meta():
            model: nn.Module = auto_class(task).from_config(
                model_config(companions, task), dtype=torch.float32
            )
        self.model, self.task = model.eval().requires_grad_(False), task
        self.pages = Pages(folder)
        self._weights, self._names = weights, tensor_names(model, weights.directory)
        self.stack = layer_stack(model)
        self.layers = list(self.stack.values())
        self._forwards = [layer.forward for layer in self.layers]
        self._whole = True  # whether layers give a tensor, or a tuple that begins with it
        self._require_all(model, weights.directory)
        outside = {name: disk for name, disk in self._names.items() if self._layer_of(name) is None}
        fill(model, outside, lambda disk: self.pages.keep(disk, weights.value(disk, full=True)))
        model.requires_grad_(False)

    def _require_all(self, model: nn.Module, directory: Path) -> None:
        known = {
            id(model.get_parameter(name)) for name in self._names if _is_parameter(model, name)
        }
        lost = [name for name, item in model.named_parameters() if id(item) not in known]
        if lost:
            raise Unsupported(
                f"{directory}: the parameter {lost[0]!r} is not one tensor of these files, so the model "
                "cannot be healed; leave out --heal"
            )

    def _layer_of(self, name: str) -> str | None:
        return next((path for path in self.stack if name.startswith(f"{path}.")), None)

    @contextmanager
    def filled(self, at: int) -> Iterator[nn.Module]:
        """A layer with its weights in fp32, for as long as they are needed; all layers use the same files."""
        path, layer = list(self.stack.items())[at]
        own = {name: disk for name, disk in self._names.items() if self._layer_of(name) == path}
        files = {disk: name.removeprefix(f"{path}.") for name, disk in own.items()}
        fill(
            self.model,
            own,
            lambda disk: self.pages.keep(
                f"layer.{files[disk]}", self._weights.value(disk, full=True)
            ),
        )
        layer.requires_grad_(False)
        try:
            yield layer
        finally:
            for module in layer.modules():
                for name, item in module.named_parameters(recurse=False):
                    empty = nn.Parameter(item.data.to("meta"), requires_grad=False)
                    module._parameters[name] = empty

    def fill_all(self, except_for: Container[str]) -> None:
        """Fill the whole stack from files that are mapped, except for the weights of some modules."""
        own = {
            name: disk
            for name, disk in self._names.items()
            if self._layer_of(name) and name.removesuffix(".weight") not in except_for
        }
        fill(
            self.model,
            own,
            lambda disk: self.pages.keep(disk, self._weights.value(disk, full=True)),
        )
        self.model.requires_grad_(False)

    def rest(self, at: int) -> None:
        """Let what layer `at` holds in files leave memory until it is used again."""
        for module in self.layers[at].modules():
            release(item for item in module._parameters.values() if item is not None)
            if isinstance(module, Resting):
                release(module.held())

    def entering(self, batch: Inputs) -> Tensor:
        """What the first layer is given."""
        found: list[Tensor] = []

        def first(state: Tensor, call: Callable[[Tensor], Any]) -> Any:
            found.append(state)
            raise Stop

        self._call(batch, {0: first})
        return found[0]

    def leaving(self, at: int, batch: Inputs, given: Tensor) -> Tensor:
        """What layer `at` makes of `given`; it must be filled."""
        found: list[Tensor] = []

        def run(state: Tensor, call: Callable[[Tensor], Any]) -> Any:
            found.append(self._state_of(call(given)))
            raise Stop

        self._call(batch, {at: run})
        return found[0] if found else given

    def finished(self, batch: Inputs, state: Tensor) -> Tensor:
        """The outputs of the model when its last layer has made `state`."""
        last = len(self.layers) - 1
        return self._call(batch, {last: lambda _, call: self._form(state)})

    def outputs(self, batch: Inputs) -> Tensor:
        """The outputs of the model through all layers, one in memory at a time; without gradients."""
        steps = {at: self._step(at, None) for at in range(len(self.layers))}
        with torch.no_grad():
            return self._call(batch, steps)

    def learn(
        self, batch: Inputs, loss_of: Callable[[Tensor], Tensor], learned: Callable[[int], None]
    ) -> None:
        """The gradients of a loss of the outputs, for one layer after the other, beginning with the last.

        `learned(at)` is called as soon as the parameters of layer `at` have theirs and nobody needs the layer any
        more in this step. Its inputs lie in files from the first time it is run to the second, which
        keeps what the backward pass needs.
        """
        calls: list[Callable[[Tensor], Any]] = []
        ends: list[Tensor] = []
        last = len(self.layers) - 1

        def end(state: Tensor, call: Callable[[Tensor], Any]) -> Any:
            ends.append(self._state_of(run(state, call)).requires_grad_())
            return self._form(ends[0])

        steps = {at: self._step(at, calls) for at in range(len(self.layers))}
        run, steps[last] = steps[last], end
        (gradient,) = torch.autograd.grad(loss_of(self._call(batch, steps)), ends)
        for at in range(last, -1, -1):
            kept = self.pages.kept(f"state.{at}")
            state = kept.clone().requires_grad_()
            release([kept])
            output = self._state_of(calls[at](state))
            torch.autograd.backward(output, gradient)
            assert state.grad is not None
            gradient = state.grad
            learned(at)
            self.rest(at)

    def _step(self, at: int, calls: list[Callable[[Tensor], Any]] | None) -> Callable[..., Any]:
        """Run layer `at` without gradients and let it rest; with `calls` keep its inputs, and how it is called."""

        def run(state: Tensor, call: Callable[[Tensor], Any]) -> Any:
            if calls is not None:
                self.pages.keep(f"state.{at}", state)
                calls.append(call)
            with torch.no_grad():
                output = call(state)
            self.rest(at)
            return output

        return run

    def _state_of(self, output: Any) -> Tensor:
        """The state in what a layer gives, which may be a tuple."""
        self._whole = isinstance(output, Tensor)
        state: Tensor = output if self._whole else output[0]
        return state

    def _call(self, batch: Inputs, steps: Mapping[int, Callable[..., Any]]) -> Tensor:
        """Run the model with some layers replaced by `steps`, the others handing on what they are given."""
        for at, layer in enumerate(self.layers):
            target: Any = layer
            target.forward = self._replaced(self._forwards[at], steps.get(at))
        options = {"use_cache": False} if self.task == "causal-lm" else {}
        try:
            result: Any = self.model(**batch, **options)
        except Stop:
            return torch.empty(0)
        finally:
            for layer in self.layers:
                target = layer
                del target.forward
        outputs: Tensor = result.heatmaps if self.task == "heatmap" else result.logits
        return outputs

    def _replaced(
        self, forward: Callable[..., Any], step: Callable[..., Any] | None
    ) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            state = args[0] if args else options["hidden_states"]
            if step is None:
                return self._form(state)

            def call(given: Tensor) -> Any:
                if args:
                    return forward(given, *args[1:], **options)
                return forward(**{**options, "hidden_states": given})

            return step(state, call)

        return run

    def _form(self, state: Tensor) -> Any:
        return state if self._whole else (state,)


def _is_parameter(model: nn.Module, name: str) -> bool:
    module, _, leaf = name.rpartition(".")
    return leaf in model.get_submodule(module)._parameters
