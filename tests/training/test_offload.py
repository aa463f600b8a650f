"""Training and inference with the base's weights on disk or lent from memory: the same numbers in less memory.

The memory that counts is anonymous: pages of a mapped file can be dropped at any time. It is sampled in a
process of its own while two steps are trained.
"""

import sys

import pytest
import torch

from benchmarks.offload import anonymous_bytes, made_base, memory_recipe
from qlx.checkpoint import open_checkpoint
from qlx.errors import InputRefused
from qlx.merging import merge
from qlx.models import computing_in, forward_logits, lend_layers, load_base
from qlx.packing import pack
from qlx.recipe import Recipe
from qlx.training import train
from qlx.training.job import prepare
from qlx.verification import evaluate
from tests.conftest import DIGITS_RUN, PYTHON_RUN, TENNIS_RUN

SHORT = {"max_steps": 4, "batch_size": 8, "log_every": 1, "gradient_checkpointing": True}
INT4 = {"quant_type": "int4", "group_size": 64, "symmetric": False}
NF4 = {"quant_type": "nf4", "double_quant": True}
CASES = {  # the run's recipe, its base, how it is quantized, what the base is loaded in
    "text": (PYTHON_RUN, "python_base", None, "float32"),
    "text-bf16": (PYTHON_RUN, "python_base", None, "bfloat16"),
    "text-nf4": (PYTHON_RUN, "python_base", NF4, "float32"),
    "text-int4": (PYTHON_RUN, "python_base", INT4, "float32"),
    "images": (DIGITS_RUN, "digits_base", None, "float32"),
    "images-nf4": (DIGITS_RUN, "digits_base", NF4, "float32"),
}
LONG = ("text-bf16", "text-int4", "images", "images-nf4")
CHOSEN = [pytest.param(c, marks=pytest.mark.exhaustive) if c in LONG else c for c in CASES]


def recipe_for(content, base, quantization, dtype="float32", offload="none", **sections):
    data = {**content["data"], "train_limit": 64, "eval_limit": 16}
    adapter = {"rank": 4, "alpha": 6, "bias": "all", **sections.pop("adapter", {})}
    return Recipe.model_validate({
        **content, "data": data, "adapter": adapter, "quantization": quantization,
        "training": {**content["training"], **SHORT},
        "base": {"path": str(base), "dtype": dtype, "offload": offload}, **sections,
    })  # fmt: skip


def learned(recipe, work, steps=3, rows=16):
    """Losses and trained values of some steps on one batch, layers computed again in the backward pass."""
    work.mkdir(parents=True)
    job = prepare(recipe, work, lambda line: None)
    model = job.model.train()
    model.gradient_checkpointing_enable()
    batch = next(job.material.batches())
    inputs = {name: torch.from_numpy(value[:rows]) for name, value in batch.inputs.items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(steps):
        made = model(**inputs)
        loss = made["heatmaps" if recipe.task == "heatmap" else "logits"].square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [value.detach().clone() for value in trained], job.quantization.fingerprint


def same(left, right):
    values = all(torch.equal(*pair) for pair in zip(left[1], right[1], strict=True))
    return left[0] == right[0] and values and left[2] == right[2]


@pytest.mark.parametrize("name", CHOSEN)
def test_offloaded_weights_are_learned_on_as_those_in_memory(name, request, tmp_path):
    content, fixture, quantization, dtype = CASES[name]
    base = request.getfixturevalue(fixture)
    found = {
        where: learned(recipe_for(content, base, quantization, dtype, where), tmp_path / where)
        for where in ("none", "cpu", "disk")
    }
    assert found["none"][0][-1] < found["none"][0][0]
    assert same(found["none"], found["cpu"])
    assert same(found["none"], found["disk"])
    other = recipe_for(content, base, quantization, dtype, "disk", adapter={"alpha": 7})
    assert not same(found["none"], learned(other, tmp_path / "other"))


def test_a_heatmap_base_stays_on_disk(tennis_base, tennis_clips, tmp_path):
    content = {**TENNIS_RUN, "data": {**TENNIS_RUN["data"], "path": str(tennis_clips / "dim")}}
    recipes = [recipe_for(content, tennis_base, NF4, offload=where) for where in ("none", "disk")]
    assert same(*(learned(recipe, tmp_path / recipe.base.offload) for recipe in recipes))


def test_a_base_in_codes_stays_on_disk(python_base, digits_base, tmp_path):
    packed = {
        "nf4": (DIGITS_RUN, pack(digits_base, tmp_path / "nf4", to="nf4", min_retention=0.0)),
        "int4": (PYTHON_RUN, pack(python_base, tmp_path / "int4", to="int4", group_size=64, min_retention=0.0)),
    }  # fmt: skip
    for name, (content, base) in packed.items():
        recipes = [
            recipe_for(content, base.path, None, offload=where) for where in ("none", "disk")
        ]
        assert same(
            *(learned(recipe, tmp_path / f"{name}-{recipe.base.offload}") for recipe in recipes)
        ), name


def test_a_run_of_an_offloaded_base_has_the_bytes_of_one_in_memory(python_base, tmp_path):
    runs = [
        train(recipe_for(PYTHON_RUN, python_base, NF4, offload=where), tmp_path / where)
        for where in ("none", "disk")
    ]
    adapters = [(run.path / "adapter_model.safetensors").read_bytes() for run in runs]
    assert adapters[0] == adapters[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "none"]


def test_every_kind_of_checkpoint_is_scored_from_disk(python_base, python_run, tmp_path):
    merged = merge(str(python_base), [python_run], tmp_path / "merged")
    packed = pack(
        merged.path, tmp_path / "packed", to="int4", base=str(python_base), min_retention=0.0
    )
    for path in (python_base, python_run, merged.path, packed.path):
        base = str(python_base) if path == python_run else None
        with_offload, without = (
            evaluate(path, base=base, offload=offload) for offload in (True, False)
        )
        assert with_offload.metrics == without.metrics, path


def test_the_files_are_not_written_to_and_codes_only_once(python_base, tmp_path):
    before = {file: file.read_bytes() for file in python_base.iterdir()}
    spec = open_checkpoint(python_base).manifest.quantization
    plain = load_base(python_base, "causal-lm", quant=spec, folder=tmp_path / "plain")
    assert not (tmp_path / "plain").exists(), "fp32 weights have a place already"
    with torch.no_grad():
        plain.get_input_embeddings().weight.add_(1)
    assert {file: file.read_bytes() for file in python_base.iterdir()} == before
    load_base(python_base, "causal-lm", dtype=torch.bfloat16, folder=tmp_path / "narrow")
    assert sum(f.stat().st_size for f in (tmp_path / "narrow").iterdir()) > 1000


def test_lent_weights_are_given_back_when_a_forward_fails(python_base):
    model = load_base(python_base, "causal-lm")
    inputs = {"input_ids": torch.arange(6).view(1, 6).numpy()}
    wanted = forward_logits(model, "causal-lm", inputs)
    lend_layers(model.requires_grad_(False), model.parameters())
    layer = model.model.layers[1].mlp.down_proj
    with pytest.raises(RuntimeError):
        layer(torch.ones(2, 3))
    assert layer.weight.device.type == "meta"
    assert (forward_logits(model, "causal-lm", inputs) == wanted).all()
    out = [name for name, p in model.named_parameters() if p.device.type != "meta"]
    assert out == ["lm_head.weight"]
    assert computing_in(model.to("cpu"), torch.bfloat16) is model
    assert layer.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter": {"use_dora": True}}, "needs the base in memory"),
        ({"training": {"gradient_checkpointing": False}}, "needs training.gradient_checkpointing"),
        ({"adapter": None, "quantization": None}, "is for a frozen base"),
    ],
)
def test_what_cannot_be_offloaded_is_refused(change, message, digits_base):
    recipe = recipe_for(DIGITS_RUN, digits_base, NF4, offload="disk").content()
    for section, fields in change.items():
        recipe[section] = fields and {**recipe[section], **fields}
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate(recipe)


def test_a_new_head_needs_its_base_in_memory(digits_base, tmp_path):
    from qlx.models import Labels

    with pytest.raises(InputRefused, match="a new head is made with the weights in memory"):
        load_base(digits_base, "image-classification", new_head=Labels(("a", "b")), folder=tmp_path)


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_a_few_layers(tmp_path):
    base = made_base(tmp_path / "base")
    weights = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    assert weights > 250e6
    found = {}
    for name, quantization in (("fp32", None), ("nf4", NF4)):
        for where in ("none", "disk"):
            output = tmp_path / f"{name}-{where}"
            found[name, where] = anonymous_bytes(memory_recipe(base, quantization, where), output)
    assert found["fp32", "none"] > 2 * weights  # the control: in memory they are all there, in fp32
    assert found["fp32", "disk"] < 0.5 * weights
    assert found["nf4", "disk"] < 0.5 * found["nf4", "none"]
