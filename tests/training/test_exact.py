"""Adapters inside the rounding: what was trained is what merging and packing hold, bit for bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from qlx.adapters import EXACT_FILE, read_exact
from qlx.checkpoint import open_checkpoint, read_probe, resolve_source
from qlx.errors import CheckFailed, CorruptCheckpoint, Mismatch, Unsupported, UsageError
from qlx.exporting import export_adapters, export_onnx
from qlx.merging import Combination, merge
from qlx.models import forward_logits, load_base, load_model, stored_codes
from qlx.packing import Healing, pack
from qlx.quant import GRID_FILE, packed_modules, packed_of_module
from qlx.recipe import Recipe
from qlx.training import check, save_adapter, train
from qlx.training.trainers import StrictTrainer
from qlx.verification import evaluate, replay, verify
from qlx.weights import open_weights, read_tensors, write_tensors
from tests.conftest import DIGITS_RUN, PYTHON_RUN, TENNIS_RUN, recipe_of
from tests.isolation import DISTANCE, run_without

SCHEMES = {
    "nf4": {"quant_type": "nf4"},
    "int8": {"quant_type": "int8"},
    "int4": {"quant_type": "int4", "group_size": 32},
    "ternary": {"quant_type": "ternary", "group_size": 32},
    "int4 zeros": {"quant_type": "int4", "group_size": 32, "symmetric": False},
    "int2": {"quant_type": "int2", "group_size": 32},
    "int4 fold": {"quant_type": "int4", "group_size": 32, "symmetric": False},
    "int2 fold": {"quant_type": "int2", "group_size": 32},
}
TASKS = {"digits": DIGITS_RUN, "python": PYTHON_RUN, "tennis": TENNIS_RUN}
QUICK = {("digits", "nf4"), ("python", "int2")}
EXACT = {"rank": 4, "alpha": 6, "exact": True}


def cells():
    for task in TASKS:
        for scheme in SCHEMES:
            marks = () if (task, scheme) in QUICK else pytest.mark.exhaustive
            yield pytest.param(task, scheme, marks=marks)


def recipe_for(task, scheme, base, clips=None, seed=0, rate=4e-3, **adapter):
    content = TASKS[task]
    training = {"max_steps": 12, "batch_size": 16, "learning_rate": rate, "seed": seed}
    data = content["data"] if clips is None else {**content["data"], "path": str(clips / "dim")}
    return recipe_of(
        content,
        base,
        data=data,
        adapter={**EXACT, "exact": "fold" if scheme.endswith("fold") else True, **adapter},
        quantization=SCHEMES[scheme],
        training=training,
    )


@pytest.fixture
def base_of(request):
    return lambda task: request.getfixturevalue(f"{task}_base")


def codes_of(model):
    return {name: packed_of_module(layer) for name, layer in packed_modules(model)}


def same_codes(left, right):
    assert left.keys() == right.keys()
    for name, packed in left.items():
        form, parts = packed.identity()
        other, others = right[name].identity()
        assert form == other
        assert all(torch.equal(a, b) for a, b in zip(parts, others, strict=True)), name
        assert torch.equal(packed.values(), right[name].values())


def farthest(found, wanted, probe):
    """The largest difference relative to the largest logit; of texts, where there is no padding."""
    mask = probe.inputs.get("attention_mask")
    there = slice(None) if mask is None else mask.astype(bool)
    return np.abs(found[there] - wanted[there]).max() / np.abs(wanted[there]).max()


@pytest.mark.parametrize(("task", "scheme"), list(cells()))
def test_what_was_trained_is_what_is_packed(task, scheme, base_of, request, tmp_path):
    base = base_of(task)
    clips = request.getfixturevalue("tennis_clips") if task == "tennis" else None
    run = train(recipe_for(task, scheme, base, clips), tmp_path / "run")
    merged = merge(base, [run.path], tmp_path / "merged")
    target = SCHEMES[scheme]["quant_type"]
    packs = [
        pack(run.path, tmp_path / "from-run", to=target, base=base),
        pack(merged.path, tmp_path / "from-merged", to=target),
    ]
    unmerged = load_model(run, resolve_source(str(base)))
    probe = read_probe(run.path)
    logits = forward_logits(unmerged, run.manifest.task, probe.inputs)
    np.testing.assert_array_equal(logits, probe.reference)
    for packed in packs:
        assert packed.manifest.quantization.fingerprint == run.manifest.adapter.codes
        model = load_model(packed)
        same_codes(codes_of(unmerged), codes_of(model))
        np.testing.assert_array_equal(
            forward_logits(model, run.manifest.task, probe.inputs), logits
        )
        assert verify(packed.path).passed
    files = [open_weights(packed.path) for packed in packs]
    for name in files[0]:
        assert files[0].read_bytes(name) == files[1].read_bytes(name)
    assert np.abs(logits - probe.base).max() > 1e-3, "the adapter has to have done something"
    found = codes_of(load_model(packs[0])).values()
    zeros = [packed.zeros for packed in found if getattr(packed, "zeros", None) is not None]
    assert len(zeros) == (len(found) if scheme.partition(" ")[2] or scheme == "int2" else 0)
    assert all(part.is_floating_point() == scheme.endswith("fold") for part in zeros)
    onnx = export_onnx(packs[0].path, tmp_path / "onnx")
    assert farthest(replay(onnx, None, probe), logits, probe) <= 1e-4
    assert farthest(probe.base, logits, probe) > 1e-3  # negative control


PLAIN = (
    DISTANCE
    + """
result = {}
for path in argv:
    model = plain_model(path)
    sizes = {n: list(p.shape) for n, p in model.state_dict().items()}
    result[path] = [distance(model, path), distance(model, path, "base"), sizes]
"""
)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("task", "scheme"),
    [
        ("digits", "int2 fold"),
        ("python", "int4 fold"),
        ("tennis", "int2"),
        ("python", "int4 zeros"),
    ],
)
def test_plain_transformers_computes_what_was_trained(task, scheme, base_of, request, tmp_path):
    """Zero points too, whole ones and others, in a process without qlx."""
    base = base_of(task)
    clips = request.getfixturevalue("tennis_clips") if task == "tennis" else None
    run = train(recipe_for(task, scheme, base, clips), tmp_path / "run")
    packed = pack(run.path, tmp_path / "packed", to=SCHEMES[scheme]["quant_type"], base=base)
    found = run_without(("qlx", "peft", "bitsandbytes"), PLAIN, packed.path)
    near, far, _ = found[str(packed.path)]
    assert near < 1e-5
    assert far > 1e-3  # negative control: the base's outputs


@pytest.mark.parametrize(
    ("scheme", "seed"),
    [
        ("int4", 1),
        *(
            pytest.param(scheme, seed, marks=pytest.mark.exhaustive)
            for scheme in ("nf4", "int4", "ternary", "int4 zeros", "int2")
            for seed in (2, 3)
        ),
    ],
)
def test_a_small_change_survives_that_rounding_again_would_take(
    scheme, seed, python_base, tmp_path
):
    """Of a plain adapter whose change is a hundredth of a step next to nothing is left; of an exact one all is."""
    recipe = recipe_for("python", scheme, python_base, seed=seed, rate=1e-4)
    exact = train(recipe, tmp_path / "exact")
    target = SCHEMES[scheme]["quant_type"]
    packed = pack(exact.path, tmp_path / "packed", to=target, base=python_base)
    probe = read_probe(exact.path)
    np.testing.assert_array_equal(replay(packed, None, probe), probe.reference)
    assert np.abs(probe.reference - probe.base).max() > 0
    plain = recipe.model_copy(
        update={"adapter": recipe.adapter.model_copy(update={"exact": False})}
    )
    ordinary = train(plain, tmp_path / "plain")
    group = {"group_size": 32} if scheme != "nf4" else {}
    with pytest.raises(CheckFailed, match="retention"):
        pack(ordinary.path, tmp_path / "again", to=target, base=python_base, **group)


@pytest.fixture(scope="module")
def int4_run(digits_base, tmp_path_factory):
    return train(
        recipe_for("digits", "int4", digits_base), tmp_path_factory.mktemp("exact") / "run"
    )


@pytest.fixture(scope="module")
def int2_folded(digits_base, tmp_path_factory):
    recipe = recipe_for("digits", "int2 fold", digits_base)
    return train(recipe, tmp_path_factory.mktemp("folded") / "run")


@pytest.fixture(scope="module")
def int2_run(digits_base, tmp_path_factory):
    recipe = recipe_for("digits", "int2", digits_base)
    return train(recipe, tmp_path_factory.mktemp("int2") / "run")


@pytest.mark.parametrize("kind", ["int2_run", "int2_folded"])
def test_what_is_saved_of_zero_points_is_the_adapter_and_scores_as_it_did(
    kind, digits_base, request, tmp_path
):
    run, base = request.getfixturevalue(kind), str(digits_base)
    adapter = save_adapter(run.path, tmp_path / "adapter", base=base)
    assert (adapter.path / EXACT_FILE).read_bytes() == (run.path / EXACT_FILE).read_bytes()
    assert not (adapter.path / "adapter_config.json").exists()  # PEFT would take it for a LoRA
    assert adapter.manifest.adapter == run.manifest.adapter
    assert adapter.manifest.adapter.folded == (kind == "int2_folded")
    assert verify(adapter.path, base=base).passed
    measured = run.manifest.lineage[-1].options
    scored = evaluate(run.path, base=base).metrics
    assert scored == pytest.approx(measured["after"], rel=1e-6)
    assert evaluate(adapter.path, base=base).metrics == scored
    packed = pack(adapter.path, tmp_path / "packed", to="int2", base=digits_base)
    assert evaluate(packed.path).metrics == scored
    assert measured["before"]["loss"] > 1.01 * scored["loss"]  # negative control: the base's codes


def test_a_fold_is_not_taken_for_what_moves_codes(int2_folded, int2_run, digits_base, tmp_path):
    """Under the other's record either is refused."""
    with pytest.raises(CorruptCheckpoint, match="not all tensors"):
        read_exact(int2_run.path, int2_folded.manifest.adapter)
    forged = replace(int2_folded, manifest=int2_run.manifest)
    with pytest.raises(Mismatch, match="the adapter's update of"):
        load_model(forged, resolve_source(str(digits_base)))


def test_a_folded_adapter_leaves_the_codes(int2_folded, digits_base, tmp_path):
    """It moves zero points to places between the codes, and nothing else with fixed scales."""
    manifest = int2_folded.manifest
    assert manifest.adapter.folded
    moved = codes_of(load_model(int2_folded, resolve_source(str(digits_base))))
    spec = manifest.quantization
    base = codes_of(load_base(digits_base, "image-classification", quant=spec))
    assert base.keys() == moved.keys()
    for name, packed in moved.items():
        assert torch.equal(packed.codes, base[name].codes)
        assert base[name].zeros.dtype == torch.int8
        assert (packed.zeros - packed.zeros.round()).abs().max() > 1e-3
    with pytest.raises(Unsupported, match="no whole numbers"):
        merged = merge(digits_base, [int2_folded.path], tmp_path / "half", dtype="bfloat16")
        pack(merged.path, tmp_path / "packed", to="int2")


def test_scales_stay_where_they_are_not_to_learn(int4_run, digits_base, tmp_path):
    run = train(recipe_for("digits", "int4", digits_base, learned_scales=False), tmp_path / "run")
    stored, learned = (read_tensors(path / EXACT_FILE) for path in (run.path, int4_run.path))
    assert not run.manifest.adapter.learned_scales
    assert not any(name.endswith("lora_scale") for name in stored)
    assert any(bool(learned[name].any()) for name in learned if name.endswith("lora_scale"))
    unmerged = load_model(run, resolve_source(str(digits_base)))
    spec = run.manifest.quantization
    base = codes_of(load_base(digits_base, "image-classification", quant=spec))
    assert all(
        torch.equal(packed.scales, base[name].scales) for name, packed in codes_of(unmerged).items()
    )


def test_a_dry_run_counts_what_training_counts(int4_run, int2_folded, digits_base, tmp_path):
    for scheme, run in (("int4", int4_run), ("int2 fold", int2_folded)):
        for learned in (True, False):
            found = check(recipe_for("digits", scheme, digits_base, learned_scales=learned))
            spec = run.manifest.adapter
            counts = (spec.trained_parameters, spec.total_parameters)
            assert ((found.trained_parameters, found.total_parameters) == counts) == learned
    codes = pack(digits_base, tmp_path / "codes", to="int4", group_size=32, min_retention=0)
    recipe = recipe_for("digits", "int4", codes.path).model_copy(update={"quantization": None})
    assert check(recipe).trained_parameters == int4_run.manifest.adapter.trained_parameters


def test_the_head_is_trained_beside_the_codes(digits_base, tmp_path):
    adapter = {"modules_to_save": ["classifier"], "rank_pattern": {"fc1": 2}, "use_rslora": True}
    run = train(recipe_for("digits", "int4", digits_base, **adapter), tmp_path / "run")
    base = resolve_source(str(digits_base))
    adapter = save_adapter(run.path, tmp_path / "adapter", base=str(digits_base))
    assert (adapter.path / EXACT_FILE).is_file()
    assert verify(adapter.path, base=str(digits_base)).passed
    head = load_model(adapter, base).classifier.weight
    before = read_tensors(digits_base)["classifier.weight"]
    assert not torch.equal(head, before)
    probe = read_probe(run.path)
    assert np.abs(probe.reference - probe.base).max() > 1e-3
    packed = pack(adapter.path, tmp_path / "packed", to="int4", base=digits_base)
    np.testing.assert_array_equal(replay(packed, None, probe), probe.reference)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t, name: t.pop(name), CorruptCheckpoint, "not all tensors"),
        (lambda t, name: t.update({name: t[name][:, :2].clone()}), CorruptCheckpoint, "are"),
        (lambda t, name: t.update({name: t[name] * np.nan}), CorruptCheckpoint, "finite"),
        (lambda t, name: t.update({"x.weight": t[name]}), CorruptCheckpoint, "belongs to nothing"),
        (lambda t, name: t[name].mul_(1.5), Mismatch, "other codes than training"),
    ],
    ids=["lost", "another rank", "not a number", "too many", "another adapter"],
)
def test_a_changed_adapter_is_refused(int4_run, digits_base, tmp_path, change, error, words):
    tensors = read_tensors(int4_run.path / EXACT_FILE)
    change(tensors, next(name for name in tensors if name.endswith("lora_B")))
    write_tensors(tmp_path / EXACT_FILE, tensors)
    forged = replace(int4_run, path=tmp_path)
    (tmp_path / "config.json").write_bytes((int4_run.path / "config.json").read_bytes())
    with pytest.raises(error, match=words):
        load_model(forged, resolve_source(str(digits_base)))


def test_merged_values_that_left_their_grid_are_refused(int4_run, digits_base, tmp_path):
    merged = merge(digits_base, [int4_run.path], tmp_path / "merged", dtype="bfloat16")
    packed = pack(int4_run.path, tmp_path / "packed", to="int4", base=digits_base)
    grid = read_tensors(merged.path / GRID_FILE)
    assert stored_codes(packed.path) is not None and len(grid) == 12
    weights = read_tensors(merged.path)
    name = next(key for key in grid).removesuffix(".scales")
    from qlx.quant import packed_on_grid

    spec = int4_run.manifest.quantization
    entries = {f"{name}.scales": grid[f"{name}.scales"]}
    found = packed_on_grid(entries, name, weights[name], spec)
    assert torch.equal(found.values().bfloat16(), weights[name])  # told from 16 bits, too
    weights[name][0, 0] += 0.01
    with pytest.raises(CorruptCheckpoint, match="does not lie on the grid"):
        packed_on_grid(entries, name, weights[name], spec)
    with pytest.raises(CorruptCheckpoint, match="merge again"):
        packed_on_grid({}, name, weights[name], spec)


def test_another_target_is_rounded_and_gated_as_usual(int4_run, digits_base, tmp_path):
    packed = pack(int4_run.path, tmp_path / "int8", to="int8", base=digits_base)
    assert packed.manifest.quantization.fingerprint != int4_run.manifest.adapter.codes
    other = pack(
        int4_run.path, tmp_path / "64", to="int4", base=digits_base, group_size=64, min_retention=0
    )
    assert other.manifest.quantization.group_size == 64


def test_what_cannot_be_is_said(int4_run, digits_base, tmp_path):
    with pytest.raises(Unsupported, match="cannot be swapped"):
        export_adapters(str(digits_base), [("mine", int4_run.path)], tmp_path / "onnx")
    with pytest.raises(UsageError, match="nothing to heal"):
        pack(int4_run.path, tmp_path / "p", to="int4", base=digits_base, healing=Healing())
    with pytest.raises(Unsupported, match="leave --onto original out"):
        merge(digits_base, [int4_run.path], tmp_path / "merged", onto="original")
    with pytest.raises(Unsupported, match="cannot be combined"):
        merge(digits_base, [int4_run.path] * 2, tmp_path / "merged", combination=Combination())
    skipping = {"quant_type": "int4", "group_size": 32, "skip_modules": ["fc1"]}
    recipe = recipe_of(DIGITS_RUN, digits_base, adapter=EXACT, quantization=skipping)
    for attempt in (lambda: check(recipe), lambda: train(recipe, tmp_path / "run")):
        with pytest.raises(
            Unsupported, match=r"fc1' is not quantized, so there are no codes to move"
        ):
            attempt()
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("adapter", "quantization", "words"),
    [
        ({"dropout": 0.1}, {}, "dropout"),
        ({"use_dora": True}, {}, "use_dora"),
        ({"bias": "all"}, {}, "bias"),
        ({}, {"quant_type": "fp4", "double_quant": False}, "not fp4"),
        ({}, {"quant_type": "int8", "symmetric": False}, "symmetric"),
        ({}, {"quant_type": "int2", "symmetric": True}, "symmetric does not apply"),
        ({"exact": "fold"}, {"quant_type": "int4"}, "fold takes int2, or int4"),
        ({"exact": "fold"}, {"quant_type": "nf4"}, "fold takes int2, or int4"),
        ({"exact": "fold"}, {"quant_type": "int2", "group_size": "whole"}, "in groups"),
        ({"exact": "fold"}, {"quant_type": "int2", "scale_dtype": "float16"}, "is float32"),
        ({"exact": False, "learned_scales": False}, {}, "is for exact adapters"),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(adapter, quantization, words):
    content = {**DIGITS_RUN, "adapter": {**EXACT, **adapter}, "quantization": quantization}
    with pytest.raises(ValueError, match=words):
        Recipe.model_validate(content)


def test_read_exact_wants_its_file(tmp_path, int4_run):
    with pytest.raises(CorruptCheckpoint, match="is missing"):
        read_exact(tmp_path, int4_run.manifest.adapter)
    assert open_checkpoint(int4_run.path).manifest.adapter.type == "exact"


def test_an_interrupted_training_goes_on_to_the_same_bytes(digits_base, tmp_path, monkeypatch):
    recipe = recipe_for("digits", "int4", digits_base)
    recipe = recipe.model_copy(
        update={"training": recipe.training.model_copy(update={"save_every": 4})}
    )
    whole = train(recipe, tmp_path / "whole")
    inner = StrictTrainer.training_step

    def failing(self, *args, **kwargs):
        if self.state.global_step == 6:
            raise KeyboardInterrupt
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(StrictTrainer, "training_step", failing)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run")
    monkeypatch.setattr(StrictTrainer, "training_step", inner)
    resumed = train(recipe, tmp_path / "run", resume=True)
    assert (resumed.path / EXACT_FILE).read_bytes() == (whole.path / EXACT_FILE).read_bytes()
    assert resumed.manifest.adapter == whole.manifest.adapter


KINDS = {
    "bf16": (
        {"dtype": "bfloat16"},
        {"quant_type": "int4", "group_size": 32, "scale_dtype": "bfloat16"},
    ),
    "bitnet": ({}, {"quant_type": "ternary", "group_size": "whole", "activation_bits": 8}),
    "one scale": ({}, {"quant_type": "ternary", "group_size": "whole"}),
    "hf": ({}, {"quant_type": "nf4", "mode": "hf"}),
    "codes": ({}, None),
    "codes with zeros": ({}, None),
    "16-bit zeros": (
        {"dtype": "bfloat16"},
        {"quant_type": "int2", "group_size": 32, "scale_dtype": "bfloat16"},
    ),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_base(kind, python_base, tmp_path):
    """In 16 bits, with rounded inputs, loaded quantized by transformers, and of codes that nobody made here."""
    changes, quantization = KINDS[kind]
    base = python_base
    if quantization is None:
        to = "int2" if kind.endswith("zeros") else "int4"
        base = pack(python_base, tmp_path / "codes", to=to, group_size=32, min_retention=0).path
    recipe = recipe_for("python", "int4", base)
    recipe = Recipe.model_validate(
        {
            **recipe.model_dump(mode="json"),
            "base": {"path": str(base), **changes},
            "quantization": quantization,
        }
    )
    run = train(recipe, tmp_path / "run")
    assert check(recipe).trained_parameters == run.manifest.adapter.trained_parameters
    scheme = run.manifest.quantization.scheme
    packed = pack(run.path, tmp_path / "packed", to=scheme, base=base)
    assert packed.manifest.quantization.fingerprint == run.manifest.adapter.codes
    assert packed.manifest.quantization.backend == {
        "bitnet": "bitnet",
        "hf": "bitsandbytes",
    }.get(kind, "compressed-tensors")
    unmerged = load_model(run, resolve_source(str(base)))
    same_codes(codes_of(unmerged), codes_of(load_model(packed)))
    probe = read_probe(run.path)
    assert farthest(replay(packed, None, probe), probe.reference, probe) == 0
    assert farthest(probe.base, probe.reference, probe) > 1e-3
    if kind == "bitnet":
        with pytest.raises(Unsupported, match="pack it if it is exact"):
            merge(base, [run.path], tmp_path / "merged")
        return
    merged = merge(base, [run.path], tmp_path / "merged")
    again = pack(merged.path, tmp_path / "again", to=scheme)
    assert again.manifest.quantization.fingerprint == run.manifest.adapter.codes


def test_scales_that_a_file_could_not_hold_are_refused(python_base, tmp_path):
    quantization = {"quant_type": "int4", "group_size": 32}
    recipe = recipe_for("python", "int4", python_base)
    recipe = Recipe.model_validate(
        {
            **recipe.model_dump(mode="json"),
            "base": {"path": str(python_base), "dtype": "bfloat16"},
            "quantization": quantization,
        }
    )
    run = train(recipe, tmp_path / "run")
    merged = merge(python_base, [run.path], tmp_path / "merged", dtype="bfloat16")
    with pytest.raises(Unsupported, match="scale_dtype: bfloat16"):
        pack(merged.path, tmp_path / "packed", to="int4")
