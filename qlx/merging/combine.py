"""Several adapters of one base combined into a single adapter checkpoint, ready to merge.

The combined adapter is a plain PEFT one; its probe is PEFT's forward with it attached, unmerged, on
the first adapter's inputs, so that the merge is proven like any other.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from qlx.adapters import (
    METHODS,
    PRUNING,
    RANDOM,
    AdapterWeights,
    LoraDelta,
    Method,
    combined_delta,
    read_adapter,
)
from qlx.checkpoint import (
    AdapterSpec,
    Checkpoint,
    Manifest,
    ProbeRecord,
    Source,
    canonical_json,
    new_checkpoint,
    next_step,
    open_checkpoint,
    seal,
    write_probe,
)
from qlx.errors import CheckFailed, Mismatch, Unsupported, UsageError
from qlx.merging.companions import copy_companions
from qlx.verification import probe_of
from qlx.weights import write_tensors

__all__ = ["Combination", "chosen_combination", "combine", "module_generator"]

_PREFIX = "base_model.model."
_IMPORTED = "imported"
"""The option of a lineage step that says an adapter came without a record of its base's values."""


@dataclass(frozen=True)
class Combination:
    """How adapters are combined: the method, a weight for each (1 where none is given), DARE's seed.

    `density` is the share of values that the pruning methods keep.
    """

    method: Method = "cat"
    weights: tuple[float, ...] = ()
    density: float | None = None
    seed: int = 0

    def weights_for(self, count: int) -> tuple[float, ...]:
        """A weight for each of `count` adapters.

        Raises:
            UsageError: not as many weights as adapters, one that is not finite, or a density that
                is missing, out of range or without use.
        """
        unfit = [weight for weight in self.weights if not isfinite(weight)]
        if unfit:
            raise UsageError(f"--weight {unfit[0]} is not a number to multiply an adapter by")
        if self.weights and len(self.weights) != count:
            raise UsageError(
                f"{len(self.weights)} --weight for {count} --adapter; give one for each"
            )
        if self.method in PRUNING and self.density is None:
            raise UsageError(
                f"--combine {self.method} needs --density, the share of values to keep"
            )
        if self.density is not None and self.method not in PRUNING:
            raise UsageError(
                f"--density has no meaning for --combine {self.method}, only for {', '.join(PRUNING)}"
            )
        if self.density is not None and not 0 < self.density <= 1:
            raise UsageError(f"--density {self.density:g} is not above 0 and at most 1")
        return self.weights or (1.0,) * count


def chosen_combination(
    method: str | None, weights: Sequence[float], density: float | None, seed: int | None
) -> Combination | None:
    """The combination that options ask for, None where none of them is given.

    Raises:
        UsageError: a method that does not exist, or a seed where nothing is chosen at random.
    """
    if method is not None and method not in METHODS:
        raise UsageError(f"--combine {method!r} is not one of {', '.join(METHODS)}")
    if seed is not None and method not in RANDOM:
        raise UsageError(f"--seed has no meaning without --combine {' or '.join(RANDOM)}")
    if method is None and not weights and density is None:
        return None
    chosen = next((m for m in METHODS if m == method), Combination.method)
    return Combination(chosen, tuple(weights), density, seed or Combination.seed)


def combine(
    adapters: Sequence[Checkpoint], source: Source, combination: Combination, target: Path
) -> Checkpoint:
    """Write the combined adapter as a checkpoint at `target`; `source` is the base of them all.

    Raises:
        Mismatch: the adapters are of different bases, quantizations or tasks.
        Unsupported: an adapter has a part that cannot be combined, named with the reason.
        CheckFailed: the updates cancel out, or have no weight.
        UsageError: see `Combination.weights_for`.
    """
    weights = combination.weights_for(len(adapters))
    _require_alike(adapters)
    read = [read_adapter(adapter.path) for adapter in adapters]
    for adapter, found in zip(adapters, read, strict=True):
        _require_plain(adapter, found)
    deltas = _combined(read, weights, combination)
    _require_effect(deltas, weights)
    first = adapters[0].manifest
    spec = _spec(adapters, deltas)
    manifest = Manifest(
        kind="adapter",
        task=first.task,
        tag=f"{first.tag[:160]}_{combination.method}{len(adapters)}",
        base=first.base,
        quantization=first.quantization,
        adapter=spec,
        lineage=(next_step(
            "combine",
            parents=[adapter.digest for adapter in adapters],
            seed=combination.seed if combination.method in RANDOM else None,
            options=_options(adapters, weights, combination),
        ),),
        probe=ProbeRecord(reference="the unmerged model with the combined adapter, in fp32"),
    )  # fmt: skip
    with new_checkpoint(target) as staging:
        copy_companions(staging, adapters[0].path)
        _write_adapter(staging, deltas, spec, read[0])
        _write_probe(staging, manifest, source, adapters[0])
        seal(staging, manifest)
    return open_checkpoint(target)


def _options(
    adapters: Sequence[Checkpoint], weights: Sequence[float], combination: Combination
) -> dict[str, Any]:
    options: dict[str, Any] = {
        "method": combination.method,
        "adapters": [adapter.manifest.tag for adapter in adapters],
        "weights": list(weights),
    }
    if combination.density is not None:
        options["density"] = combination.density
    steps = [step for adapter in adapters for step in adapter.manifest.lineage]
    if any(step.options.get(_IMPORTED) for step in steps):
        options[_IMPORTED] = "at least one of the adapters"
    return options


def _require_alike(adapters: Sequence[Checkpoint]) -> None:
    first = adapters[0]
    for other in adapters[1:]:
        ours, theirs = first.manifest, other.manifest
        for what, left, right in (
            ("task", ours.task, theirs.task),
            ("base", ours.base and ours.base.fingerprint, theirs.base and theirs.base.fingerprint),
            ("quantization of the base", ours.quantization, theirs.quantization),
        ):
            if left != right:
                raise Mismatch(f"{first.path} and {other.path}: not trained on the same {what}")


def _require_plain(adapter: Checkpoint, found: AdapterWeights) -> None:
    """What is no product of A and B has no meaning in a weighted sum."""
    bare = [d.module for d in found.deltas.values() if d.kind in ("parameter", "experts")]
    for what, names in (
        ("a DoRA magnitude", [d.module for d in found.deltas.values() if d.magnitude is not None]),
        ("a bias of B", [d.module for d in found.deltas.values() if d.bias is not None]),
        ("an update of a bare parameter", bare),
        ("a projection of VeRA", [d.module for d in found.deltas.values() if d.shared]),
        ("a parameter saved whole", sorted(found.saved)),
        ("single trained tokens", sorted(found.rows)),
    ):
        if names:
            raise Unsupported(
                f"{adapter.path}: {names[0]!r} has {what}, which cannot be combined with other adapters; "
                "merge them one after the other"
            )


def _combined(
    read: Sequence[AdapterWeights], weights: Sequence[float], combination: Combination
) -> dict[str, LoraDelta]:
    """The combined update of every module that any of the adapters has."""
    rank = max(delta.rank for found in read for delta in found.deltas.values())
    deltas = {}
    for module in sorted({module for found in read for module in found.deltas}):
        held = [
            (w, f.deltas[module]) for w, f in zip(weights, read, strict=True) if module in f.deltas
        ]
        deltas[module] = combined_delta(
            [delta for _, delta in held],
            [weight for weight, _ in held],
            combination.method,
            density=1.0 if combination.density is None else combination.density,
            rank=rank,
            generator=module_generator(combination.seed, module),
        )
    return deltas


def _require_effect(deltas: Mapping[str, LoraDelta], weights: Sequence[float]) -> None:
    told = " ".join(f"--weight {weight:g}" for weight in weights)
    for delta in deltas.values():
        if not all(bool(part.isfinite().all()) for part in (delta.a, delta.b)):
            raise UsageError(
                f"{told}: the combined update of {delta.module!r} is too large for float32; choose smaller weights"
            )
    if all(delta.empty for delta in deltas.values()):
        raise CheckFailed(
            f"{told}: the combined adapter changes no tensor, because the updates cancel out, have no "
            "weight or are untrained; choose other weights or adapters"
        )


def module_generator(seed: int, module: str) -> torch.Generator:
    """A random source for one module that depends on nothing but its name and the seed."""
    digest = hashlib.sha256(f"{seed}:{module}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _spec(adapters: Sequence[Checkpoint], deltas: Mapping[str, LoraDelta]) -> AdapterSpec:
    """The record of the combined adapter: scaling 1 everywhere, so alpha is the rank."""
    tensors: dict[str, str] = {}
    for adapter in adapters:
        assert adapter.manifest.adapter is not None
        tensors |= adapter.manifest.adapter.tensors
    rank, _ = Counter(delta.rank for delta in deltas.values()).most_common(1)[0]
    other = {re.escape(m): delta.rank for m, delta in deltas.items() if delta.rank != rank}
    first = adapters[0].manifest.adapter
    assert first is not None
    return AdapterSpec(
        rank=rank,
        alpha=rank,
        targets=tuple(sorted(deltas)),
        tensors=tensors,
        rank_pattern=other,
        alpha_pattern={name: float(value) for name, value in other.items()},
        trained_parameters=sum(delta.a.numel() + delta.b.numel() for delta in deltas.values()),
        total_parameters=first.total_parameters,
    )


def _write_adapter(
    directory: Path, deltas: Mapping[str, LoraDelta], spec: AdapterSpec, first: AdapterWeights
) -> None:
    tensors = {}
    for module, delta in deltas.items():
        part = "lora_embedding_{}" if delta.kind == "embedding" else "lora_{}.weight"
        tensors[f"{_PREFIX}{module}.{part.format('A')}"] = delta.a
        tensors[f"{_PREFIX}{module}.{part.format('B')}"] = delta.b
    fields = {
        "peft_type": "LORA",
        "task_type": first.config.task_type,
        "base_model_name_or_path": first.config.base_model,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "rank_pattern": spec.rank_pattern,
        "alpha_pattern": spec.alpha_pattern,
        "target_modules": list(spec.targets),
        "fan_in_fan_out": any(delta.fan_in_fan_out for delta in deltas.values()),
    }
    (directory / "adapter_config.json").write_bytes(canonical_json(fields))
    write_tensors(directory / "adapter_model.safetensors", tensors, metadata={"format": "pt"})


def _write_probe(staging: Path, manifest: Manifest, source: Source, first: Checkpoint) -> None:
    from qlx.models import load_model, make_probe

    probe = probe_of(first)
    model = load_model(Checkpoint(staging, manifest, ""), source)
    made = make_probe(model, manifest.task, probe.inputs, None, True)
    assert manifest.probe is not None
    write_probe(staging / manifest.probe.file, replace(made, labels=probe.labels))
