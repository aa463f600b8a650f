"""Models whose files hold codes instead of weights, in any of `qlx.quant.STORED_BACKENDS`."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from qlx.checkpoint import QuantSpec, load_json
from qlx.errors import CorruptCheckpoint, Unsupported, require
from qlx.models.architectures import CONFIG_FILE
from qlx.quant import (
    Keep,
    StoredQuantization,
    in_memory,
    kept,
    packed_layer,
    stored_quantization,
    torch_dtype_of,
)
from qlx.weights import open_weights, read_tensors

__all__ = ["load_codes", "logical_names", "stored_codes", "without_report"]


def stored_codes(directory: Path) -> StoredQuantization | None:
    """How the weights of a model directory are stored as codes; None where they are not.

    Raises:
        Unsupported: in a way that cannot be read (the message says which).
    """
    config = load_json(Path(directory) / CONFIG_FILE)
    try:
        stored = stored_quantization(config if isinstance(config, dict) else {})
        if stored is None or stored.method != "bitsandbytes":
            return stored
        names = open_weights(directory)
        return stored.as_states_say(names, read_tensors(directory, stored.state_names(names)))
    except (Unsupported, CorruptCheckpoint) as error:
        raise type(error)(f"{directory}: {error}") from error


def logical_names(files: Iterable[str]) -> list[str]:
    """The tensor names of a checkpoint, and `<module>.weight` for each weight that is kept in words."""
    names = list(files)
    marks = (".qweight", ".weight_packed")
    return [*names, *(f"{n.removesuffix(m)}.weight" for m in marks for n in names if n.endswith(m))]


@contextmanager
def without_report(wanted: bool) -> Iterator[None]:
    """Keep transformers from reporting as missing the weights that `load_codes` is about to put in."""
    logging = require("transformers.utils.logging", "train")
    before = logging.get_verbosity()
    if wanted:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def load_codes(
    model: nn.Module,
    directory: Path,
    names: dict[str, str],
    stored: StoredQuantization,
    spec: QuantSpec | None,
    keep: Keep = in_memory,
) -> list[str]:
    """Put the packed weights of `directory` into a model that was built without them, in place.

    `names` maps parameters in memory to tensors in the files (`tensor_names`); `spec` says how to
    compute, and `keep` where codes are to lie. Returns the names of the layers replaced, in the order
    of the files.

    Raises:
        CorruptCheckpoint: a weight has no linear layer in the model, or another shape.
    """
    places = {disk: memory.removesuffix(".weight") for memory, disk in names.items()}
    weights = open_weights(directory)
    found = []
    for name in stored.weight_names(weights):
        module = places.get(name)
        linear = None if module is None else model.get_submodule(module)
        if module is None or not isinstance(linear, nn.Linear):
            raise CorruptCheckpoint(f"{directory}: the codes of {name!r} belong to no linear layer")
        parts = [part for part in stored.part_names(name) if part in weights]
        packed = stored.read(read_tensors(directory, parts), name)
        if packed.shape != (linear.out_features, linear.in_features):
            raise CorruptCheckpoint(
                f"{directory}: the codes of {name!r} are {list(packed.shape)}, the model has "
                f"{[linear.out_features, linear.in_features]} there"
            )
        layer = packed_layer(kept(packed, name, keep), linear.bias, *_computing(spec))
        model.set_submodule(module, layer.train(linear.training))
        found.append(module)
    if found and stored.method == "bitsandbytes":
        model.is_loaded_in_4bit = True  # type: ignore[assignment]  # how PEFT knows
    return found


def _computing(spec: QuantSpec | None) -> tuple[torch.dtype | None, int | None]:
    return (
        (None, None) if spec is None else (torch_dtype_of(spec.compute_dtype), spec.activation_bits)
    )
