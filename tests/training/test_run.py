"""Runs of the tiny models: what they hold, that they learned, and that they replay."""

import numpy as np
import pytest

from qlx.checkpoint import held, open_checkpoint, read_probe, resolve_source
from qlx.errors import UsageError
from qlx.models import forward_logits, load_model
from qlx.training import train
from tests.conftest import DIGITS_BASE, recipe_of

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


def test_the_state_of_a_living_training_and_a_checkpoint_in_its_place_are_left_alone(tmp_path):
    work = tmp_path / "run.partial"
    work.mkdir()
    with held(work), pytest.raises(UsageError, match=r"run\.partial: another command is writing"):
        train(recipe_of(DIGITS_BASE), tmp_path / "run")
    (work / "qlx.json").write_text("mine")
    with pytest.raises(UsageError, match=r"run\.partial: is a checkpoint"):
        train(recipe_of(DIGITS_BASE), tmp_path / "run", force=True)
    assert (work / "qlx.json").read_text() == "mine"
