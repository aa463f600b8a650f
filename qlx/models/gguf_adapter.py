"""A LoRA as one GGUF file for llama.cpp, to be given with `--lora` beside the base's own file.

llama.cpp adds alpha / r · B A, with one alpha for the file and each layer's own r. So what a recipe scales otherwise
(rsLoRA's alpha / √r, patterns) goes into B: the file's alpha is the effective one of the first layer, and any
other layer's B is multiplied by what its scaling differs from that. Factors are float32 and the rows of B lie as
the rows of llama.cpp's weight do (`qlx.models.llama_cpp`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlx.adapters import AdapterWeights, LoraDelta, fitted
from qlx.errors import Unsupported, require
from qlx.models.llama_cpp import GgufLayout

__all__ = ["GGUF_ADAPTER_FILE", "write_gguf_adapter"]

GGUF_ADAPTER_FILE = "adapter.gguf"
"""The adapter in llama.cpp's format."""

_ELSE = "merge it and run `qlx pack --to gguf` instead"


def write_gguf_adapter(
    path: Path,
    adapter: AdapterWeights,
    tensors: Mapping[str, str],
    model: nn.Module,
    layout: GgufLayout,
    title: str,
) -> None:
    """Write an adapter to `path`, the same bytes every time.

    Args:
        path: the file to make.
        adapter: LoRA, rsLoRA or VeRA on linear layers alone.
        tensors: each adapted module's weight in the base's files.
        model: the base, with or without values.
        layout: of the base.
        title: the model's name in the file.

    Raises:
        Unsupported: the adapter does more than a low-rank product can say, or a layer has no place in llama.cpp.
        MissingExtra: the package gguf is not installed.
    """
    gguf = require("gguf", "gguf")
    _require_plain(adapter)
    factors = {
        tensors[name]: _factors(delta, model.get_submodule(name))
        for name, delta in sorted(adapter.deltas.items())
    }
    alpha = _alpha(next(iter(factors.values())))
    writer = gguf.GGUFWriter(path, layout.architecture)
    writer.add_name(title)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, (a, b, scaling) in factors.items():
        place = layout.name(name)
        b = layout.stored(name, b * (scaling * len(a) / alpha))
        writer.add_tensor(f"{place}.lora_a", a.contiguous().numpy())
        writer.add_tensor(f"{place}.lora_b", b.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


Factors = tuple[Tensor, Tensor, float]
"""A [r, in], B [out, r] in float32, and what their product is multiplied by."""


def _factors(delta: LoraDelta, layer: Any) -> Factors:
    if delta.kind != "linear" or delta.magnitude is not None or delta.bias is not None:
        what = "is DoRA's" if delta.magnitude is not None else "is not that of a plain linear layer"
        raise Unsupported(
            f"the update of {delta.module!r} {what}, and a GGUF adapter holds products A B alone; {_ELSE}"
        )
    own = fitted(delta, layer.in_features)
    return own.a.float(), own.b.float(), own.scaling


def _alpha(first: Factors) -> float:
    """The file's alpha as float32 holds it."""
    a, _, scaling = first
    return float(torch.tensor(scaling * len(a), dtype=torch.float32))


def _require_plain(adapter: AdapterWeights) -> None:
    whole: Any = next(iter(adapter.saved), None) or next(iter(adapter.rows), None)
    if whole is not None or adapter.exact or not adapter.deltas:
        what = (
            f"trains {whole!r} whole"
            if whole
            else "moves codes of its base"
            if adapter.exact
            else "is empty"
        )
        raise Unsupported(f"the adapter {what}, which a GGUF adapter has no place for; {_ELSE}")
