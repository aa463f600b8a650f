"""Running a model that does not fit in memory: each layer's weights are read when its turn comes.

The architecture is built without weights. A linear layer computes its outputs some rows of its
weight at a time, an embedding reads the rows of its tokens, and any other module with parameters of
its own gets them for the length of its forward. The function is that of the loaded model; a sum may
round otherwise where a layer is cut.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qlx.checkpoint import Task
from qlx.errors import Unsupported
from qlx.models.architectures import auto_class
from qlx.models.coded import stored_codes
from qlx.models.loading import model_config
from qlx.models.names import tensor_names
from qlx.models.unfilled import parameters_on_meta
from qlx.weights import WeightSet, open_weights, read_rows

__all__ = ["PIECE", "streamed_bytes", "streamed_model"]

PIECE = 2**22
"""Values of a weight that are in memory at a time, in fp32: 16 MiB."""


def streamed_model(directory: Path, task: Task) -> nn.Module:
    """A directory's model in evaluation mode, in fp32, that reads its weights while it runs.

    Raises:
        Unsupported: a parameter is not one tensor of the files (fused experts, codes).
    """
    directory = Path(directory)
    if stored_codes(directory) is not None:
        raise Unsupported(f"{directory}: weights stored as codes are not run layer by layer")
    with parameters_on_meta():
        model: nn.Module = auto_class(task).from_config(
            model_config(directory, task), dtype=torch.float32
        )
    files = _Files.of(open_weights(directory), _stored_names(model, directory))
    names = tensor_names(model, directory)
    for name, buffer in model.named_buffers():
        if name in names:
            buffer.data = files.whole(names[name]).to(buffer.dtype)
    for module in model.modules():
        _stream(module, files)
    return model.eval()


def streamed_bytes(weights: WeightSet) -> int:
    """What running weights this way takes in bytes, beyond the libraries.

    A matrix is taken to be that of a linear layer or an embedding, which is read by rows.
    """
    others = [info.count for info in weights.values() if len(info.shape) != 2]
    return 4 * (4 * PIECE + 2 * max(others, default=0))


def _stored_names(model: nn.Module, directory: Path) -> dict[int, str]:
    """The tensor of each parameter, by the parameter's id, so that tied ones share theirs."""
    names = tensor_names(model, directory)
    parameters = list(model.named_parameters(remove_duplicate=False))
    found = {id(parameter): names[name] for name, parameter in parameters if name in names}
    lost = [name for name, parameter in parameters if id(parameter) not in found]
    if lost:
        raise Unsupported(
            f"{directory}: the parameter {lost[0]!r} is not one tensor of these files"
        )
    return found


@dataclass(frozen=True)
class _Files:
    """The weights, and which of them each parameter is; two pieces of memory serve all layers."""

    weights: WeightSet
    names: Mapping[int, str]
    stored: Tensor
    values: Tensor

    @classmethod
    def of(cls, weights: WeightSet, names: Mapping[int, str]) -> "_Files":
        widest = max(
            (i.count // (i.shape[0] if i.shape else 1) for i in weights.values() if i.count),
            default=1,
        )
        size = max(PIECE, widest)
        return cls(weights, names, torch.empty(8 * size, dtype=torch.uint8), torch.empty(size))

    def name_of(self, parameter: Tensor) -> str:
        return self.names[id(parameter)]

    def whole(self, name: str) -> Tensor:
        shape = self.weights[name].shape
        return self.rows(name, slice(0, shape[0] if shape else 1)).reshape(shape)

    def rows(self, name: str, rows: slice) -> Tensor:
        return read_rows(self.weights, name, rows).float()

    def piece(self, name: str, rows: slice) -> Tensor:
        """Some rows in fp32, good until the next piece is read."""
        found = read_rows(self.weights, name, rows, self.stored)
        return self.values[: found.numel()].view_as(found).copy_(found)


def _stream(module: nn.Module, files: _Files) -> None:
    own = dict(module.named_parameters(recurse=False))
    target: Any = module
    if type(module) is nn.Linear:
        target.forward = _linear(module, files)
    elif type(module) is nn.Embedding:
        target.forward = _embedding(module, files)
    elif own:
        _lend(module, own, files)


def _linear(module: nn.Linear, files: _Files) -> Callable[[Tensor], Tensor]:
    name = files.name_of(module.weight)
    bias = None if module.bias is None else files.whole(files.name_of(module.bias))
    total, step = module.out_features, max(1, PIECE // module.in_features)

    def forward(inputs: Tensor) -> Tensor:
        cuts = (slice(at, min(at + step, total)) for at in range(0, total, step))
        parts = [functional.linear(inputs, files.piece(name, rows)) for rows in cuts]
        outputs = torch.cat(parts, dim=-1)
        return outputs if bias is None else outputs + bias

    return forward


def _embedding(module: nn.Embedding, files: _Files) -> Callable[[Tensor], Tensor]:
    name = files.name_of(module.weight)

    def forward(tokens: Tensor) -> Tensor:
        used, places = tokens.unique(return_inverse=True)
        rows = [files.rows(name, slice(at, at + 1)) for at in used.tolist()]
        return torch.cat(rows)[places]

    return forward


def _lend(module: nn.Module, own: Mapping[str, nn.Parameter], files: _Files) -> None:
    """Give a module its parameters before its forward and take them back afterwards."""
    stored = {name: files.name_of(parameter) for name, parameter in own.items()}

    def before(target: Any, inputs: Any) -> None:
        for name, tensor in stored.items():
            target._parameters[name] = nn.Parameter(files.whole(tensor), requires_grad=False)

    def after(target: Any, inputs: Any, outputs: Any) -> None:
        target._parameters.update(own)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after, always_call=True)
