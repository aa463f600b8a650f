"""Packing with healing, end to end: what it keeps, what it records, what refuses it, who loads it."""

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qlx.checkpoint import open_checkpoint, read_probe
from qlx.errors import CheckFailed, InputRefused, Mismatch, UsageError
from qlx.inputs import eval_batches
from qlx.models import load_model
from qlx.packing import WHOLE, Healing, pack
from qlx.packing.healing.data import calibration_data
from qlx.packing.healing.tune import Rows
from qlx.quant import stored_quantization
from qlx.verification import Tally, recorded_data, verify
from qlx.weights import read_tensors
from tests.adapter_support import NF4, Case, make_adapter
from tests.isolation import DISTANCE, run_without

RECIPES = {
    "digits": "name: d\ntask: image-classification\nbase: {path: x}\n"
    "data: {source: digits, variant: shifted, eval_fraction: 0.1, train_limit: 160}\n",
    "python": "name: p\ntask: causal-lm\nbase: {path: x}\n"
    "data: {source: python-docstrings, train_limit: 96, max_length: 64}\n",
}
QUICK = {"steps": 40, "rank": 8}


@pytest.fixture(scope="module")
def runs(digits_run, digits_base, python_run, python_base):
    return {"digits": (digits_run, digits_base), "python": (python_run, python_base)}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipes")
    for name, text in RECIPES.items():
        (root / f"{name}.yaml").write_text(text)
    return {name: root / f"{name}.yaml" for name in RECIPES}


@pytest.fixture(scope="module")
def healed(tmp_path_factory, runs, recipes):
    """Ternary models, re-rounded, compensated, and healed by training data, of both kinds."""
    root = tmp_path_factory.mktemp("healed")
    made = {}
    for kind, (run, base) in runs.items():
        ways = {"rounded": None, "compensated": {"steps": 0}, "healed": QUICK}
        for way, more in ways.items():
            healing = None if more is None else Healing(recipes[kind], **more)
            made[kind, way] = pack(
                run, root / f"{kind}-{way}", to="ternary", group_size=32, base=base,
                min_retention=0, healing=healing,
            )  # fmt: skip
    return made


def held_out(checkpoint, kind, run):
    """How far a checkpoint is from the run it was made of, on data that neither was trained on."""
    model, packed = load_model(*run), load_model(checkpoint)
    tally = Tally()
    data = recorded_data(checkpoint)
    for batch in eval_batches(data, checkpoint.path, size=16):
        inputs = {name: torch.from_numpy(values) for name, values in batch.inputs.items()}
        mask = batch.inputs.get("attention_mask")
        with torch.no_grad():
            pair = [m(**inputs).logits.numpy() for m in (model, packed)]
        tally.add(*pair, None if mask is None else mask.astype(bool))
    return tally.comparison()


def resident(words):
    """The mapped files whose names contain `words` that have pages in memory."""
    found, name = set(), ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            name = rest[-1]
        elif first == "Rss:" and int(rest[0]) and words in name:
            found.add(Path(name).name)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("let_go", [True, False], ids=["as it is", "negative control"])
def test_healed_codes_leave_memory_when_they_are_written(
    let_go, tmp_path, runs, recipes, monkeypatch
):
    writing = importlib.import_module("qlx.packing.pack")
    inner, most = writing.packed_fingerprint, []

    def watching(items):
        for name, packed in items:
            most.append(len({file.split(".healed.")[0] for file in resident(".healed.")}))
            yield name, packed

    monkeypatch.setattr(writing, "packed_fingerprint", lambda items: inner(watching(items)))
    if not let_go:
        monkeypatch.setattr(writing, "release", lambda tensors: None)
    run, base = runs["digits"]
    pack(
        run, tmp_path / "packed", to="int4", group_size=32, base=base,
        min_retention=0, healing=Healing(recipes["digits"], steps=0),
    )  # fmt: skip
    assert (max(most) == 1) == let_go
    assert len(most) > 10


@pytest.mark.parametrize("kind", list(RECIPES))
def test_healing_keeps_what_rounding_loses_on_data_it_has_not_seen(healed, runs, kind):
    from qlx.checkpoint import resolve_source

    run, base = runs[kind]
    unmerged = (open_checkpoint(run), resolve_source(str(base)))
    far = {
        w: held_out(healed[kind, w], kind, unmerged) for w in ("rounded", "compensated", "healed")
    }
    assert far["compensated"].kl_mean < 0.8 * far["rounded"].kl_mean
    assert far["healed"].kl_mean < 0.6 * far["compensated"].kl_mean
    assert far["healed"].top1 > far["rounded"].top1


@pytest.mark.parametrize("kind", list(RECIPES))
def test_the_result_verifies_and_records_how_it_was_healed(healed, kind):
    checkpoint = healed[kind, "healed"]
    assert verify(checkpoint.path).passed
    step = checkpoint.manifest.lineage[-1]
    record = step.options["healing"]
    assert (step.seed, record["steps"], record["rank"]) == (0, 40, 8)
    assert record["calibration"] == f"{kind}.yaml"
    assert record["rows"] == 3 * record["held_out_rows"]
    assert record["kept"] in ("scales", "correction")
    assert record["digest"].startswith("sha256:")
    assert (
        healed[kind, "compensated"].manifest.lineage[-1].options["healing"]["kept"]
        == "compensation"
    )
    assert "healing" not in healed[kind, "rounded"].manifest.lineage[-1].options


def test_the_same_healing_gives_the_same_bytes(tmp_path, runs, recipes):
    run, base = runs["digits"]
    made = [
        pack(
            run,
            tmp_path / str(at),
            to="int4",
            base=base,
            healing=Healing(recipes["digits"], steps=4),
        )
        for at in range(2)
    ]
    assert made[0].digest == made[1].digest
    assert made[0].digest != pack(run, tmp_path / "2", to="int4", base=base).digest


@pytest.mark.parametrize(
    ("to", "group"),
    [("nf4", None), ("fp4", 128), ("int8", None), ("int4", WHOLE), ("ternary", WHOLE)],
)
def test_every_grid_is_healed(tmp_path, runs, recipes, to, group):
    run, base = runs["python"]
    options = {"to": to, "group_size": group, "base": base, "min_retention": 0}
    plain = pack(run, tmp_path / "plain", **options)
    made = pack(run, tmp_path / "healed", **options, healing=Healing(recipes["python"], **QUICK))
    far = [read_probe(c.path) for c in (plain, made)]
    lost = [verify(c.path).comparisons["reference"].kl_mean for c in (plain, made)]
    assert lost[1] < lost[0]
    assert not np.array_equal(far[0].own, far[1].own)


def test_a_model_healed_towards_another_fails_the_gate(tmp_path, runs, recipes, monkeypatch):
    """The rows' references are those of other rows: tuning reaches them, and the probe tells."""
    run, base = runs["digits"]
    module = importlib.import_module("qlx.packing.healing.heal")  # `heal` itself is a function
    real = module.compensate_stack

    def shuffled(*arguments):
        stream = real(*arguments)
        for part in (stream.rows, stream.held_out):
            part[:] = [Rows(rows.inputs, rows.state.roll(1, dims=0)) for rows in part]
        return stream

    options = {
        "to": "ternary",
        "group_size": 32,
        "base": base,
        "healing": Healing(recipes["digits"], steps=80),
    }
    assert pack(run, tmp_path / "right", **options)
    monkeypatch.setattr(module, "compensate_stack", shuffled)
    with pytest.raises(CheckFailed, match="retention"):
        pack(run, tmp_path / "wrong", **options)
    assert sorted(os.listdir(tmp_path)) == ["right"]


def test_healing_by_the_probe_is_judged_by_the_rows_held_out_of_it(tmp_path, bases):
    """Random models: what holds for the rows that were shown does not for the others."""
    adapter = make_adapter(bases["vit"], tmp_path / "adapter", Case("vit", NF4))
    options = {"to": "ternary", "base": bases["vit"], "group_size": 32}
    with pytest.raises(
        CheckFailed, match=r"healing was not shown, retention is \S+ \(limit ≥ 0.9\)"
    ):
        pack(adapter.path, tmp_path / "p", **options, healing=Healing(steps=60))
    assert not [name for name in os.listdir(tmp_path) if name[:1] == "p"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", list(RECIPES))
def test_mixed_rows_make_the_probe_go_further(tmp_path, runs, kind, monkeypatch):
    """Without them the rows that are shown are reached, and those that judge are not."""
    from qlx.checkpoint import resolve_source
    from qlx.packing.healing import data

    run, base = runs[kind]
    unmerged = (open_checkpoint(run), resolve_source(str(base)))
    options = {"to": "ternary", "group_size": 32, "base": base, "min_retention": 0}
    far = {}
    for mixes in (data._MIXES, 0):
        monkeypatch.setattr(data, "_MIXES", mixes)
        made = pack(run, tmp_path / f"{mixes}", **options, healing=Healing(**QUICK))
        record = made.manifest.lineage[-1].options["healing"]
        assert record.get("mixed_rows", 0) == mixes * record["rows"]
        far[mixes] = held_out(made, kind, unmerged).kl_mean
    assert far[15] < 0.9 * far[0]


def test_mixes_are_of_their_rows(tmp_path, runs):
    """Texts have no padding inside; images lie between the two they are made of."""
    for kind in RECIPES:
        run = open_checkpoint(runs[kind][0])
        found = calibration_data(run, run.path, None, 0, 512)
        again = calibration_data(run, run.path, None, 0, 512)
        count = found.counts[0]
        for batches in zip(found.rows, again.rows, strict=True):
            assert all(torch.equal(*(batch[name] for batch in batches)) for name in batches[0])
        if kind == "digits":
            pixels = torch.cat([batch["pixel_values"] for batch in found.rows])
            assert pixels[count:].min() >= pixels[:count].min()
            assert pixels[count:].max() <= pixels[:count].max()
        for batch in found.rows if kind == "python" else ():
            mask = batch["attention_mask"]
            assert torch.equal(mask, mask.cummin(dim=1).values)
            assert not batch["input_ids"][mask == 0].any()


# --- More bits


@pytest.fixture(scope="module")
def promoted(tmp_path_factory, runs, recipes):
    run, base = runs["python"]
    lines = []
    healing = Healing(recipes["python"], steps=0, max_bytes_per_weight=0.6)
    target = tmp_path_factory.mktemp("promoted") / "p"
    made = pack(
        run, target, to="ternary", group_size=32, base=base, min_retention=0.5, healing=healing,
        report=lines.append,
    )  # fmt: skip
    return made, lines


def packed_layers(checkpoint):
    stored = stored_quantization(json.loads((checkpoint.path / "config.json").read_text()))
    tensors = read_tensors(checkpoint.path)
    return {name: stored.read(tensors, name) for name in checkpoint.manifest.quantization.tensors}


def test_layers_that_lose_most_get_more_bits_within_the_budget(promoted):
    made, lines = promoted
    layers = packed_layers(made)
    record = made.manifest.lineage[-1].options["healing"]
    schemes = {name: layers[f"{name}.weight"].scheme for name in record["promoted"]}
    assert schemes == record["promoted"]
    assert {layer.scheme for layer in layers.values()} >= {"ternary", "int4"}
    used = sum(layer.nbytes for layer in layers.values())
    count = sum(layer.count for layer in layers.values())
    assert 0.4 < used / count <= 0.6
    siblings = {name.rpartition(".")[0] for name in schemes if name.endswith("q_proj")}
    assert all(f"{name}.v_proj" in schemes for name in siblings)
    assert any("of the effect on its outputs" in line for line in lines)


def test_more_bits_lose_less(tmp_path, promoted, runs, recipes):
    run, base = runs["python"]
    made = pack(
        run, tmp_path / "p", to="ternary", group_size=32, base=base, min_retention=0,
        healing=Healing(recipes["python"], steps=0),
    )  # fmt: skip
    few, more = (verify(c.path).comparisons["reference"].kl_mean for c in (made, promoted[0]))
    assert more < 0.7 * few


PLAIN = (
    "import os\nos.environ['TORCHDYNAMO_DISABLE'] = '1'\nimport transformers\n"
    + DISTANCE
    + "\nresult = [distance(plain_model(path), path, 'own') for path in argv]\n"
)


def test_plain_transformers_gives_the_outputs_of_healed_and_promoted_models(promoted, healed):
    made = [promoted[0], healed["digits", "healed"]]
    found = run_without(("qlx", "peft", "bitsandbytes"), PLAIN, *(item.path for item in made))
    assert len(found) == 2
    assert max(found) < 1e-4


@pytest.mark.parametrize(
    ("to", "group", "budget", "message"),
    [
        ("nf4", None, 0.6, "nf4 has no layout"),
        ("int8", None, 2.0, "int8 has no layout"),
        ("ternary", WHOLE, 0.6, "ternary has no layout"),
        ("ternary", 32, 0.3, "takes 0.375 already"),
    ],
)
def test_budgets_that_cannot_be_kept_are_refused_before_anything_is_calibrated(
    tmp_path, runs, recipes, to, group, budget, message
):
    run, base = runs["python"]
    healing, lines = Healing(recipes["python"], max_bytes_per_weight=budget), []
    with pytest.raises(UsageError, match=message):
        pack(
            run, tmp_path / "p", to=to, group_size=group, base=base, healing=healing,
            report=lines.append,
        )  # fmt: skip
    assert not any("healing by" in line for line in lines)
    assert not os.listdir(tmp_path)


# --- Calibration data


def test_calibration_reads_recipes_texts_images_and_the_probe(tmp_path, runs, recipes):
    texts = tmp_path / "texts.jsonl"
    lines = [{"prompt": f"say {at}", "completion": "word " * (at + 1)} for at in range(10)]
    texts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for kind in ("a", "b"):
        (tmp_path / "images" / kind).mkdir(parents=True)
        for at in range(5):
            pixels = np.full((16, 16, 3), 20 * at, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / kind / f"{at}.png")
    for at in range(3):  # beside the classes, so not of them
        Image.new("RGB", (16, 16)).save(tmp_path / "images" / f"preview-{at}.png")
    unsorted = tmp_path / "unsorted"
    shutil.copytree(tmp_path / "images" / "a", unsorted)
    (unsorted / "notes.txt").write_text("no image")
    cases = [
        ("python", None, (5, 1)), ("python", recipes["python"], (72, 24)), ("python", texts, (7, 2)),
        ("digits", None, (6, 2)), ("digits", tmp_path / "images", (7, 2)),
        ("digits", unsorted, (4, 1)),
    ]  # fmt: skip
    for kind, file, counts in cases:
        run = open_checkpoint(runs[kind][0])
        data = calibration_data(run, run.path, file, 0, 512)
        assert data.counts == counts
        assert data.mixed == (0 if file else 15 * counts[0])
        assert sum(len(batch[min(batch)]) for batch in data.rows) == counts[0] + data.mixed
        assert (data.held_out_base is not None) == (file is None)
        again = calibration_data(run, run.path, file, 1, 512)
        assert data.digest == again.digest
        pairs = zip(data.rows[0].values(), again.rows[0].values(), strict=True)
        assert not all(torch.equal(*pair) for pair in pairs)


def test_data_that_do_not_fit_are_refused(tmp_path, runs, recipes):
    run = open_checkpoint(runs["digits"][0])
    with pytest.raises(Mismatch, match=r"calibration data .* are for causal-lm"):
        calibration_data(run, run.path, recipes["python"], 0, 1)
    with pytest.raises(InputRefused, match="no such directory"):
        calibration_data(run, run.path, tmp_path / "nowhere", 0, 1)
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(Mismatch, match=r"texts, and .* for image-classification"):
        calibration_data(run, run.path, tmp_path / "texts.jsonl", 0, 1)
    with pytest.raises(UsageError, match="not for gguf"):
        pack(runs["python"][0], tmp_path / "p", to="gguf", healing=Healing())


# --- The picture


def test_the_picture_shows_every_adapted_layer_also_when_the_gate_refuses(tmp_path, bases):
    adapter = make_adapter(bases["vit"], tmp_path / "a", Case("vit", NF4, size=0.02))
    drawn = []
    for name in ("one.svg", "two.svg"):
        with pytest.raises(CheckFailed, match="heal it with --heal"):
            pack(adapter.path, tmp_path / "p", to="nf4", base=bases["vit"], picture=tmp_path / name)
        drawn.append((tmp_path / name).read_bytes())
    assert drawn[0] == drawn[1]
    text = drawn[0].decode()
    assert text.count("#c2410c") >= 12  # all bars are below the gate
    large = make_adapter(bases["vit"], tmp_path / "b", Case("vit", NF4))
    pack(large.path, tmp_path / "p", to="nf4", base=bases["vit"], picture=tmp_path / "three.svg",
         min_retention=0.5)  # fmt: skip
    assert "#c2410c" not in (tmp_path / "three.svg").read_text()
    with pytest.raises(UsageError, match=r"\.png or an \.svg"):
        pack(large.path, tmp_path / "q", to="nf4", base=bases["vit"], picture=tmp_path / "x.txt")
