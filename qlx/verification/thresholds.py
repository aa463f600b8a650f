"""What each step is allowed to change, in one table, with the reason that a report prints.

A limit follows from the kind of step alone. It can be tightened by a caller and never loosened.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf

from qlx.checkpoint import Manifest, Step
from qlx.errors import UsageError
from qlx.verification.drift import Drift
from qlx.verification.metrics import Comparison

__all__ = [
    "DEFAULT_MIN_RETENTION",
    "Check",
    "Thresholds",
    "against_thresholds",
    "check_comparison",
    "later_steps",
    "layer_checks",
    "lossy_steps",
    "own_thresholds",
    "reference_thresholds",
    "require_sensible",
    "rounded_thresholds",
    "shown",
    "tightened",
]

EXACT_TORCH = 1e-5
"""Relative error of a torch model that computes the same function in fp32 (summation order only)."""
EXACT_RUNTIME = 1e-4
"""Relative error across runtimes (other kernels, fused operators) or across a packed format's kernels."""
ROUNDED_INPUTS = "8-bit inputs"
"""What a kernel of accuracy level 4 rounds to: each run of a layer's inputs to 8 bits of its largest."""
ROUNDED_HEAD = "an 8-bit head"
"""What `export-onnx --head int8` rounds to: each group of the head's weights to 8 bits of its largest."""
UNIT_ROUNDOFF: Mapping[str, float] = {
    "bfloat16": 2.0**-8,
    "float16": 2.0**-11,
    ROUNDED_INPUTS: 2.0**-8,
    ROUNDED_HEAD: 2.0**-8,
}
"""Largest relative error of rounding one normal number to the dtype (of 8 bits: of the largest number)."""
ROUNDING_GROWTH = 8.0
"""How many times the unit roundoff a few rounded layers may move the logits."""
DEFAULT_MIN_RETENTION = 0.9
"""Share of the adapter's effect that a lossy step must keep unless the user asked for another gate."""


@dataclass(frozen=True)
class Check:
    """One thing that was checked: what was measured, against which limit, and whether it holds.

    `relation` is "≤" or "≥" where there are numbers, empty where the check is a yes or a no.
    """

    name: str
    passed: bool
    detail: str
    value: float | None = None
    limit: float | None = None
    relation: str = ""

    def texts(self) -> tuple[str, str] | None:
        """The measured value and the limit with its relation, as text; None where there are none."""
        if self.value is None or self.limit is None:
            return None
        value, limit = shown(self.value, self.limit)
        return value, f"{self.relation} {limit}"


@dataclass(frozen=True)
class Thresholds:
    """Limits of one comparison; None is no limit. `reason` says where they come from.

    `relative`, `max_abs`, `kl_mean`, `kl_p99`, `score_drop` (of accuracy, or accuracy per token),
    `loss_rise` (nats) and `layer_drift` (of any layer by itself, see `LayerDrift.own`) are upper
    limits; `top1`, `top1_decided` and `retention` lower ones.
    """

    reason: str
    relative: float | None = None
    max_abs: float | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1: float | None = None
    top1_decided: float | None = None
    retention: float | None = None
    score_drop: float | None = None
    loss_rise: float | None = None
    layer_drift: float | None = None

    def limits(self) -> dict[str, float]:
        """The limits that are set, by metric name."""
        values = {name: getattr(self, name) for name in (*_UPPER, *_LOWER)}
        return {name: value for name, value in values.items() if value is not None}


_MAKES_REFERENCE = ("train", "save-adapter")
_LAYER_DRIFT = "layer_drift"
_UPPER = ("relative", "max_abs", "kl_mean", "kl_p99", "score_drop", "loss_rise", _LAYER_DRIFT)
_LOWER = ("top1", "top1_decided", "retention")
_UNKNOWN = {
    "retention": "the base's outputs are unknown, or the adapter has no effect on these inputs",
    "score_drop": "the inputs have no labels",
    "loss_rise": "the inputs have no labels",
    _LAYER_DRIFT: "the layers are not visible",
}


_RANGES: Mapping[str, tuple[float, float]] = {
    **dict.fromkeys(("relative", "max_abs", "kl_mean", "kl_p99", _LAYER_DRIFT), (0.0, inf)),
    **dict.fromkeys(_LOWER, (0.0, 1.0)),
    "score_drop": (-1.0, 1.0),
    "loss_rise": (-inf, inf),
}
"""Between which values each limit has a meaning."""


def shown(value: float, limit: float) -> tuple[str, str]:
    """A value and its limit as text, with as many digits as tell which of the two is larger.

    From 4 digits for the value and 6 for the limit up, so that what fails never reads as if it held.
    """
    order = (value > limit) - (value < limit)
    for digits in range(4, 18):
        left, right = f"{value:.{digits}g}", f"{limit:.{max(digits, 6)}g}"
        if (float(left) > float(right)) - (float(left) < float(right)) == order:
            break
    return left, right


def require_sensible(limits: Mapping[str, float]) -> None:
    """Check the limits that a caller sets by name.

    Raises:
        UsageError: a name is unknown, or its value is one that the metric cannot have.
    """
    for name, value in limits.items():
        if name not in _RANGES:
            raise UsageError(f"there is no limit called {name!r}; choose from {', '.join(_RANGES)}")
        low, high = _RANGES[name]
        if not low <= value <= high:
            allowed = f"at least {low:g}" if high == inf else f"between {low:g} and {high:g}"
            raise UsageError(f"the limit {name}={value:g} has no meaning: {name} is {allowed}")


def tightened(thresholds: Thresholds, tighten: Mapping[str, float] | None) -> Thresholds:
    """The same limits, made stricter by name.

    Raises:
        UsageError: see `require_sensible`, or a value would loosen the limit.
    """
    require_sensible(tighten or {})
    for name, value in (tighten or {}).items():
        current: float | None = getattr(thresholds, name)
        looser = current is not None and (value > current if name in _UPPER else value < current)
        if looser:
            raise UsageError(
                f"{name}={value:g} is looser than this step's own limit {current:g}; limits only tighten"
            )
        thresholds = replace(thresholds, reason=thresholds.reason, **{name: value})
    return thresholds


def check_comparison(
    name: str,
    comparison: Comparison,
    thresholds: Thresholds,
    changes: Mapping[str, float] | None = None,
) -> list[Check]:
    """One check for every limit of outputs that is set; `changes` are those of the task's metrics.

    A metric that could not be measured fails its limit.
    """
    measured = {**comparison.metrics(), **(changes or {})}
    limits = {k: v for k, v in thresholds.limits().items() if k != _LAYER_DRIFT}
    return [
        _check(name, metric, measured.get(metric), limit, thresholds)
        for metric, limit in limits.items()
    ]


def layer_checks(drift: Drift, thresholds: Thresholds) -> list[Check]:
    """One check for every layer, if a limit for layers is set; a failed one if none is visible."""
    limit = thresholds.layer_drift
    if limit is None:
        return []
    if not drift.layers:
        return [_check("layers", _LAYER_DRIFT, None, limit, thresholds)]
    return [
        _check(layer.name, _LAYER_DRIFT, layer.own, limit, thresholds) for layer in drift.layers
    ]


def _check(
    name: str, metric: str, value: float | None, limit: float, thresholds: Thresholds
) -> Check:
    within = value is not None and (value <= limit if metric in _UPPER else value >= limit)
    unknown = f"could not be measured: {_UNKNOWN.get(metric, 'unknown')}"
    detail = thresholds.reason if value is not None else unknown
    relation = "≤" if metric in _UPPER else "≥"
    return Check(f"{name}: {metric}", within, detail, value, limit, relation)


def later_steps(manifest: Manifest) -> tuple[Step, ...]:
    """The steps since the probe's reference was made, by training or by importing an adapter.

    What happened to the base before that is part of what training saw.
    """
    made = [at for at, step in enumerate(manifest.lineage) if step.command in _MAKES_REFERENCE]
    return manifest.lineage[made[-1] + 1 :] if made else manifest.lineage


def lossy_steps(manifest: Manifest) -> tuple[Step, ...]:
    """The later steps after which the model no longer computes what training saw.

    They are: a merge onto the original base, a merge or an export in 16 bits, an export whose kernels
    round their inputs or whose head is rounded, and any pack.
    """
    return tuple(step for step in later_steps(manifest) if _is_lossy(step))


def _is_lossy(step: Step) -> bool:
    if step.command == "merge":
        return step.options.get("exact") is not True
    if step.command == "export-onnx":
        # other precisions keep the codes that training saw
        told = step.options
        rounds = told.get("accuracy_level") or told.get("head")
        return bool(rounds) or told.get("precision") == "fp16"
    return step.command == "pack"


def own_thresholds(kind: str) -> Thresholds:
    """Limits for a lossy checkpoint's replay against the outputs recorded when it was made."""
    if kind == "merged":
        return Thresholds(
            "the same weights in fp32: only the order of sums may differ", EXACT_TORCH, top1=1.0
        )
    return Thresholds("the same weights through another kernel", EXACT_RUNTIME, top1_decided=1.0)


def reference_thresholds(manifest: Manifest, native: float | None, has_base: bool) -> Thresholds:
    """Limits for a replay against the unmerged model as trained.

    `native` is the relative error that the unmerged model itself makes in training's compute
    dtype (None: unknown); a step that rounds to 16 bits may make twice that, or the dtype's own
    bound, whichever is larger; where the user allowed a merge to erase more, the gate on retention
    gives way by as much. Packed and onto-original checkpoints are judged by retention, which
    exists where the probe holds the base's outputs (`has_base`).
    """
    lossy = lossy_steps(manifest)
    packs = [step for step in lossy if step.command == "pack"]
    if packs and has_base:
        gate = max(_number(step, "min_retention", DEFAULT_MIN_RETENTION) for step in packs)
        return Thresholds("the gate that pack was run with", retention=gate)
    if packs:
        return Thresholds("packed without an adapter: the price is stated, not gated")
    quantized = manifest.quantization.quantized  # else the original base is the one training saw
    if quantized and any(step.options.get("onto") == "original" for step in lossy):
        return Thresholds("merged onto the original base: the price is stated, not gated")
    if lossy:
        return _rounded(lossy, native, has_base)
    if manifest.kind == "onnx":
        return Thresholds("fp32 in another runtime", EXACT_RUNTIME, top1_decided=1.0)
    return Thresholds("fp32, the same function as in training", EXACT_TORCH, top1=1.0)


def against_thresholds(
    candidate: Manifest, other: Manifest, has_base: bool, native: float | None = None
) -> Thresholds:
    """Limits for two checkpoints of any kinds compared with each other.

    `native` is the noise floor of their common probe, as in `reference_thresholds`.

    Two that went through the same lossy steps (or none) compute the same function, and their
    tolerances add up. Otherwise the one that lost something is judged as against the reference,
    and where that has no limit, by the default retention.
    """
    if lossy_steps(candidate) == lossy_steps(other):
        allowed = sum(_exact(manifest) for manifest in (candidate, other))
        return Thresholds(
            "the same function twice; both tolerances add up", allowed, top1_decided=1.0
        )
    sides = [reference_thresholds(manifest, native, has_base) for manifest in (candidate, other)]
    kept = [side.retention for side in sides if side.retention is not None]
    relative = [side.relative for side in sides if side.relative is not None]
    if len(relative) == 2:
        return Thresholds("the tolerances of both add up", sum(relative), top1_decided=1.0)
    if has_base:
        return Thresholds(
            "the lower of the gates", retention=min(kept, default=DEFAULT_MIN_RETENTION)
        )
    return Thresholds("no base to measure retention by", top1=DEFAULT_MIN_RETENTION)


def _exact(manifest: Manifest) -> float:
    return EXACT_RUNTIME if manifest.kind in ("onnx", "packed") else EXACT_TORCH


def rounded_thresholds(manifest: Manifest, native: float | None) -> Thresholds:
    """Limits for a checkpoint whose last step rounded, against what that step was given.

    `native` as in `reference_thresholds`.
    """
    return _rounded(lossy_steps(manifest)[-1:], native, False)


def _rounded(lossy: tuple[Step, ...], native: float | None, has_base: bool) -> Thresholds:
    dtypes = sorted({dtype for step in lossy for dtype in _rounded_dtypes(step)})
    bound = max(
        ROUNDING_GROWTH * max(UNIT_ROUNDOFF[dtype] for dtype in dtypes), 2 * (native or 0.0)
    )
    allowed = max(_number(step, "max_erased", 0.0) for step in lossy)
    kept = min(DEFAULT_MIN_RETENTION, 1.0 - allowed) if has_base else None
    return Thresholds(f"rounded to {', '.join(dtypes)}", bound, top1_decided=1.0, retention=kept)


def _rounded_dtypes(step: Step) -> tuple[str, ...]:
    """Keys of `UNIT_ROUNDOFF`."""
    by_option = {"accuracy_level": ROUNDED_INPUTS, "head": ROUNDED_HEAD}
    found = tuple(dtype for option, dtype in by_option.items() if step.options.get(option))
    dtype = str(step.options.get("dtype"))
    if step.command == "export-onnx":
        return found if step.options.get("precision") != "fp16" else (*found, "float16")
    return (dtype if dtype in UNIT_ROUNDOFF else "float16",)


def _number(step: Step, option: str, default: float) -> float:
    value = step.options.get(option)
    return float(value) if isinstance(value, int | float) else default
