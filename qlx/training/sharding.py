"""A model in shards: each of several processes holds a part of every weight, and borrows a layer's rest to run it.

PyTorch's `fully_shard` (FSDP2), applied here and not by accelerate: that takes no CPU processes, and leaves
bitsandbytes' codes whole in every process. qlx's layers find their scales beside the codes, so codes
are sharded as the bytes they are.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from qlx.adapters import exact_layers
from qlx.errors import Unsupported
from qlx.quant.layers import linear4bit_modules

__all__ = ["shard_model", "unwrapped"]


def shard_model(model: nn.Module, count: int) -> None:
    """Shard a model in place over `count` processes, layer by layer; they all take part.

    Raises:
        Unsupported: what is trained has several dtypes, which gradients of shards cannot have, or DoRA's
            norms need bitsandbytes' weights as a whole.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    _check(model)
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            if type(value) is not nn.Parameter:  # bitsandbytes' own class does not survive
                plain = nn.Parameter(value.data, requires_grad=value.requires_grad)
                setattr(module, name, plain)
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (count,))
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh)
    # The rest, too, after each pass: a pass without a backward one would leave it whole.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def _check(model: nn.Module) -> None:
    if any("lora_magnitude_vector" in name for name, _ in model.named_parameters()) and any(
        True for _ in linear4bit_modules(model)
    ):
        raise Unsupported(
            "--shard: DoRA asks bitsandbytes for whole weights; choose quantization.quant_type int4, leave out "
            "adapter.use_dora, or train without --shard"
        )
    if exact_layers(model):
        raise Unsupported(
            "--shard: an exact adapter makes each weight from all of its factors; train without --shard"
        )
    dtypes = {str(value.dtype) for value in model.parameters() if value.requires_grad}
    if len(dtypes) > 1:
        raise Unsupported(
            f"--shard: what is trained is in {' and '.join(sorted(dtypes))}; choose base.dtype float32, "
            "or train without --shard"
        )


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks that follow each other: what lists of modules hold, without lists inside them."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from (layer for layer in child if any(True for _ in layer.parameters()))
        else:
            yield from _layers(child)


def unwrapped(trainer: Any) -> Any:
    """The trainer, which then takes its model as it is: `DistributedDataParallel` has no place around shards."""
    prepare = trainer.accelerator.prepare_model

    def prepare_model(model: nn.Module, *_: Any, **__: Any) -> Any:
        return prepare(model, device_placement=False, evaluation_mode=True)

    trainer.accelerator.prepare_model = prepare_model
    return trainer
