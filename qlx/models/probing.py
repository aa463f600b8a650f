"""Making a probe: which inputs are kept, and the outputs of the model that training saw."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qlx.adapters import OWN_BIASES
from qlx.checkpoint import Probe, Task
from qlx.inputs import Batch, Encoded, pad_batch
from qlx.models.architectures import image_shape
from qlx.models.loading import computing_in
from qlx.models.predict import forward_logits

__all__ = ["MAX_LOGITS_BYTES", "make_probe", "probe_texts", "synthetic_inputs"]

MAX_LOGITS_BYTES = 16 * 2**20
"""Largest array of logits a probe stores (float32)."""

_SHORTEST = 4


def make_probe(
    model: nn.Module,
    task: Task,
    inputs: Mapping[str, NDArray[Any]],
    labels: NDArray[Any] | None,
    has_adapter: bool,
) -> Probe:
    """Run the model as training left it, then in fp32, with and without its adapter.

    `reference` and `base` are fp32-compute logits; `native` those of training's own dtype, left out
    where that is fp32 already. The model computes in fp32 afterwards.
    """
    native = forward_logits(model, task, inputs)
    in_fp32 = _computes_in_fp32(model)
    if not in_fp32:
        computing_in(model, torch.float32)
    reference = native if in_fp32 else forward_logits(model, task, inputs)
    base = None
    if has_adapter:
        with _adapter_off(model), _own_biases(model):
            base = forward_logits(model, task, inputs)
    return Probe(
        task=task,
        inputs=dict(inputs),
        reference=reference,
        base=base,
        native=None if in_fp32 else native,
        labels=labels,
    )


def _adapter_off(model: Any) -> AbstractContextManager[Any]:
    return model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()


@contextmanager
def _own_biases(model: nn.Module) -> Iterator[None]:
    """Give a base its own biases back for a while: PEFT leaves the trained ones on when it is off."""
    own: dict[str, torch.Tensor] = getattr(model, OWN_BIASES, {})
    parameters = dict(model.named_parameters())
    trained = {name: parameters[name].data for name in own}
    try:
        for name, value in own.items():
            parameters[name].data = value.to(trained[name].device, trained[name].dtype)
        yield
    finally:
        for name, value in trained.items():
            parameters[name].data = value


def _computes_in_fp32(model: nn.Module) -> bool:
    """Whether every float parameter and every quantized layer's compute dtype is float32."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    dtypes |= {
        dtype
        for module in model.modules()
        if (dtype := getattr(module, "compute_dtype", None)) is not None
    }
    return dtypes <= {torch.float32}


def probe_texts(
    items: Sequence[Encoded], pad_id: int, *, count: int, max_length: int, vocabulary: int
) -> Batch:
    """A batch of held-out texts for a probe, some shorter than others so that there is padding.

    Of each text the last `max_length` tokens are kept. For a large vocabulary fewer and shorter
    texts are taken, so that the logits stay within 16 MiB.
    """
    positions = max(2 * _SHORTEST, MAX_LOGITS_BYTES // (4 * vocabulary))
    count = max(2, min(count, len(items), positions // _SHORTEST))
    length = max(_SHORTEST, min(max_length, positions // count))
    chosen = [Encoded(item.ids[-length:], item.labels[-length:]) for item in items[:count]]
    if len({len(item.ids) for item in chosen}) == 1:
        chosen = [_shorter(item) if at % 2 else item for at, item in enumerate(chosen)]
    return pad_batch(chosen, pad_id)


def _shorter(item: Encoded) -> Encoded:
    kept = max(2, len(item.ids) * 3 // 4)
    return Encoded(item.ids[-kept:], item.labels[-kept:])


def synthetic_inputs(
    task: Task, config: Any, *, count: int = 8, length: int = 16
) -> dict[str, NDArray[Any]]:
    """Deterministic inputs for a model whose data are not at hand: noise images or random tokens.

    Image values are normal with unit variance; tokens are uniform over the vocabulary, padded
    differently in each row.
    """
    random = np.random.default_rng(0)
    if task != "causal-lm":
        shape = (count, *image_shape(config))
        return {"pixel_values": random.standard_normal(shape).astype(np.float32)}
    items = [
        _random_text(random, config.vocab_size, length - at % (length // 2)) for at in range(count)
    ]
    batch = probe_texts(
        items,
        config.pad_token_id or 0,
        count=count,
        max_length=length,
        vocabulary=config.vocab_size,
    )
    return batch.inputs


def _random_text(random: np.random.Generator, vocabulary: int, length: int) -> Encoded:
    ids = random.integers(0, vocabulary, length).tolist()
    return Encoded(ids, ids)
