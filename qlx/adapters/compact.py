"""An adapter's factors in 8 bits, in files that plain PEFT loads.

A' = round(A / s_A) with a scale for each of its rows, whose factors go into the columns of B, and
B' = round(B s_A / s_B) with one scale: both are integers. PEFT copies them into its float parameters as the numbers
they are, and s_B, which is left, is a factor of the module's alpha, so its entry in `alpha_pattern` holds it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlx.adapters.config import CONFIG_FILE
from qlx.adapters.formula import LoraDelta
from qlx.adapters.reader import WEIGHTS_FILE, read_adapter
from qlx.checkpoint import canonical_json, load_object
from qlx.errors import Unsupported
from qlx.weights import read_tensors, write_tensors

__all__ = ["to_int8"]

_A, _B, _PREFIX = ".lora_A.weight", ".lora_B.weight", "base_model.model."
_LARGEST = 127


def to_int8(directory: Path) -> dict[str, float]:
    """Rewrite the files of a LoRA adapter with A and B of linear layers in int8; returns `alpha_pattern`.

    What else is stored (magnitudes, modules saved whole, factors of other layers) stays as it is.

    Raises:
        Unsupported: there is no such layer, or its scaling could not be told from others'.
    """
    before = read_adapter(directory)
    stored = read_tensors(directory / WEIGHTS_FILE)
    fields = load_object(directory / CONFIG_FILE)
    chosen = {
        f"{_PREFIX}{delta.module}": delta
        for delta in before.deltas.values()
        if _fits(delta, stored)
    }
    if not chosen:
        raise Unsupported(
            f"{directory}: no plain LoRA factors of linear layers to store in int8; leave out --dtype"
        )
    alphas: dict[str, float] = {}
    for key, delta in chosen.items():
        stored[key + _A], stored[key + _B], scale = _rounded(delta.a.float(), delta.b.float())
        alphas[delta.module] = scale * before.config.alpha_of(delta.module)
    others = {} if len(chosen) == len(before.deltas) else dict(_patterns(fields))
    fields["alpha_pattern"] = {**others, **alphas}
    (directory / CONFIG_FILE).write_bytes(canonical_json(fields))
    write_tensors(directory / WEIGHTS_FILE, stored, metadata={"format": "pt"})
    _check(directory, before.deltas)
    return {**others, **alphas}


def _patterns(fields: Mapping[str, Any]) -> Mapping[str, float]:
    return fields.get("alpha_pattern") or {}


def _fits(delta: LoraDelta, stored: Mapping[str, Tensor]) -> bool:
    plain = delta.kind == "linear" and delta.bias is None and not delta.shared and not delta.empty
    return plain and f"{_PREFIX}{delta.module}{_A}" in stored


def _rounded(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, float]:
    """A [r, in] and B [out, r] as int8, and the one factor by which their product is too large or small."""
    rows = (a.abs().amax(dim=1) / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
    columns = b * rows
    scale = columns.abs().max() / _LARGEST
    codes = (a / rows[:, None]).round(), (columns / scale).round()
    left, right = (part.clamp(-_LARGEST, _LARGEST).to(torch.int8).contiguous() for part in codes)
    return left, right, float(scale)


def _check(directory: Path, before: Mapping[str, LoraDelta]) -> None:
    """Read back: every module has the scaling that was meant for it.

    Errors of rounding, which are the caller's to judge, do not turn up in the projection on the old update.
    """
    linear = {n: d for n, d in read_adapter(directory).deltas.items() if d.kind == "linear"}
    for name, delta in linear.items():
        new, old = (d.scaling * (d.b.float() @ d.a.float()) for d in (delta, before[name]))
        if abs(float((new * old).sum() / old.square().sum().clamp(min=1e-30)) - 1) > 0.25:
            raise Unsupported(
                f"{directory}: module {name!r} would get another scaling by the alpha_pattern of this adapter; "
                "leave out --dtype"
            )
