"""The loops: what is trained and what is not, in which order, and when it stops."""

import numpy as np
import pytest
import torch

from qlx.adapters import attach_adapter
from qlx.checkpoint import open_checkpoint, read_probe, resolve_source
from qlx.errors import CheckFailed, MissingExtra, Unsupported, UsageError
from qlx.models import forward_logits, load_base, load_model
from qlx.recipe import AdapterSection
from qlx.training import parameter_table, train
from qlx.training.progress import read_metrics
from qlx.training.trainable import require_in_optimizer, require_only_adapter
from qlx.training.trainers import EpochSampler
from qlx.weights import read_tensors
from tests.conftest import DIGITS_RUN, PYTHON_RUN, recipe_of

FEW = {"max_steps": 3, "batch_size": 8, "learning_rate": 1e-3, "log_every": 1}


def _small(content, path, **sections):
    data = {**content["data"], "train_limit": 48, "eval_limit": 16}
    return recipe_of(content, path, **{"data": data, "training": FEW, **sections})


@pytest.fixture
def adapted(digits_base):
    section = AdapterSection(rank=2, alpha=3, target_modules=("q_proj", "fc1"))
    return attach_adapter(load_base(digits_base, "image-classification"), section), section


def test_only_the_adapter_is_trainable(adapted):
    model, section = adapted
    require_only_adapter(model, section)
    table = parameter_table(model)
    assert [(row.group, row.tensors) for row in table.rows] == [("lora fc1", 4), ("lora q_proj", 4)]
    assert (
        table.trained
        == sum(row.parameters for row in table.rows)
        == 2 * (2 * (64 + 64) + 2 * (64 + 128))
    )
    assert "trained of all" in table.lines()[-1]
    model.get_base_model().classifier.bias.requires_grad_(True)
    with pytest.raises(CheckFailed, match=r"classifier\.bias"):
        require_only_adapter(model, section)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(CheckFailed, match="no trainable"):
        require_only_adapter(model, section)


@pytest.mark.parametrize(
    ("bias", "allowed"), [("none", False), ("lora_only", False), ("all", True)]
)
def test_biases_are_trained_only_when_asked_for(adapted, bias, allowed):
    model, section = adapted
    model.get_base_model().vit.layers[0].attention.k_proj.bias.requires_grad_(True)
    section = section.model_copy(update={"bias": bias})
    if allowed:
        require_only_adapter(model, section)
    else:
        with pytest.raises(CheckFailed, match="k_proj"):
            require_only_adapter(model, section)


def test_optimizer_holds_exactly_the_trainable_parameters(adapted):
    model, _ = adapted
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    frozen = next(parameter for parameter in model.parameters() if not parameter.requires_grad)
    require_in_optimizer(model, torch.optim.AdamW(trained))
    with pytest.raises(CheckFailed, match="not in the optimizer"):
        require_in_optimizer(model, torch.optim.AdamW(trained[1:]))
    with pytest.raises(CheckFailed, match="must not be trained"):
        require_in_optimizer(model, torch.optim.AdamW([*trained, frozen]))


def test_order_depends_on_seed_and_epoch_only():
    first, again = EpochSampler(50, 1), EpochSampler(50, 1)
    assert list(first) == list(again)
    first.set_epoch(1)
    assert list(first) != list(again)
    assert sorted(first) == list(range(50))
    assert list(EpochSampler(50, 2)) != list(again)


@pytest.mark.parametrize("content", [DIGITS_RUN, PYTHON_RUN], ids=["vision", "language"])
def test_loss_that_is_no_number_stops(content, digits_base, python_base, tmp_path):
    base = digits_base if content is DIGITS_RUN else python_base
    recipe = _small(
        content, base, training={**FEW, "max_steps": 9, "learning_rate": 1e30, "warmup_ratio": 0}
    )
    with pytest.raises(CheckFailed, match=r"step \d+; lower training.learning_rate"):
        train(recipe, tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["manual", "hf"])
def test_adapter_of_a_quantized_language_model_keeps_its_dtype(mode, python_base, tmp_path):
    """TRL rounds it to bfloat16 otherwise."""
    quantization = {**PYTHON_RUN["quantization"], "mode": mode}
    run = train(_small(PYTHON_RUN, python_base, quantization=quantization), tmp_path / mode)
    tensors = read_tensors(run.path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in tensors.values())


def test_both_quantization_modes_train_the_same(python_base, tmp_path):
    runs = {}
    for mode in ("manual", "hf"):
        recipe = _small(
            PYTHON_RUN, python_base, quantization={**PYTHON_RUN["quantization"], "mode": mode}
        )
        runs[mode] = train(recipe, tmp_path / mode)
    first, second = (read_tensors(run.path / "adapter_model.safetensors") for run in runs.values())
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-3, atol=1e-5)
    prints = [run.manifest.quantization.fingerprint for run in runs.values()]
    assert prints[0] == prints[1]


@pytest.mark.parametrize("content", [DIGITS_RUN, PYTHON_RUN], ids=["vision", "language"])
def test_bfloat16_training_replays(content, digits_base, python_base, tmp_path):
    base = digits_base if content is DIGITS_RUN else python_base
    quantization = {"quant_type": "nf4", "compute_dtype": "bfloat16"}
    recipe = _small(
        {**content, "base": {"path": "BASE", "dtype": "bfloat16"}}, base, quantization=quantization
    )
    run = train(recipe, tmp_path / "run")
    probe = read_probe(run.path)
    assert probe.native is not None
    noise = np.abs(probe.native - probe.reference).max() / np.abs(probe.reference).max()
    assert 0 < noise < 0.1
    assert run.manifest.quantization.extras["stored_dtype"] == "bfloat16"
    logits = forward_logits(load_model(run, resolve_source(str(base))), recipe.task, probe.inputs)
    np.testing.assert_allclose(
        logits, probe.reference, rtol=0, atol=1e-5 * np.abs(probe.reference).max()
    )


def test_new_head_is_trained_and_stored(digits_base, tmp_path):
    from PIL import Image

    random = np.random.default_rng(0)
    for name in ("cat", "dog", "eel"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for at in range(6):
            picture = random.integers(0, 256, (16, 16, 3)).astype(np.uint8)
            Image.fromarray(picture).save(tmp_path / "images" / name / f"{at}.png")
    data = {"source": "images", "path": str(tmp_path / "images"), "eval_fraction": 0.34}
    with pytest.raises(Unsupported, match="modules_to_save"):
        train(recipe_of(DIGITS_RUN, digits_base, data=data, training=FEW), tmp_path / "run")
    adapter = {"rank": 2, "alpha": 3, "modules_to_save": ["classifier"]}
    run = train(
        recipe_of(DIGITS_RUN, digits_base, data=data, training=FEW, adapter=adapter),
        tmp_path / "run",
    )
    assert read_probe(run.path).reference.shape == (6, 3)
    assert "classifier" in run.manifest.adapter.modules_to_save
    assert run.manifest.lineage[-1].options["data"]["path"] == "images", (
        "no absolute path in the manifest"
    )
    model = load_model(run, resolve_source(str(digits_base)))
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "eel"}


def test_plain_fine_tuning_without_adapter(digits_base, tmp_path):
    recipe = _small(DIGITS_RUN, digits_base, adapter=None, quantization=None)
    run = train(recipe, tmp_path / "run")
    assert run.manifest.adapter.type == "full"
    assert run.manifest.adapter.trained_parameters == run.manifest.adapter.total_parameters
    before, after = read_tensors(digits_base), read_tensors(run.path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(
        not torch.equal(before[name], after[name])
        for name in before
        if name.endswith("query.weight")
    )
    assert resolve_source(str(run.path)).fingerprint != resolve_source(str(digits_base)).fingerprint


def test_existing_output_is_kept(digits_run, digits_base):
    before = open_checkpoint(digits_run).digest
    with pytest.raises(UsageError, match="exists already"):
        train(_small(DIGITS_RUN, digits_base), digits_run)
    assert open_checkpoint(digits_run).digest == before


def test_missing_library_is_one_sentence(digits_base, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtra, match=r"qlx\[train\]"):
        train(_small(DIGITS_RUN, digits_base), tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.exhaustive  # kernels are compiled for a minute
@pytest.mark.parametrize("quantized", [True, False])
def test_a_compiled_training_takes_the_same_steps(python_base, tmp_path, quantized):
    """And what it leaves is loaded, replayed and named as if nothing had been compiled."""
    losses = {}
    for compiled in (False, True):
        training = {**FEW, "compile": compiled}
        changes = {} if quantized else {"quantization": None}
        recipe = _small(PYTHON_RUN, python_base, training=training, **changes)
        run = train(recipe, tmp_path / f"run-{compiled}")
        losses[compiled] = [row["loss"] for row in read_metrics(run.path / "metrics.jsonl")]
    assert len(losses[True]) == 3
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    stored = [
        set(read_tensors(tmp_path / f"run-{c}" / "adapter_model.safetensors"))
        for c in (False, True)
    ]
    assert stored[0] == stored[1]
