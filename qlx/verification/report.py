"""What `verify` found, and its four renderings: table rows, JSON, JUnit XML, Markdown.

The renderings say the same thing in other words; none of them measures or decides anything.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from xml.etree import ElementTree

from qlx.verification.metrics import Comparison
from qlx.verification.thresholds import Check

__all__ = ["Report", "rows", "to_json", "to_junit", "to_markdown"]


@dataclass(frozen=True)
class Report:
    """The result of one verification.

    `subject` names the checkpoint, `against` what it was compared with, `comparisons` holds every
    measured distance by the name of the reference. It passes when every check does; a report
    without a single comparison of outputs never passes.
    """

    subject: str
    kind: str
    task: str
    digest: str
    against: str
    checks: tuple[Check, ...]
    comparisons: Mapping[str, Comparison] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every check holds and outputs were compared at all."""
        return bool(self.comparisons) and all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that do not hold."""
        return tuple(check for check in self.checks if not check.passed)


def rows(report: Report) -> list[tuple[str, str, str, str]]:
    """(check, measured, limit, result) of each check, as text for a table."""
    return [
        (check.name, _measured(check), _limit(check), _verdict(check)) for check in report.checks
    ]


def _measured(check: Check) -> str:
    return check.detail if check.value is None else f"{check.value:.4g}"


def _limit(check: Check) -> str:
    return "" if check.limit is None else f"{check.relation} {check.limit:g}"


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
        "notes": list(report.notes),
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
            message = " ".join(filter(None, (_measured(check), _limit(check))))
            ElementTree.SubElement(case, "failure", message=message).text = check.detail
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def to_markdown(report: Report) -> str:
    """A heading with the verdict and a table of the checks, fit for a pull-request comment."""
    verdict = "passed" if report.passed else "FAILED"
    lines = [
        f"### qlx verify: {verdict}",
        "",
        f"`{report.subject}` ({report.kind}, {report.task}) against {report.against}",
        "",
        "| check | measured | limit | result |",
        "|---|---|---|---|",
    ]
    lines += [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows(report)
    ]
    lines += ["", *(f"- {note}" for note in report.notes)]
    return "\n".join(lines).rstrip() + "\n"
