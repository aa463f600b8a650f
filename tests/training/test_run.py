"""Runs of the tiny models: what they hold, that they learned, and that they replay."""

import numpy as np
import pytest

from qlx.checkpoint import open_checkpoint, read_probe, resolve_source
from qlx.models import forward_logits, load_model

RUNS = ("digits_run", "digits_run_fp4", "python_run", "python_run_fp4")
BASES = ("digits_base", "python_base")


@pytest.mark.parametrize("name", RUNS)
def test_adapter_run_learned(name, request):
    step = open_checkpoint(request.getfixturevalue(name)).manifest.lineage[-1]
    before, after = step.options["before"], step.options["after"]
    print(name, before, after)
    assert after["loss"] < before["loss"] - 0.2


@pytest.mark.parametrize("name", RUNS + BASES)
def test_replays_from_disk(name, request):
    path = request.getfixturevalue(name)
    checkpoint = open_checkpoint(path)
    probe = read_probe(path)
    base = None
    if checkpoint.manifest.base is not None:
        base = resolve_source(str(request.getfixturevalue(name.split("_")[0] + "_base")))
    logits = forward_logits(load_model(checkpoint, base), checkpoint.manifest.task, probe.inputs)
    np.testing.assert_allclose(
        logits, probe.reference, rtol=0, atol=1e-5 * np.abs(probe.reference).max()
    )
    if probe.base is not None:
        assert np.abs(probe.base - probe.reference).max() > 0.1 * np.abs(probe.reference).max()
