"""The pytest plugin: a fixture `qlx_verify` in every suite of an environment that has qlx.

pytest finds it by its entry point. Only pytest is imported until a test uses the fixture.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from qlx.verification import Report

__all__ = ["qlx_verify"]


@pytest.fixture
def qlx_verify(record_property: Callable[[str, object], None]) -> "Callable[..., Report]":
    """`qlx_verify(checkpoint, against=None, base=None, data=None, **limits)`: assert, and report.

    Takes the arguments of `qlx.testing.assert_verified`, or with `against` those of
    `assert_equivalent`. The checkpoint's digest and every measured distance become properties of
    the test in pytest's JUnit file.
    """

    def verify(checkpoint: Any, against: Any = None, **options: Any) -> "Report":
        __tracebackhide__ = True
        from qlx.testing import assert_equivalent, assert_verified

        if against is None:
            report = assert_verified(checkpoint, **options)
        else:
            report = assert_equivalent(checkpoint, against, **options)
        record_property("qlx.digest", report.digest)
        for name, comparison in report.comparisons.items():
            for metric, value in comparison.metrics().items():
                record_property(f"qlx.{name}.{metric}", value)
        return report

    return verify
