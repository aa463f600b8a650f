"""Is this checkpoint still the model that training saw? Metrics, limits, replay, report.

Needs numpy; torch or onnxruntime only when a checkpoint is actually run.
"""

from qlx.verification.base import base_of, find_base, needs_base
from qlx.verification.drift import Drift, LayerDrift, WeightDrift
from qlx.verification.evaluate import EvalResult, evaluate, recorded_data
from qlx.verification.judge import judge, noise_floor, probe_result, verify_outputs
from qlx.verification.metrics import Comparison, Tally, compare
from qlx.verification.picture import check_picture, draw
from qlx.verification.prove import judged, prove, sealed
from qlx.verification.replay import Predictor, predictor_of, probe_of, replay
from qlx.verification.report import Report, rows, tables, to_json, to_junit, to_markdown
from qlx.verification.thresholds import (
    DEFAULT_MIN_RETENTION,
    Check,
    Thresholds,
    against_thresholds,
    check_comparison,
    later_steps,
    lossy_steps,
    own_thresholds,
    reference_thresholds,
    shown,
    tightened,
)
from qlx.verification.verify import verify

__all__ = [
    "DEFAULT_MIN_RETENTION",
    "Check",
    "Comparison",
    "Drift",
    "EvalResult",
    "LayerDrift",
    "Predictor",
    "Report",
    "Tally",
    "Thresholds",
    "WeightDrift",
    "against_thresholds",
    "base_of",
    "check_comparison",
    "check_picture",
    "compare",
    "draw",
    "evaluate",
    "find_base",
    "judge",
    "judged",
    "later_steps",
    "lossy_steps",
    "needs_base",
    "noise_floor",
    "own_thresholds",
    "predictor_of",
    "probe_of",
    "probe_result",
    "prove",
    "recorded_data",
    "reference_thresholds",
    "replay",
    "rows",
    "sealed",
    "shown",
    "tables",
    "tightened",
    "to_json",
    "to_junit",
    "to_markdown",
    "verify",
    "verify_outputs",
]
