"""What `verify` found, and its four renderings: table rows, JSON, JUnit XML, Markdown.

The renderings say the same thing in other words; none of them measures or decides anything.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from xml.etree import ElementTree

from qlx.checkpoint import Checkpoint
from qlx.verification.drift import Drift, LayerDrift
from qlx.verification.metrics import Comparison
from qlx.verification.thresholds import Check, Thresholds

__all__ = [
    "Report",
    "decided_note",
    "display_name",
    "drift_notes",
    "failure_notes",
    "layer_rows",
    "measured_rows",
    "noise_note",
    "rows",
    "score_rows",
    "tables",
    "to_json",
    "to_junit",
    "to_markdown",
    "weight_rows",
]

MEASURED = ("relative", "max_abs", "kl_mean", "kl_p99", "top1", "top1_decided", "retention")
WEIGHTS_SHOWN = 8
_BAR = 20  # characters of a full bar
_DECADES = (-8.0, 0.0)  # of a bar: 1e-8 is empty, 1 is full

Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class Report:
    """The result of one verification.

    `subject` names the checkpoint, `against` what it was compared with, on `inputs`; `comparisons`
    holds every measured distance by the name of the reference, `scores` the task's metrics of both
    where there are labels. `noise_floor` is the relative error that the precision alone makes, if
    known; `drift` what was found inside, if that was looked at. It passes when every check does; a
    report without a single comparison of outputs never passes.
    """

    subject: str
    kind: str
    task: str
    digest: str
    against: str
    checks: tuple[Check, ...]
    comparisons: Mapping[str, Comparison] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    inputs: str = ""
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    noise_floor: float | None = None
    drift: Drift | None = None

    @property
    def passed(self) -> bool:
        """Whether every check holds and outputs were compared at all."""
        return bool(self.comparisons) and all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that do not hold."""
        return tuple(check for check in self.checks if not check.passed)


def display_name(checkpoint: Checkpoint) -> str:
    """The last part of a checkpoint's path, and its adapter, if one of several is meant."""
    name = checkpoint.path.name or str(checkpoint.path)
    return name if checkpoint.adapter is None else f"{name} with {checkpoint.adapter}"


def decided_note(measured: Comparison | None, limits: Thresholds) -> list[str]:
    """How the positions were chosen whose arg max must be the same, where that is a limit."""
    if measured is None or limits.top1_decided is None:
        return []
    return [
        f"top1_decided: {measured.decided} of {measured.positions} positions count, those where the "
        "reference's two largest logits lie further apart than 2 × the allowed relative error × its "
        "largest |logit|; at the others a difference within the limits may swap them"
    ]


def noise_note(measured: Comparison | None, floor: float | None, what: str) -> list[str]:
    """The measured error as a multiple of the noise floor, where both are known."""
    if measured is None or not floor:
        return []
    ratio = measured.relative / floor
    return [f"noise floor: {what} is {floor:.3g} off; this checkpoint is at {ratio:.3g} × that"]


def failure_notes(failed: Iterable[Check], *, compared: bool) -> list[str]:
    """What to do about failed checks, as notes; `compared` says that another checkpoint was run too."""
    names = [check.name.partition(":")[0].partition(" of ")[0] for check in failed]
    advice = []
    if "own" in names:
        advice.append(
            "these files no longer give the outputs recorded when they were made: where their digests "
            "match, the libraries or the machine compute something else; compare versions with `qlx inspect`"
        )
    if "reference" in names:
        advice.append(
            "to see which layer moved, compare with the unmerged model: --against ADAPTER --base BASE; "
            "if that one passes `qlx verify` itself, make this checkpoint again from it"
        )
    if compared and {"against", "data"} & set(names):
        advice.append(
            "if one layer moved by itself, its weight is wrong; if all did, suspect another base, "
            "another scaling, or --onto and --dtype of the merge"
        )
    return [f"what to do: {text}" for text in advice]


def rows(report: Report) -> list[tuple[str, str, str, str]]:
    """(check, measured, limit, result) of each check, as text for a table."""
    return [(check.name, *_texts(check), _verdict(check)) for check in report.checks]


def measured_rows(report: Report) -> Rows:
    """A header and one row for each comparison: every distance, limited or not."""
    header = ("compared with", *MEASURED, "× noise")
    return [header, *(_distance_row(report, name) for name in report.comparisons)]


def _distance_row(report: Report, name: str) -> tuple[str, ...]:
    comparison = report.comparisons[name]
    metrics = comparison.metrics()
    ratio = comparison.relative / report.noise_floor if report.noise_floor else None
    return (name, *(_number(metrics.get(metric)) for metric in MEASURED), _number(ratio))


def score_rows(report: Report) -> Rows:
    """A header and one row for each side: the task's metrics; nothing where no labels are known."""
    if not report.scores:
        return []
    names = list(next(iter(report.scores.values())))
    scores = report.scores.items()
    return [("scores", *names), *((side, *(_number(v[n]) for n in names)) for side, v in scores)]


def layer_rows(report: Report) -> Rows:
    """A header and one row for each layer, with the drift it made itself as a bar."""
    if report.drift is None or not report.drift.layers:
        return []
    header = ("layer", "drift", "own drift", "retention", "own, 1e-8 … 1")
    return [header, *(_layer_row(layer) for layer in report.drift.layers)]


def _layer_row(layer: LayerDrift) -> tuple[str, ...]:
    return (
        layer.name,
        _number(layer.drift),
        _number(layer.own),
        _number(layer.retention),
        _bar(layer.own),
    )


def weight_rows(report: Report, count: int = WEIGHTS_SHOWN) -> Rows:
    """A header and the `count` weights that moved most, those that did not move left out."""
    if report.drift is None:
        return []
    ordered = sorted(report.drift.weights, key=lambda weight: -weight.drift)
    moved = [weight for weight in ordered if weight.drift > 0][:count]
    if not moved:
        return []
    return [
        ("weight", "drift", "adapter's change", "retention"),
        *((w.name, _number(w.drift), _number(w.change), _number(w.retention)) for w in moved),
    ]


def tables(report: Report) -> list[Rows]:
    """What was measured beside the checks: distances, scores, layers, weights; the first row heads."""
    found = [make(report) for make in (measured_rows, score_rows, layer_rows, weight_rows)]
    return [table for table in found if len(table) > 1]


def drift_notes(report: Report) -> list[str]:
    """Which layer and weight moved most, and what could not be seen; nothing if not looked inside."""
    drift = report.drift
    if drift is None:
        return []
    layer, weight = drift.worst_layer, drift.worst_weight
    notes = []
    if layer is not None:
        notes.append(f"moved most by itself: {layer.name} ({layer.own:.3g})")
    if weight is not None:
        still = sum(item.drift == 0 for item in drift.weights)
        notes.append(
            f"weight that moved most: {weight.name} ({weight.drift:.3g}); "
            f"{still} of {len(drift.weights)} are the same to the bit"
        )
    return [*notes, *drift.unseen]


def _bar(value: float) -> str:
    low, high = _DECADES
    if value <= 0:
        return ""
    share = (math.log10(value) - low) / (high - low)
    return "█" * max(0, min(_BAR, round(share * _BAR)))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _texts(check: Check) -> tuple[str, str]:
    """What was measured and the limit; the detail and maybe the limit alone where nothing was."""
    limit = "" if check.limit is None else f"{check.relation} {check.limit:g}"
    return check.texts() or (check.detail, limit)


def _verdict(check: Check) -> str:
    return "ok" if check.passed else "FAILED"


def to_json(report: Report) -> str:
    """One JSON object with every check, measurement and limit; keys sorted, never NaN."""
    value = {
        "subject": report.subject,
        "kind": report.kind,
        "task": report.task,
        "digest": report.digest,
        "against": report.against,
        "passed": report.passed,
        "checks": [asdict(check) for check in report.checks],
        "comparisons": {
            name: asdict(comparison) for name, comparison in report.comparisons.items()
        },
        "inputs": report.inputs,
        "scores": {side: dict(metrics) for side, metrics in report.scores.items()},
        "noise_floor": report.noise_floor,
        "drift": None if report.drift is None else asdict(report.drift),
        "notes": [*report.notes, *drift_notes(report)],
    }
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)


def to_junit(report: Report) -> str:
    """JUnit XML: one test case a check, so that a CI system shows which one failed."""
    suite = ElementTree.Element(
        "testsuite",
        name=f"qlx verify {report.subject}",
        tests=str(len(report.checks)),
        failures=str(len(report.failures)),
        errors="0",
    )
    for check in report.checks:
        case = ElementTree.SubElement(
            suite, "testcase", classname=f"qlx.{report.kind}", name=check.name
        )
        if not check.passed:
            message = " ".join(filter(None, _texts(check)))
            ElementTree.SubElement(case, "failure", message=message).text = check.detail
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def to_markdown(report: Report) -> str:
    """A heading with the verdict, then tables and bars, fit for a pull request's summary."""
    verdict = "passed" if report.passed else "FAILED"
    on = f", on {report.inputs}" if report.inputs else ""
    lines = [
        f"### qlx verify: {verdict}",
        "",
        f"`{report.subject}` ({report.kind}, {report.task}) against {report.against}{on}",
        "",
        *_markdown_table([("check", "measured", "limit", "result"), *rows(report)]),
    ]
    for table in tables(report):
        lines += ["", *_markdown_table(table)]
    lines += ["", *(f"- {note}" for note in (*report.notes, *drift_notes(report)))]
    return "\n".join(lines).rstrip() + "\n"


def _markdown_table(table: Iterable[tuple[str, ...]]) -> list[str]:
    header, *body = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in table)
    columns = header.count("|") + 1
    return [f"| {header} |", "|" + "---|" * columns, *(f"| {row} |" for row in body)]
