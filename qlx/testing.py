"""Assertions for your own test suite and CI: two lines in a pytest file stop a conversion that drifted.

::

    from qlx.testing import assert_equivalent, assert_verified

    def test_the_exported_model_is_the_one_we_trained():
        assert_verified("build/onnx")
        assert_equivalent("build/onnx", "build/merged", kl_mean=1e-8)

Under pytest the fixture `qlx_verify` does both, and adds what it measured to the JUnit file.
"""

from pathlib import Path

from qlx.recipe import DataSection
from qlx.verification import Report, to_markdown, verify

__all__ = ["assert_equivalent", "assert_verified"]


def assert_verified(
    checkpoint: str | Path, *, base: str | Path | None = None, **limits: float
) -> Report:
    """Assert that a checkpoint passes `qlx verify`; returns the report.

    `limits` tighten the step's own (`relative`, `max_abs`, `kl_mean`, `kl_p99`, `top1`,
    `top1_decided`, `retention`, `score_drop`, `loss_rise`).

    Raises:
        AssertionError: a check fails; the message is the report as a table.
        InputRefused: the checkpoint is corrupt, or its base is missing or another one.
    """
    __tracebackhide__ = True
    return _passing(verify(Path(checkpoint), base=base, tighten=limits))


def assert_equivalent(
    candidate: str | Path,
    reference: str | Path,
    *,
    base: str | Path | None = None,
    data: DataSection | str | Path | None = None,
    **limits: float,
) -> Report:
    """Assert that two checkpoints of any kinds give the same outputs on their common probe.

    With `data`, a recipe file or a data section, also on what it holds out. `limits` are those of
    `assert_verified`, and `layer_drift`.

    Raises:
        AssertionError: they differ by more than their steps allow, or than `limits`; the message
            is the report, which names the layer and the weight that moved most.
        Mismatch: they carry probes of different inputs.
    """
    __tracebackhide__ = True
    more = Path(data) if isinstance(data, str) else data
    against = Path(reference)
    return _passing(verify(Path(candidate), against=against, base=base, tighten=limits, data=more))


def _passing(report: Report) -> Report:
    __tracebackhide__ = True
    if not report.passed:
        raise AssertionError(to_markdown(report))
    return report
