"""Runs of the tiny models: what they hold, that they learned, and that they replay."""

import numpy as np
import pytest

from qlx.checkpoint import open_checkpoint, read_probe, resolve_source
from qlx.models import forward_logits, load_base, load_model, make_probe
from qlx.training import train
from tests.conftest import DIGITS_RUN, recipe_of

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


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_the_probe_knows_the_base_without_the_trained_biases(bias, digits_base, tmp_path):
    """PEFT leaves biases that were trained in place on when the adapter is off."""
    adapter, training = {"rank": 4, "alpha": 6, "bias": bias}, {"max_steps": 6, "batch_size": 16}
    recipe = recipe_of(DIGITS_RUN, digits_base, adapter=adapter, training=training)
    run = train(recipe, tmp_path / "run")
    probe, task = read_probe(run.path), "image-classification"
    plain = load_base(digits_base, task, quant=run.manifest.quantization)
    np.testing.assert_allclose(
        probe.base, forward_logits(plain, task, probe.inputs), rtol=1e-5, atol=1e-5
    )
    again = make_probe(
        load_model(run, resolve_source(str(digits_base))), task, probe.inputs, None, True
    )
    np.testing.assert_array_equal(again.base, probe.base)
    np.testing.assert_array_equal(again.reference, probe.reference)
