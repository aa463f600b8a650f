"""The run's report: a loss curve as a picture, and one HTML page that needs nothing else."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlx.checkpoint import Manifest, Probe

__all__ = ["RunSummary", "write_report"]


@dataclass(frozen=True)
class RunSummary:
    """What the report shows."""

    manifest: Manifest
    metrics: list[dict[str, float]]

    @classmethod
    def of(cls, job: Any, manifest: Manifest, outcome: Any, metrics: list[dict[str, float]], probe: Probe) -> "RunSummary":
        """Gather it from a finished training."""
        return cls(manifest, metrics)


def write_report(directory: Path, summary: RunSummary) -> None:
    """Write `loss.png` and `report.html` into `directory`."""
