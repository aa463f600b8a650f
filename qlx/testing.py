"""Assertions for your own test suite and CI: two lines in a pytest file stop a conversion that drifted.

::

    from qlx.testing import assert_equivalent, assert_verified

    def test_the_exported_model_is_the_one_we_trained():
        assert_verified("build/onnx")
        assert_equivalent("build/onnx", "build/merged", kl_mean=1e-8)
"""

from pathlib import Path

from qlx.verification import Report, to_markdown, verify

__all__ = ["assert_equivalent", "assert_verified"]


def assert_verified(
    checkpoint: str | Path, *, base: str | Path | None = None, **limits: float
) -> Report:
    """Assert that a checkpoint passes `qlx verify`; returns the report.

    `limits` tighten the step's own (`relative`, `max_abs`, `kl_mean`, `kl_p99`, `top1`,
    `top1_decided`, `retention`).

    Raises:
        AssertionError: a check fails; the message is the report as a table.
        InputRefused: the checkpoint is corrupt, or its base is missing or another one.
    """
    __tracebackhide__ = True
    return _passing(verify(Path(checkpoint), base=base, tighten=limits))


def assert_equivalent(
    candidate: str | Path, reference: str | Path, *, base: str | Path | None = None, **limits: float
) -> Report:
    """Assert that two checkpoints of any kinds give the same outputs on their common probe.

    Raises:
        AssertionError: they differ by more than their steps allow, or than `limits`.
        Mismatch: they carry probes of different inputs.
    """
    __tracebackhide__ = True
    return _passing(verify(Path(candidate), against=Path(reference), base=base, tighten=limits))


def _passing(report: Report) -> Report:
    __tracebackhide__ = True
    if not report.passed:
        raise AssertionError(to_markdown(report))
    return report
