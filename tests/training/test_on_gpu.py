"""Training where there is a GPU: the run is proven on the CPU, as every later step will see it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qlx.merging import merge
from qlx.training import train
from qlx.training.trainers import StrictTrainer
from qlx.verification import verify
from tests.conftest import DIGITS_RUN, PYTHON_RUN, recipe_of

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")

SHORT = {"max_steps": 30, "batch_size": 16, "learning_rate": 4e-3, "log_every": 5}
QUANTIZED = {
    "plain": None,
    "nf4": {"quant_type": "nf4", "double_quant": True},
    "int4": {"quant_type": "int4", "group_size": 32},
    "ternary": {"quant_type": "ternary", "group_size": 32},
}


def _recipe(run, path, **changes):
    changes["training"] = SHORT | changes.pop("training", {})
    return recipe_of(run, path, **changes)


@needs_gpu
@pytest.mark.parametrize("scheme", QUANTIZED)
def test_a_run_trained_on_a_gpu_merges_and_verifies_on_the_cpu(scheme, python_base, tmp_path):
    recipe = _recipe(PYTHON_RUN, python_base, quantization=QUANTIZED[scheme])
    run = train(recipe, tmp_path / "run")
    merged = merge(python_base, [run.path], tmp_path / "merged")
    assert verify(merged.path).passed


@needs_gpu
@pytest.mark.parametrize("mode", ["manual", "hf"])
def test_convolutions_of_pictures_do_not_spoil_the_probe(mode, digits_base, tmp_path):
    """A GPU multiplies convolutions in TensorFloat32, which is a thousand times as coarse."""
    quantization = {**QUANTIZED["nf4"], "mode": mode}
    run = train(_recipe(DIGITS_RUN, digits_base, quantization=quantization), tmp_path / "run")
    assert run.manifest.probe.results[0].metrics["relative_max"] < 1e-5


@needs_gpu
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_small_optimizers_learn(optimizer, python_base, tmp_path):
    training = {"optimizer": optimizer, "max_steps": 40}
    run = train(_recipe(PYTHON_RUN, python_base, training=training), tmp_path / "run")
    scores = run.manifest.lineage[-1].options
    assert scores["after"]["loss"] < scores["before"]["loss"] - 0.1


@needs_gpu
def test_a_bfloat16_base_is_multiplied_in_bfloat16(python_base, tmp_path, monkeypatch):
    """The adapter's factors are float32 and stay so; what they are multiplied with is not widened."""
    seen = set()
    loss = StrictTrainer.training_step

    def watching(self, model, *args, **kwargs):
        with Products(seen):
            return loss(self, model, *args, **kwargs)

    monkeypatch.setattr(StrictTrainer, "training_step", watching)
    narrow = {**PYTHON_RUN, "base": {"path": "", "dtype": "bfloat16"}}
    train(_recipe(narrow, python_base, training={"max_steps": 6}), tmp_path / "run")
    assert seen == {torch.bfloat16}


class Products(TorchDispatchMode):
    """Notes the dtypes that LoRA's products are computed in."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) == "aten.addmm_.default":
            self.seen.update(one.dtype for one in args)
        return func(*args, **(kwargs or {}))


@needs_gpu
def test_an_exact_adapter_has_the_same_codes_on_the_cpu(python_base, tmp_path):
    adapter = {"rank": 4, "alpha": 6, "exact": True}
    recipe = _recipe(PYTHON_RUN, python_base, adapter=adapter, quantization=QUANTIZED["int4"])
    run = train(recipe, tmp_path / "run")
    assert run.manifest.probe.results[0].passed
    assert verify(run.path, base=python_base).passed
