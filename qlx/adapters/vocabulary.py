"""New tokens: rows of embedding and head that are trained alone, and added where the model has none for them.

A new row begins as the mean of all others, in embedding and head alike: in the head that is the
token nobody has a reason to expect or to exclude. An adapter stores the new rows only; whoever loads it
gives the model as many rows first (plain PEFT: `resize_token_embeddings(len(tokenizer))`), and their
values there do not matter, as all of them are replaced.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlx.errors import Mismatch, Unsupported
from qlx.recipe import AdapterSection

__all__ = ["start_rows", "token_targets", "widen_for"]


def widen_for(model: Any, ids: Iterable[int]) -> None:
    """Give a language model rows for tokens beyond its vocabulary, in place; all others stay as they are.

    Raises:
        Mismatch: a row in between would belong to no token.
    """
    wanted = set(ids)
    table = _embedding(model)
    if not wanted or table is None or max(wanted) < len(table.weight):
        return
    count, rows = len(table.weight), max(wanted) + 1
    gap = sorted(set(range(count, rows)) - wanted)
    if gap:
        raise Mismatch(
            f"the base has {count} tokens and the adapter trains token {rows - 1}, but nobody has token {gap[0]}: "
            "it was made for a model with another vocabulary"
        )
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for weight in _tables(model):
            weight[count:] = _mean(weight[:count]).to(weight.dtype)


def token_targets(
    model: Any, section: AdapterSection, targets: Iterable[str], ids: Sequence[int]
) -> dict[str, list[int]]:
    """PEFT's `trainable_token_indices`: embedding, and the head where it is not the embedding itself.

    Raises:
        Unsupported: the recipe trains or adapts one of them as a whole, too, or the head has a bias,
            which would need values for the new tokens.
    """
    tables, head = [_embedding(model)], model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise Unsupported(
            "adapter.new_tokens: the head of this model has a bias, which is not handled"
        )
    if not _tied(model):
        tables.append(head)
    names = [name for name, module in model.named_modules() if any(module is t for t in tables)]
    for name in names:
        both = [e for e in (*section.modules_to_save, *targets) if f".{name}".endswith(f".{e}")]
        if both:
            raise Unsupported(
                f"adapter.new_tokens: their rows of {name!r} are trained, and {both[0]!r} in modules_to_save or "
                "target_modules names all of it; leave one of them out"
            )
    return {name: list(ids) for name in names}


def start_rows(adapted: nn.Module, ids: Sequence[int]) -> None:
    """Let the trained rows begin as the mean of all others, in float32."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.utils.other import TrainableTokensWrapper

    for layer in adapted.modules() if ids else ():
        if isinstance(layer, TrainableTokensWrapper):
            layer.bias = None  # TRL asks heads for it, and this wrapper knows of their weight alone
        if not isinstance(layer, TrainableTokensLayer) or layer.tied_adapter is not None:
            continue
        weight, rows = layer.get_base_layer().weight, layer.trainable_tokens_delta["default"]
        if weight.device.type != "meta":
            others = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
            others[list(ids)] = False
            rows.data = _mean(weight.detach()[others]).expand(len(ids), -1).clone()


def _mean(rows: Tensor) -> Tensor:
    return rows.float().mean(dim=0)


def _embedding(model: Any) -> Any:
    """The input embedding of a language model; None for other models."""
    try:
        table = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # some models of transformers have the latter
        return None
    return table if isinstance(table, nn.Embedding) else None


def _tied(model: Any) -> bool:
    return bool(getattr(model.config, "tie_word_embeddings", False))


def _tables(model: Any) -> Iterator[Tensor]:
    yield _embedding(model).weight
    head = model.get_output_embeddings()
    if head is not None and not _tied(model):
        yield head.weight
