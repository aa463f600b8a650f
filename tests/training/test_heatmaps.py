"""Training of heatmaps: the loss, what the examples hold, bases of other kinds, and the report."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import (
    ViTConfig,
    ViTForImageClassification,
)

from qlx.checkpoint import open_checkpoint, read_probe, resolve_source
from qlx.errors import InputRefused, Mismatch, RecipeError, Unsupported
from qlx.exporting import export_onnx
from qlx.inputs import ImagePreprocessor, load_split
from qlx.merging import merge
from qlx.models import Labels, load_model, vitpose_from_vit
from qlx.planning import plan_recipe
from qlx.recipe import DataSection, Recipe
from qlx.training import check, train
from qlx.training.heatmaps import HeatmapDataset, focal_loss
from qlx.verification import verify
from qlx.weights import open_weights, read_tensors, write_tensors
from tests.conftest import TENNIS_BASE, TENNIS_RUN, recipe_of
from tests.training.test_resume import _digests, _run

TWO_STEPS = {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-3}


def clips(path, **fields):
    return {"source": "tracknet", "path": str(path), "eval_limit": 8, **fields}


@pytest.fixture(scope="module")
def plain_vit(tmp_path_factory):
    """A ViT classifier as transformers saves it, with its preprocessing."""
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        image_size=(48, 80), patch_size=8,
    )  # fmt: skip
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("vit")
    ViTForImageClassification(config).save_pretrained(path)
    (path / "preprocessor_config.json").write_bytes(ImagePreprocessor(size=(48, 80)).to_bytes())
    return path


# --- The loss


def test_the_loss_is_its_formula():
    random = np.random.default_rng(0)
    logits, target = random.normal(0, 2, (2, 3, 4, 5)), random.uniform(0, 1, (2, 3, 4, 5))
    p = 1 / (1 + np.exp(-logits))
    terms = (1 - p) ** 2 * target * np.log(p) + p**2 * (1 - target) * np.log(1 - p)
    wanted = -terms.sum(axis=(2, 3)).mean()
    assert focal_loss(torch.tensor(logits), torch.tensor(target)).item() == pytest.approx(wanted)


def test_the_loss_is_finite_where_the_model_is_very_sure():
    logits = torch.tensor([[[[300.0, -300.0]]]], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([[[[0.0, 1.0]]]]))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def test_a_thousand_empty_cells_do_not_drown_the_one():
    """At p = 0.02 everywhere, plain cross entropy pulls the logits down with more force than it pulls the ball up."""
    target = torch.zeros(1, 1, 30, 40)
    target[0, 0, 10, 10] = 1
    pulls = {}
    for name in ("focal", "plain"):
        logits = torch.full(target.shape, math.log(0.02 / 0.98), requires_grad=True)
        if name == "focal":
            focal_loss(logits, target).backward()
        else:
            torch.nn.functional.binary_cross_entropy_with_logits(
                logits, target, reduction="sum"
            ).backward()
        ball = -logits.grad[0, 0, 10, 10].item()
        pulls[name] = ball / (logits.grad.sum().item() + ball)
    assert pulls["plain"] < 0.1
    assert pulls["focal"] > 0.8


# --- Examples


def test_the_target_lies_where_the_frame_has_the_ball(tennis_clips):
    split = load_split(DataSection(**clips(tennis_clips / "bright", sigma=1.2)), "train")
    dataset = HeatmapDataset(split, ImagePreprocessor(size=(48, 80)), (24, 40))
    item = dataset[5]
    assert item["pixel_values"].shape == (3, 48, 80)
    row, column = divmod(int(item["labels"][0].argmax()), 40)
    x, y, _ = split.places[5, 0]
    assert abs((x + 0.5) * 40 / 96 - 0.5 - column) <= 0.5
    assert abs((y + 0.5) * 24 / 54 - 0.5 - row) <= 0.5


# --- Whole trainings


def test_the_model_learns_and_the_adapter_helps(tennis_base, tennis_run):
    base, run = (open_checkpoint(path).manifest for path in (tennis_base, tennis_run))
    assert base.lineage[-1].options["after"]["f1"] > 0.8
    before, after = (run.lineage[-1].options[name] for name in ("before", "after"))
    assert after["f1"] > before["f1"] + 0.05
    assert run.task == "heatmap"
    assert set(run.adapter.targets) == {"query", "key", "value", "dense", "fc1", "fc2"}
    assert not any("head" in name for name in run.quantization.modules)


def test_the_report_shows_what_was_found(tennis_run):
    page = (tennis_run / "report.html").read_text()
    assert page.count('class="drawn"') == 6
    assert "Green circle" in page
    assert " px off)" in page
    assert '<span class="good">' in page


@pytest.mark.parametrize("mode", ["manual", "hf"])
def test_three_frames_and_a_trained_head(tennis_clips, tmp_path, mode):
    """Nine channels from nothing, then QLoRA with the head trained whole, FP4, the seeds' target modules."""
    data = clips(tennis_clips / "bright", frames=3)
    base = train(recipe_of(TENNIS_BASE, data=data, training=TWO_STEPS), tmp_path / "base")
    assert read_probe(base.path).inputs["pixel_values"].shape == (6, 9, 48, 80)
    adapter = {
        "rank": 4, "alpha": 6, "target_modules": ["query", "key", "value", "dense"], "modules_to_save": ["head"],
    }  # fmt: skip
    quantization = {"quant_type": "fp4", "double_quant": False, "mode": mode}
    recipe = recipe_of(
        TENNIS_RUN,
        base.path,
        data=data,
        training=TWO_STEPS,
        adapter=adapter,
        quantization=quantization,
    )
    run = train(recipe, tmp_path / "run")
    stored = read_tensors(run.path / "adapter_model.safetensors")
    assert "base_model.model.head.conv.weight" in stored
    assert len(run.manifest.adapter.tensors) == 2 * 4
    assert (
        load_model(run, resolve_source(str(base.path)))
        .get_base_model()
        .config.backbone_config.num_channels
        == 9
    )
    still = recipe_of(TENNIS_RUN, base.path, data=clips(tennis_clips / "bright"))
    with pytest.raises(Mismatch, match=r"sees 3 frames at once, data\.frames is 1"):
        train(still, tmp_path / "never")
    with pytest.raises(Mismatch, match="sees 3 frames at once"):
        check(still)


def test_training_starts_from_a_plain_vit(plain_vit, tennis_clips, tmp_path):
    start = {**TENNIS_BASE, "base": {"path": str(plain_vit)}}
    recipe = recipe_of(start, data=clips(tennis_clips / "bright", frames=3), training=TWO_STEPS)
    found = check(recipe)
    assert found.base_found
    run = train(recipe, tmp_path / "run")
    assert run.manifest.adapter.type == "full"
    assert found.total_parameters == run.manifest.adapter.total_parameters
    assert json.loads((run.path / "config.json").read_text())["model_type"] == "vitpose"
    again = recipe_of(
        TENNIS_RUN, run.path, data=clips(tennis_clips / "bright", frames=3), training=TWO_STEPS
    )
    assert train(again, tmp_path / "adapter").manifest.base.fingerprint


def test_a_plain_vit_computes_the_same_backbone(plain_vit):
    """The tensors are all there: without a class token, each layer of the two models does the same."""
    model = vitpose_from_vit(plain_vit, Labels(("ball",)), 1, seed=0)
    vit = ViTForImageClassification.from_pretrained(plain_vit).eval().vit
    state = torch.randn(2, 60, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = theirs = state
        for mine, other in zip(model.backbone.encoder.layer, vit.layers, strict=True):
            ours = mine(ours, None)
            theirs = other(theirs)
            theirs = theirs[0] if isinstance(theirs, tuple) else theirs
        torch.testing.assert_close(model.backbone.layernorm(ours), vit.layernorm(theirs))
    assert not torch.equal(ours, state)
    three = vitpose_from_vit(plain_vit, Labels(("ball",)), 3, seed=0)
    image = torch.randn(1, 3, 48, 80, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():  # a still scene is what the image is
        still = three.backbone(image.repeat(1, 3, 1, 1)).feature_maps[-1]
        wanted = model.backbone(image).feature_maps[-1]
    torch.testing.assert_close(still, wanted, rtol=1e-4, atol=1e-5)


def test_an_adapter_on_a_plain_vit_says_how_to_make_its_base(plain_vit, tennis_clips, tmp_path):
    recipe = recipe_of(TENNIS_RUN, plain_vit, data=clips(tennis_clips / "bright"))
    for attempt in (check, lambda recipe: train(recipe, tmp_path / "run")):
        with pytest.raises(Unsupported, match="first train all weights"):
            attempt(recipe)


def test_a_vit_without_a_tensor_is_refused_by_its_name(plain_vit, tmp_path):
    for file in plain_vit.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = read_tensors(tmp_path)
    name = next(name for name in open_weights(tmp_path) if name.endswith("1.output.dense.bias"))
    del tensors[name]
    write_tensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(InputRefused, match=r"encoder\.layer\.1\.output\.dense\.bias' is missing"):
        vitpose_from_vit(tmp_path, Labels(("ball",)), 1, seed=0)


def test_other_keypoints_need_a_new_head(tennis_base, tennis_clips, tmp_path):
    """A base with other keypoints, as those from the hub are."""
    for file in tennis_base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "qlx.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    config["id2label"], config["label2id"] = {"0": "nose"}, {"nose": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    data = clips(tennis_clips / "bright")
    with pytest.raises(Unsupported, match=r"modules_to_save: \[head\.conv\]"):
        check(recipe_of(TENNIS_RUN, tmp_path, data=data))
    adapter = {**TENNIS_RUN["adapter"], "modules_to_save": ["head"]}
    assert check(recipe_of(TENNIS_RUN, tmp_path, data=data, adapter=adapter)).trained_parameters


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_experts": 6}, r"backbone_config\.num_experts is 6"),
        ({"model_type": "swin"}, r"backbone_config\.model_type"),
    ],
)
def test_other_backbones_are_refused(tennis_base, tennis_clips, tmp_path, change, match):
    for file in tennis_base.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "qlx.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    config["backbone_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Unsupported, match=match):
        check(recipe_of(TENNIS_RUN, tmp_path, data=clips(tennis_clips / "bright")))


# --- Recipes


@pytest.mark.parametrize(
    ("sections", "match"),
    [
        ({"data": {"source": "digits"}}, "does not fit task"),
        ({"data": {"source": "tracknet"}}, "needs a path"),
        ({"data": {"source": "tracknet", "path": "x", "frames": 2}}, "frames"),
        ({"task": "causal-lm", "data": {"source": "python-text", "frames": 3}}, "for source 'tracknet' only"),
        ({"base": {"from_scratch": {"model_type": "vit"}}}, "model_type for task 'heatmap' is 'vitpose'"),
        ({"base": {"from_scratch": {"model_type": "vitpose", "patch_size": 4}}}, "too small"),
        (
            {"base": {"from_scratch": {"model_type": "vitpose", "patch_size": 8, "image_size": [48, 83]}}},
            "not a multiple of patch_size",
        ),
        (
            {"base": {"from_scratch": {
                "model_type": "vitpose", "patch_size": 8, "hidden_size": 128, "intermediate_size": 192,
            }}},
            "not a multiple of hidden_size",
        ),
    ],
)  # fmt: skip
def test_a_recipe_that_makes_no_sense_is_refused(sections, match):
    from pydantic import ValidationError

    content = {**TENNIS_BASE, **sections}
    with pytest.raises((ValidationError, RecipeError), match=match):
        Recipe.model_validate(content)


# --- The classic head: deconvolutions with batch normalisation, as in the first ViTPose checkpoints


@pytest.mark.parametrize(
    "saved",
    [
        pytest.param((), id="frozen head"),
        pytest.param(("head.conv",), id="trained head", marks=pytest.mark.exhaustive),
    ],
)
def test_an_adapter_leaves_the_statistics_of_its_base(classic_base, tennis_clips, tmp_path, saved):
    """The run replays (which training checks), and its merge has the base's statistics, bit for bit."""
    adapter = {"rank": 4, "alpha": 6, "modules_to_save": list(saved)}
    data = clips(tennis_clips / "bright")
    recipe = recipe_of(TENNIS_RUN, classic_base, data=data, training=TWO_STEPS, adapter=adapter)
    run = train(recipe, tmp_path / "run")
    merged = read_tensors(merge(classic_base, [run.path], tmp_path / "merged").path)
    before = read_tensors(classic_base)
    assert merged.keys() == before.keys()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(merged[f"head.batchnorm1.{name}"], before[f"head.batchnorm1.{name}"])
    assert torch.equal(merged["head.conv.weight"], before["head.conv.weight"]) is not bool(saved)
    export_onnx(tmp_path / "merged", tmp_path / "onnx")


def test_an_exact_adapter_leaves_the_statistics_of_its_base(classic_base, tennis_clips, tmp_path):
    """The run replays (which training checks): it was trained with what is stored."""
    codes = {"quant_type": "int8", "group_size": 32, "skip_modules": ["head"]}
    recipe = recipe_of(
        TENNIS_RUN,
        classic_base,
        data=clips(tennis_clips / "bright"),
        training=TWO_STEPS,
        adapter={"rank": 4, "alpha": 6, "exact": True},
        quantization=codes,
    )
    run = train(recipe, tmp_path / "run")
    assert run.manifest.adapter.type == "exact"
    assert verify(run.path, base=classic_base).passed


def test_a_head_with_statistics_is_not_saved_whole(classic_base, tennis_clips):
    adapter = {"rank": 4, "modules_to_save": ["head"]}
    recipe = recipe_of(
        TENNIS_RUN, classic_base, data=clips(tennis_clips / "bright"), adapter=adapter
    )
    with pytest.raises(Unsupported, match=r"'head' holds batch normalisation.*head\.conv"):
        check(recipe)


def test_all_of_a_classic_head_is_trained_without_an_adapter(classic_base, tennis_clips, tmp_path):
    start = {**TENNIS_BASE, "base": {"path": str(classic_base)}}
    recipe = recipe_of(start, data=clips(tennis_clips / "bright"), training=TWO_STEPS)
    after = read_tensors(train(recipe, tmp_path / "run").path)
    before = read_tensors(classic_base)
    name = "head.batchnorm1.running_mean"
    assert not torch.equal(after[name], before[name])


@pytest.mark.exhaustive
def test_a_killed_training_goes_on_to_the_same_bytes(tennis_base, tennis_clips, tmp_path):
    data = clips(tennis_clips / "dim", sigma=1.5)
    training = {"max_steps": 7, "batch_size": 4, "save_every": 2, "learning_rate": 4e-3}
    adapter = {"rank": 2, "alpha": 3, "dropout": 0.1}
    recipe = recipe_of(TENNIS_RUN, tennis_base, data=data, training=training, adapter=adapter)
    assert _run(recipe, tmp_path / "whole") == 0
    assert _run(recipe, tmp_path / "killed", kill_at=5) != 0
    assert not (tmp_path / "killed").exists()
    assert _run(recipe, tmp_path / "killed", resume=True) == 0
    assert _digests(tmp_path / "killed") == _digests(tmp_path / "whole")


def test_the_plan_counts_what_is_there(tennis_base, tennis_clips):
    """From the recipe that built it, and from the directory; biases are left out of a plan (under 3 % here)."""
    data = {**TENNIS_BASE["data"], "path": str(tennis_clips / "bright")}
    built = plan_recipe(recipe_of(TENNIS_BASE, data=data)).shape
    found = plan_recipe(recipe_of(TENNIS_RUN, tennis_base, data=data)).shape
    total = sum(tensor.numel() for tensor in read_tensors(tennis_base).values())
    assert built.tokens == found.tokens == 6 * 10 + 1
    assert found.parameters == pytest.approx(total, rel=0.03)
    assert built.parameters == pytest.approx(found.parameters, rel=0.03)


def test_accumulated_batches_are_one_batch(tennis_base, tennis_clips, tmp_path):
    """The same examples in one piece or in two: the same loss is reported, not twice of it."""
    losses = []
    for size, pieces in ((8, 1), (4, 2)):
        training = {
            "max_steps": 1,
            "batch_size": size,
            "gradient_accumulation": pieces,
            "log_every": 1,
        }
        data = clips(tennis_clips / "dim")
        recipe = recipe_of(TENNIS_RUN, tennis_base, data=data, training=training)
        run = train(recipe, tmp_path / str(pieces))
        losses.append(json.loads((run.path / "metrics.jsonl").read_text())["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
