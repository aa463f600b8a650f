"""Adapters beside one graph against PEFT, unmerged, on every kind of base; with controls that must fail."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from qlx.checkpoint import (
    QuantSpec,
    open_checkpoint,
    read_manifest,
    read_probe,
    resolve_source,
    seal,
    write_probe,
)
from qlx.errors import (
    CheckFailed,
    CorruptCheckpoint,
    InputRefused,
    Mismatch,
    Unsupported,
    UsageError,
)
from qlx.exporting import build_graph, export_adapters, named_adapters, write_graph
from qlx.exporting.fused import can_fuse
from qlx.models import forward_logits, load_base, load_model
from qlx.quant import packed_linears
from qlx.runtime import OnnxPredictor, open_model, session_options
from qlx.verification import compare, verify
from qlx.verification.graph import graph_weights
from tests.adapter_support import NF4, NONE, TASKS, Case, inputs_for, make_adapter
from tests.exporting.matrix import ARCHITECTURES, build

SLOW = pytest.mark.exhaustive
ROOT = Path(__file__).parents[2]


def integers(scheme):
    return QuantSpec(method="qlora", scheme=scheme, group_size=64, backend="qlx")


SCHEMES = {"none": NONE, "nf4": NF4, "int4": integers("int4"), "ternary": integers("ternary")}
OPTIONS = {
    "plain": {"bias": "lora_only"},
    "patterns": {
        "rank": 7,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2, "layers.1.*v_proj": 5},
        "alpha_pattern": {"k_proj": 3.0},
    },
    "dora": {"use_dora": True, "target_modules": ["q_proj", "v_proj"]},
}
"""Three adapters on one base: trained biases, patterns of rank and alpha, DoRA on a part of the layers."""


@pytest.fixture(scope="session")
def exported_with(bases, room):
    """`exported_with(kind, scheme)`: the adapters by name, and the base exported with them, made once."""
    made = {}

    def of(kind, scheme):
        if (kind, scheme) not in made:
            folder = room / f"swap-{kind}-{scheme}"
            head = {"modules_to_save": ("classifier",)} if kind == "vit" else {}
            adapters = {
                name: make_adapter(
                    bases[kind],
                    folder / name,
                    Case(kind, SCHEMES[scheme], seed=seed, options=options | (head if seed == 1 else {})),
                )
                for seed, (name, options) in enumerate(OPTIONS.items())
            }  # fmt: skip
            given = [str(each.path) for each in adapters.values()]
            made[kind, scheme] = adapters, export_adapters(bases[kind], given, folder / "onnx")
        return made[kind, scheme]

    return of


KINDS = [
    ("llama", "none"),
    ("vit", "nf4"),
    *(pytest.param(kind, scheme, marks=SLOW)
      for kind, scheme in (("vit", "none"), ("vit", "int4"), ("vit", "ternary"), ("llama", "nf4"),
                           ("llama", "int4"), ("llama", "ternary"))),
]  # fmt: skip


def other_inputs(kind):
    """Inputs that are not those of the probe."""
    inputs = inputs_for(kind)
    if "pixel_values" in inputs:
        return {"pixel_values": inputs["pixel_values"][::-1] * 0.7}
    return {"input_ids": (inputs["input_ids"] * 5 + 1) % 96, "attention_mask": inputs["attention_mask"]}  # fmt: skip


def mask_of(inputs):
    mask = inputs.get("attention_mask")
    return None if mask is None else mask.astype(bool)


@pytest.mark.parametrize(("kind", "scheme"), KINDS)
def test_each_adapter_computes_what_peft_computes_and_none_the_base(
    exported_with, bases, tmp_path, kind, scheme
):
    adapters, done = exported_with(kind, scheme)
    inputs, model = other_inputs(kind), open_model(done.path, threads=1)
    found = {name: OnnxPredictor(model, adapter=name).predict(inputs) for name in (None, *adapters)}
    source = resolve_source(str(bases[kind]))
    for name, adapter in adapters.items():
        wanted = forward_logits(load_model(adapter, source), TASKS[kind], inputs)
        distances = {
            each: compare(wanted, outputs, mask_of(inputs)).relative
            for each, outputs in found.items()
        }
        assert distances.pop(name) <= 1e-5
        assert min(distances.values()) > 1e-2
    keep = mask_of(inputs) if mask_of(inputs) is not None else slice(None)
    plain = plain_outputs(bases[kind], kind, scheme, tmp_path, inputs)
    np.testing.assert_array_equal(found[None][keep], plain[keep])


def plain_outputs(base, kind, scheme, folder, inputs):
    """What the base gives in a graph without room for adapters."""
    quant = SCHEMES[scheme]
    model = load_base(base, TASKS[kind], quant=quant if quant.quantized else None)
    packed_linears(model)
    fuse = can_fuse(model, TASKS[kind])
    write_graph(build_graph(model, TASKS[kind], fuse=fuse), folder, TASKS[kind])
    session = ort.InferenceSession(folder / "model.onnx", session_options(1))
    feeds = dict(inputs)
    if "input_ids" in feeds:
        feeds["position_ids"] = np.maximum(feeds["attention_mask"].cumsum(1) - 1, 0)
        for item in session.get_inputs():
            if item.name.startswith("past_key_values"):
                shape = (len(feeds["input_ids"]), item.shape[1], 0, item.shape[3])
                feeds[item.name] = np.zeros(shape, np.float32)
    return session.run(["logits"], feeds)[0]


@pytest.mark.parametrize(("kind", "scheme"), KINDS)
def test_rows_of_one_batch_have_adapters_of_their_own(exported_with, kind, scheme):
    adapters, done = exported_with(kind, scheme)
    inputs, model = other_inputs(kind), open_model(done.path, threads=1)
    names = [None, *adapters, *reversed(adapters), None, "dora", "dora"]
    inputs = {name: values[: len(names)] for name, values in inputs.items()}
    mixed = OnnxPredictor(model, adapter=names).predict(inputs)
    for row, name in enumerate(names):
        alone = OnnxPredictor(model, adapter=name).predict(inputs)
        kept = slice(None) if mask_of(inputs) is None else mask_of(inputs)[row]
        scale = np.abs(alone[row][kept]).max()
        assert np.abs(mixed[row] - alone[row])[kept].max() <= 1e-5 * scale
        neighbour = OnnxPredictor(model, adapter="plain" if name != "plain" else None)
        assert np.abs(mixed[row] - neighbour.predict(inputs)[row])[kept].max() > 1e-3 * scale


def test_the_directory_says_what_it_holds(exported_with):
    adapters, done = exported_with("vit", "nf4")
    manifest = done.manifest
    assert list(manifest.adapters) == sorted(adapters)
    for name, adapter in adapters.items():
        entry = manifest.adapters[name]
        assert (entry.file, entry.digest) == (f"{name}.onnx_adapter", adapter.digest)
        assert entry.adapter == adapter.manifest.adapter
        assert [step.command for step in entry.lineage] == ["train", "export-onnx"]
        (result,) = entry.probe.results
        assert result.passed
        assert result.metrics["relative"] <= 1e-5
    assert manifest.adapter is None
    assert manifest.base == adapters["plain"].manifest.base
    graph = onnx.load(done.path / "model.onnx").graph
    stored = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    ranks = {dims[2] for name, dims in stored.items() if name.endswith(".lora_A")}
    assert ranks == {0}  # the base's graph holds nothing of any adapter
    assert sum(name.endswith("weight_codes") for name in stored) == len(
        manifest.quantization.modules
    )


def test_verify_replays_the_base_and_every_adapter(exported_with, adapters, bases):
    mine, done = exported_with("vit", "nf4")
    report = verify(done.path)
    assert report.passed
    assert set(report.comparisons) == {"reference", *(f"reference of {name}" for name in mine)}
    alone = verify(done.path, adapter="dora")
    assert alone.passed
    assert alone.subject == "onnx with dora"
    against = verify(
        done.path, adapter="dora", against=mine["dora"].path, base=bases["vit"], layers=True
    )
    assert against.passed
    assert max(weight.drift for weight in against.drift.weights) < 1e-5
    other = verify(done.path, adapter="plain", against=mine["dora"].path, base=bases["vit"])
    assert not other.passed
    with pytest.raises(UsageError, match="there are dora, patterns, plain"):
        verify(done.path, adapter="dorra")
    with pytest.raises(UsageError, match="no swappable adapters"):
        verify(mine["dora"].path, base=bases["vit"], adapter="dora")


def test_weights_in_the_graph_are_the_adapters(exported_with):
    _, done = exported_with("vit", "nf4")
    graph = done.path / "model.onnx"
    base, moved = graph_weights(graph), graph_weights(graph, done.path / "dora.onnx_adapter")
    touched = {n for n in base if not np.array_equal(base[n](), moved[n]())}
    assert touched == {f"vit.layers.{at}.attention.{part}_proj.weight" for at in (0, 1) for part in "qv"}  # fmt: skip


def rewritten(source, target, change):
    """A copy of an export, one of whose adapter files holds other tensors, sealed again."""
    shutil.copytree(source, target)
    file = target / "patterns.onnx_adapter"
    tensors = {
        name: value.numpy().copy()
        for name, value in ort.AdapterFormat.read_adapter(str(file)).get_parameters().items()
    }
    changed = ort.AdapterFormat()
    arrays = [(name, np.ascontiguousarray(value)) for name, value in change(tensors)]
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays}
    changed.set_parameters(values)  # holds on to neither values nor arrays
    changed.export_adapter(str(file))
    seal(target, read_manifest(target)[0])
    return target


WRONG = {
    "no scaling": lambda tensors: (
        (name, value / (7**0.5 if name.endswith("lora_B") else 1)) for name, value in tensors.items()
    ),
    "one sign": lambda tensors: (
        (name, -value if name.endswith("layers.0.attention.q_proj.lora_B") else value)
        for name, value in tensors.items()
    ),
    "one layer less": lambda tensors: (
        (name, value) for name, value in tensors.items() if ".layers.1.attention.q_proj" not in name
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_an_adapter_that_is_not_the_recorded_one_fails(exported_with, tmp_path, what):
    _, done = exported_with("vit", "nf4")
    report = verify(rewritten(done.path, tmp_path / "copy", WRONG[what]))
    assert {check.name for check in report.failures} >= {"reference of patterns: relative"}
    assert all("of patterns" in check.name for check in report.failures)
    assert verify(rewritten(done.path, tmp_path / "same", dict.items)).passed


def test_another_adapters_bytes_fail(exported_with, tmp_path):
    _, done = exported_with("vit", "nf4")
    shutil.copytree(done.path, tmp_path / "copy")
    shutil.copyfile(done.path / "dora.onnx_adapter", tmp_path / "copy" / "plain.onnx_adapter")
    with pytest.raises(CorruptCheckpoint, match=r"plain\.onnx_adapter"):
        verify(tmp_path / "copy")
    seal(tmp_path / "copy", done.manifest)
    assert {c.name.partition(":")[0] for c in verify(tmp_path / "copy").failures} == {
        "reference of plain"
    }


SHAPES = {
    "a and b exchanged": (
        lambda tensors: (
            (name.replace("lora_A", "lora_X").replace("lora_B", "lora_A").replace("lora_X", "lora_B"), value)
            for name, value in tensors.items()
        ),
        "is not what the graph takes",
    ),
    "no such layer": (
        lambda tensors: ((f"x.{name}", value) for name, value in tensors.items()),
        "no such input",
    ),
    "half a pair": (
        lambda tensors: ((n, v) for n, v in tensors.items() if "0.attention.q_proj.lora_B" not in n),
        "not of one rank",
    ),
    "other numbers": (
        lambda tensors: ((name, value.astype(np.float16)) for name, value in tensors.items()),
        "is not what the graph takes",
    ),
    "nothing": (lambda tensors: (), "no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("what", SHAPES)
def test_a_file_that_does_not_fit_the_graph_is_refused_by_tensor(exported_with, tmp_path, what):
    change, words = SHAPES[what]
    copy = rewritten(exported_with("vit", "nf4")[1].path, tmp_path / "copy", change)
    with pytest.raises(CorruptCheckpoint, match=words):
        OnnxPredictor(copy, adapter="patterns")
    OnnxPredictor(copy, adapter="plain")


def test_names_are_read_and_doubles_refused(tmp_path):
    for name in ("one", "two", "a=b"):
        (tmp_path / name).mkdir()
    one, two = tmp_path / "one", tmp_path / "two"
    assert named_adapters([f"{one}/", f"x={two}"]) == [("one", Path(f"{one}/")), ("x", two)]
    for given, words in (
        ([one, one], "two adapters 'one'"),
        ([one, f"One={two}"], "two adapters 'One'"),
        ([one, f"={two}"], "write NAME=DIR"),
        ([f"a/b={two}"], "not allowed"),
        ([tmp_path / "a=b"], "not allowed"),
        ([tmp_path / "three"], "there is no directory"),
        ([f"x={tmp_path / 'three'}"], "there is no directory"),
    ):
        with pytest.raises(UsageError, match=words):
            named_adapters(map(str, given))


def refused(bases, tmp_path, adapters, error, words, base="vit"):
    """Exporting fails for that reason and writes nothing."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=words):
        export_adapters(str(bases[base]), [str(each.path) for each in adapters], tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_what_does_not_belong_together_is_refused(bases, exported_with, adapters, tmp_path):
    plain, ternary = (exported_with("vit", scheme)[0]["plain"] for scheme in ("nf4", "ternary"))
    other = make_adapter(bases["vit"], tmp_path / "other", Case("vit", NF4))
    (other.path / "preprocessor_config.json").write_text("{}")
    seal(other.path, other.manifest)
    for given, error, words in (
        ([plain, adapters["llama", "none"]], Mismatch, "was trained on base-llama"),
        ([plain, ternary], Mismatch, "two adapters|quantization of its base"),
        ([plain, open_checkpoint(other.path)], Mismatch, "preprocessor_config.json.*share"),
        ([], UsageError, "no adapter"),
    ):
        named = [(f"n{at}", each.path) for at, each in enumerate(given)]
        with pytest.raises(error, match=words):
            export_adapters(str(bases["vit"]), named, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_model_in_place_of_an_adapter_is_refused(bases, merged, tmp_path):
    refused(
        bases, tmp_path, [merged["image-classification"]], InputRefused, "is no adapter to swap"
    )


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("llama", {"modules_to_save": ("embed_tokens",)}, "'model.embed_tokens' whole"),
        ("llama", {"modules_to_save": ("model.norm",)}, "'model.norm' whole"),
        ("vit", {"modules_to_save": ("layernorm",)}, "whole, which is no plain linear layer"),
    ],
)
def test_what_cannot_be_an_input_is_refused_with_the_reason(bases, tmp_path, kind, changes, words):
    adapter = make_adapter(bases[kind], tmp_path / "adapter", Case(kind, options=changes))
    refused(bases, tmp_path, [adapter], Unsupported, f"{words}.*without --adapter", base=kind)


def test_an_export_that_gives_other_outputs_leaves_no_directory(bases, tmp_path, monkeypatch):
    adapter = make_adapter(bases["vit"], tmp_path / "bad", Case("vit"))
    probe = read_probe(adapter.path)
    write_probe(
        adapter.path / "probe.safetensors", replace(probe, reference=probe.reference * 1.01)
    )
    seal(adapter.path, adapter.manifest)
    refused(bases, tmp_path, [adapter], CheckFailed, "adapter 'bad'.*reference: relative")
    write_probe(adapter.path / "probe.safetensors", probe)
    seal(adapter.path, adapter.manifest)
    monkeypatch.setattr(
        "qlx.exporting.swappable.forward_logits", lambda *given: forward_logits(*given) * 1.01
    )
    refused(bases, tmp_path, [adapter], CheckFailed, "^export-onnx.*reference: relative")


@pytest.mark.exhaustive
def test_another_process_writes_the_same_bytes(exported_with, bases, tmp_path):
    adapters, done = exported_with("vit", "nf4")
    script = (
        "import sys\nfrom qlx.exporting import export_adapters\n"
        "print(export_adapters(sys.argv[1], sys.argv[3:], sys.argv[2]).digest)"
    )
    given = [bases["vit"], tmp_path / "again", *(each.path for each in adapters.values())]
    environment = {**os.environ, "PYTHONHASHSEED": "5", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "-c", script, *map(str, given)],
        capture_output=True, text=True, env=environment, cwd=tmp_path, check=True,
    )  # fmt: skip
    assert found.stdout.strip() == done.digest


@SLOW
@pytest.mark.parametrize(
    ("rounding", "scheme"),
    [
        ({"precision": "fp16"}, "none"),
        ({"accuracy_level": 4}, "ternary"),
        ({"accuracy_level": 4}, "nf4"),
    ],
)
def test_a_base_that_rounds_states_its_price_for_every_adapter(
    exported_with, bases, tmp_path, rounding, scheme
):
    name, adapter = next(iter(exported_with("vit", scheme)[0].items()))
    done = export_adapters(bases["vit"], [str(adapter.path)], tmp_path / "out", **rounding)
    (result, *_) = done.manifest.adapters[name].probe.results
    assert 1e-5 < result.metrics["relative"] < 5e-2
    options = done.manifest.adapters[name].lineage[-1].options
    assert ("levels_rounded" in options) == (scheme == "nf4")
    assert verify(done.path).passed
    assert read_probe(done.path / f"{name}.probe.safetensors").own is not None


PLAIN = """
import sys
for name in ("qlx", "torch", "transformers"): sys.modules[name] = None
import numpy as np, onnxruntime as ort
from safetensors.numpy import load_file
directory, name = sys.argv[1:]
probe = load_file(f"{directory}/{name}.probe.safetensors")
options = ort.SessionOptions(); options.log_severity_level = 3
session = ort.InferenceSession(directory + "/model.onnx", options)
adapter = ort.LoraAdapter(); adapter.Load(f"{directory}/{name}.onnx_adapter")
run = ort.RunOptions(); run.add_active_adapter(adapter)
inputs = {"pixel_values": probe["input.pixel_values"]}
base = load_file(f"{directory}/probe.safetensors")
for each, wanted in ((run, probe), (None, base)):
    (logits,) = session.run(["logits"], inputs, each)
    reference = wanted["output.reference"]
    print(np.linalg.norm(logits - reference) / np.linalg.norm(reference))
"""

GENAI = """
import sys
for name in ("qlx", "torch", "transformers"): sys.modules[name] = None
import json, numpy as np, onnxruntime_genai as og
directory, prompt, *names = sys.argv[1:]
model = og.Model(directory)
adapters = og.Adapters(model)
for name in names: adapters.load(f"{directory}/{name}.onnx_adapter", name)
found = []
for name in [None, *names]:
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=24, do_sample=False)
    generator = og.Generator(model, parameters)
    if name: generator.set_active_adapter(adapters, name)
    generator.append_tokens(np.array([json.loads(prompt)], np.int32))
    found.append(np.asarray(generator.get_logits())[0, -1].tolist())
print(json.dumps(found))
"""


def run(script, *arguments):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_plain_onnxruntime_swaps_the_adapters(exported_with):
    _, done = exported_with("vit", "nf4")
    for name in ("plain", "dora"):
        assert all(float(line) < 1e-5 for line in run(PLAIN, done.path, name).split())


def test_genai_swaps_the_adapters(exported_with, adapters):
    mine, done = exported_with("llama", "none")
    prompt, names = [5, 6, 7, 8, 9], [*mine]
    found = json.loads(run(GENAI, done.path, json.dumps(prompt), *names))
    model = open_model(done.path, threads=1)
    for name, logits in zip([None, *names], found, strict=True):
        expected = OnnxPredictor(model, adapter=name).predict({"input_ids": np.array([prompt])})
        np.testing.assert_allclose(logits, expected[0, -1], atol=1e-5 * np.abs(expected).max())
    assert not np.allclose(found[0], found[1], atol=1e-2)


def test_what_training_made_keeps_its_score(
    swappable_digits, digits_base, digits_run, digits_second
):
    from qlx.verification import evaluate

    assert verify(swappable_digits).passed
    for name, adapter in (("first", digits_run), ("second", digits_second)):
        wanted, found = (
            evaluate(adapter, base=digits_base),
            evaluate(swappable_digits, adapter=name),
        )
        assert found.metrics == pytest.approx(wanted.metrics, rel=1e-5)
        assert found.subject == f"digits with {name}"
    with pytest.raises(InputRefused, match="no evaluation data"):
        evaluate(swappable_digits)


@SLOW
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda each: each.name)
def test_every_architecture_takes_adapters_mixed_batches_included(architecture, tmp_path):
    """The export itself compares each adapter with PEFT, and a mixed batch with each alone."""
    build(architecture).save_pretrained(tmp_path / "base")
    kind = "vit" if architecture.task == "image-classification" else "llama"
    adapters = [
        make_adapter(tmp_path / "base", tmp_path / name, Case(kind, seed=at, image_size=16))
        for at, name in enumerate(("one", "two"))
    ]
    given = str(tmp_path / "base"), [str(each.path) for each in adapters], tmp_path / "onnx"
    if architecture.name == "OPT":  # flattens its tokens before the feed-forward layers
        with pytest.raises(Unsupported, match="rows of a batch cannot have adapters"):
            export_adapters(*given)
        return
    done = export_adapters(*given)
    for entry in done.manifest.adapters.values():
        assert entry.probe.results[-1].metrics["relative"] <= 1e-5
    inputs, model = inputs_for(kind, image_size=16), open_model(done.path, threads=1)
    one, two = (OnnxPredictor(model, adapter=name).predict(inputs) for name in ("one", "two"))
    assert compare(one, two, mask_of(inputs)).relative > 1e-3


@SLOW
def test_an_architecture_whose_rows_cannot_be_told_apart_is_refused(bases, tmp_path, monkeypatch):
    def flat(self, x):
        return self._adapted(x.reshape(1, -1, x.shape[-1])).reshape(*x.shape[:-1], -1)

    monkeypatch.setattr("qlx.exporting.separate.SwappableLora.forward", flat)
    adapter = make_adapter(bases["vit"], tmp_path / "one", Case("vit"))
    refused(bases, tmp_path, [adapter], Unsupported, "rows of a batch cannot have adapters")
