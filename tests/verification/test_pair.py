"""Any two kinds compared: on the probe, on more data, layer by layer; and the command's outputs."""

import json
import shutil
from xml.etree import ElementTree

import pytest
import torch

from qlx.checkpoint import (
    open_checkpoint,
    read_manifest,
    read_probe,
    resolve_source,
    seal,
    write_probe,
)
from qlx.cli import main
from qlx.errors import Mismatch, UsageError
from qlx.exporting import export_onnx
from qlx.merging import merge
from qlx.models import load_model
from qlx.models.trace import acting_weights, adapter_off
from qlx.packing import pack
from qlx.verification import evaluate, verify
from qlx.weights import read_tensors, write_tensors

KINDS = ("run", "merged", "merged16", "packed", "onnx", "onnx-packed", "onnx-separate")
EXACT = ("run", "merged", "onnx", "onnx-separate")


class Kinds:
    """One trained adapter in every kind."""

    def __init__(self, root, base, run):
        self.root, self.base, self.run = root, base, run
        self.path("run").symlink_to(run)
        merge(base, [run], self.path("merged"))
        merge(base, [run], self.path("merged16"), dtype="bfloat16")
        pack(self.path("merged"), self.path("packed"), to="nf4", min_retention=0.5)
        export_onnx(self.path("merged"), self.path("onnx"))
        export_onnx(self.path("packed"), self.path("onnx-packed"))
        export_onnx(run, self.path("onnx-separate"), base=base)

    def path(self, kind):
        return self.root / kind

    def verify(self, candidate, reference, **options):
        return verify(self.path(candidate), against=self.path(reference), base=self.base, **options)

    def spoiled(self, target, change, kind="merged"):
        """A copy with tensors changed and sealed again."""
        path = shutil.copytree(self.path(kind), target / kind)
        tensors = read_tensors(path)
        change(tensors)
        write_tensors(path / "model.safetensors", tensors)
        seal(path, read_manifest(path)[0])
        return path


@pytest.fixture(scope="module", params=["digits", "python"])
def kinds(request, tmp_path_factory):
    base, run = (request.getfixturevalue(f"{request.param}_{part}") for part in ("base", "run"))
    return Kinds(tmp_path_factory.mktemp(request.param), base, run)


def failures(report):
    return [check.name for check in report.failures]


@pytest.mark.parametrize("kind", KINDS[1:])
def test_every_kind_is_compared_with_the_unmerged_model(kinds, kind):
    report = kinds.verify(kind, "run", layers=True)
    assert report.passed, failures(report)
    assert report.comparisons["against"].retention > 0.9
    drift = report.drift
    assert drift.weights
    if kind.startswith("onnx"):
        assert drift.layers == ()
        assert "not visible" in drift.unseen[0]
        assert any(weight.retention is not None for weight in drift.weights)
    else:
        assert [layer.name.rpartition(".")[2] for layer in drift.layers] == [
            "embeddings", "0", "1", "head",
        ]  # fmt: skip
    if kind in EXACT:
        assert all(weight.drift < 1e-6 for weight in drift.weights)
        assert all(layer.own < 1e-6 for layer in drift.layers)
    else:
        assert any(weight.drift > 1e-4 for weight in drift.weights)
    adapted = [weight for weight in drift.weights if weight.retention is not None]
    assert len(adapted) >= 7
    assert all(0.9 < weight.retention < 1.1 for weight in adapted)
    assert all(weight.change > 0.01 for weight in adapted)


@pytest.mark.exhaustive
@pytest.mark.parametrize("candidate", KINDS)
@pytest.mark.parametrize("reference", KINDS)
def test_every_kind_with_every_other(kinds, candidate, reference):
    report = kinds.verify(candidate, reference, layers=True)
    assert report.passed, failures(report)
    if {candidate, reference} <= set(EXACT):
        assert report.comparisons["against"].relative < 1e-5


@pytest.mark.parametrize("kind", ["merged", "packed", "onnx"])
def test_more_data_count_and_score_what_eval_does(kinds, kind):
    report = kinds.verify(kind, "run", data=kinds.run / "recipe.yaml")
    assert report.passed, failures(report)
    assert set(report.comparisons) == {"against", "data"}
    assert report.comparisons["data"].positions > report.comparisons["against"].positions
    assert report.comparisons["data"].retention > 0.9
    scores = evaluate(kinds.path(kind), data=kinds.run / "recipe.yaml").metrics
    assert report.scores["this checkpoint"] == pytest.approx(scores, rel=1e-4)
    unmerged = evaluate(kinds.run, base=kinds.base).metrics
    assert report.scores["reference"] == pytest.approx(unmerged, rel=1e-4)
    assert "held-out" in report.inputs
    assert report.drift is None  # nothing failed, nobody asked


UP = ("up_proj.weight", "intermediate.dense.weight")


def _up(weights):
    return next(name for name in sorted(weights) if ".1." in name and name.endswith(UP))


def test_a_failure_shows_which_layer_and_which_weight_moved(kinds, tmp_path):
    def change(tensors):
        tensors[_up(tensors)] *= 1.1

    spoiled = kinds.spoiled(tmp_path, change)
    report = verify(spoiled, against=kinds.path("run"), base=kinds.base)
    assert "against: relative" in failures(report)
    layers = report.drift.layers
    assert report.drift.worst_layer.name.endswith("layers.1")
    assert layers[0].own == 0
    assert layers[1].own < 1e-6 < 1e-3 < layers[2].own
    assert layers[3].own < 1e-6 < layers[3].drift  # the head only passes it on
    moved = [weight.name for weight in report.drift.weights if weight.drift > 1e-3]
    assert len(moved) == 1
    assert ".1." in moved[0]
    assert verify(spoiled, against=kinds.path("run"), base=kinds.base, layers=False).drift is None


def test_an_undone_adapter_shows_as_no_retention(kinds, tmp_path):
    stored = read_manifest(kinds.path("merged"))[0].adapter.tensors
    model = load_model(open_checkpoint(kinds.run), resolve_source(str(kinds.base)))
    weights = acting_weights(model)
    gone = next(module for module in stored if "layers.0" in module)

    def change(tensors):
        with adapter_off(model):
            tensors[stored[gone]] = torch.from_numpy(weights[f"{gone}.weight"]().copy())

    report = verify(
        kinds.spoiled(tmp_path, change), against=kinds.path("run"), base=kinds.base, layers=True
    )
    found = {weight.name: weight for weight in report.drift.weights}
    assert found[f"{gone}.weight"].retention == pytest.approx(0, abs=1e-3)
    kept = [
        w.retention for w in report.drift.weights if w.retention and not w.name.startswith(gone)
    ]
    assert min(kept) > 0.999
    assert report.drift.layers[1].retention < 0.999


def test_a_defect_shows_on_data_alone_where_there_is_no_probe(kinds, tmp_path):
    def strip(path):
        (path / "probe.safetensors").unlink()
        seal(path, read_manifest(path)[0].model_copy(update={"probe": None}))
        return path

    good = strip(shutil.copytree(kinds.path("merged"), tmp_path / "good"))
    other = strip(shutil.copytree(kinds.path("merged"), tmp_path / "other"))
    data = kinds.run / "recipe.yaml"
    report = verify(good, against=other, data=data)
    assert report.passed
    assert list(report.comparisons) == ["data"]

    def change(tensors):
        tensors[_up(tensors)] *= -1

    bad = strip(kinds.spoiled(tmp_path / "bad", change))
    report = verify(bad, against=other, data=data)
    assert "data: relative" in failures(report)
    assert report.drift.worst_layer.name.endswith("layers.1")


def test_the_noise_floor_is_the_precisions_own_error(kinds):
    exact = kinds.verify("merged", "run", layers=True)
    assert 1e-9 < exact.noise_floor < 1e-6
    assert exact.comparisons["against"].relative < 10 * exact.noise_floor
    rounded = kinds.verify("merged16", "run", layers=True)
    assert 1e-4 < rounded.noise_floor < 5e-2
    assert rounded.comparisons["against"].relative < 2 * rounded.noise_floor
    assert any("× that" in note for note in rounded.notes)


def test_limits_of_scores_and_layers_can_be_set_and_fail(kinds):
    loose = {"score_drop": 0.5, "loss_rise": 1.0, "layer_drift": 0.5}
    report = kinds.verify("packed", "run", tighten=loose)
    assert report.passed, failures(report)
    assert "head: layer_drift" in [check.name for check in report.checks]
    report = kinds.verify("packed", "run", tighten={"layer_drift": 1e-5, "loss_rise": -1.0})
    assert "against: loss_rise" in failures(report)
    assert sum(name.endswith("layer_drift") for name in failures(report)) == 2
    report = kinds.verify("onnx", "run", tighten={"layer_drift": 1.0})
    assert failures(report) == ["layers: layer_drift"]  # what cannot be seen is not passed


def test_two_directories_of_one_name_are_told_apart(kinds, tmp_path):
    copy = shutil.copytree(kinds.path("merged"), tmp_path / "merged")
    report = verify(kinds.path("merged"), against=copy)
    names = [check.name for check in report.checks]
    assert len(set(names)) == len(names)


def test_without_another_checkpoint_there_are_no_outputs_for_more_data(kinds):
    with pytest.raises(UsageError, match="--against"):
        verify(kinds.path("merged"), data=kinds.run / "recipe.yaml")
    with pytest.raises(UsageError, match="--against"):
        verify(kinds.path("merged"), layers=True)


def test_other_probes_are_refused_without_data_and_passed_over_with(kinds, tmp_path):
    path = shutil.copytree(kinds.path("merged"), tmp_path / "merged")
    probe = read_probe(path)
    inputs = {name: array[::-1].copy() for name, array in probe.inputs.items()}
    write_probe(path / "probe.safetensors", type(probe)(probe.task, inputs, probe.reference))
    seal(path, read_manifest(path)[0])
    with pytest.raises(Mismatch, match="different inputs"):
        verify(path, against=kinds.path("merged"))
    report = verify(path, against=kinds.path("merged"), data=kinds.run / "recipe.yaml")
    assert list(report.comparisons) == ["data"]


# --- The command


def test_the_command_writes_everything_it_found(kinds, tmp_path, capsys):
    files = {name: tmp_path / f"out.{name}" for name in ("junit", "markdown", "png")}
    code = main([
        "verify", str(kinds.path("packed")), "--against", str(kinds.path("run")),
        "--base", str(kinds.base), "--data", str(kinds.run / "recipe.yaml"),
        "--limit", "kl_mean=1", "--picture", str(files["png"]),
        "--junit", str(files["junit"]), "--markdown", str(files["markdown"]), "--json",
    ])  # fmt: skip
    data = json.loads(capsys.readouterr().out)
    assert code == 0, data["rows"]
    assert data["passed"]
    assert data["drift"]["layers"][1]["own"] > 1e-3
    assert {"relative", "max_abs", "kl_mean", "kl_p99", "top1", "retention"} <= set(
        data["comparisons"]["data"]
    )
    assert "data: kl_mean" in [check["name"] for check in data["checks"]]
    suite = ElementTree.parse(files["junit"]).getroot()
    assert suite.get("failures") == "0"
    assert int(suite.get("tests")) == len(data["checks"])
    text = files["markdown"].read_text()
    assert all(word in text for word in ("× noise", "own drift", "adapter's change", "█"))
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def test_the_command_fails_past_a_limit(kinds, tmp_path, capsys):
    path, reference = str(kinds.path("packed")), str(kinds.path("merged"))
    junit = tmp_path / "out.xml"
    assert main(["verify", path, "--against", reference, "--junit", str(junit)]) == 0
    assert "own drift" not in capsys.readouterr().out
    limit = ["--limit", "relative=1e-4", "--junit", str(junit)]
    assert main(["verify", path, "--against", reference, *limit]) == 1
    out = capsys.readouterr().out
    assert "NOT verified" in out
    assert "own drift" in out  # looked inside because it failed
    assert ElementTree.parse(junit).getroot().get("failures") == "1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "relative=1"], "looser"),
        (["--limit", "speed=1"], "no limit called"),
        (["--limit", "relative"], "NAME=VALUE"),
        (["--limit", "relative=nan"], "NAME=VALUE"),
        (["--picture", "drift.gif"], "png"),
        (["--picture", "drift.png"], "--against"),
        (["--data", "pyproject.toml"], "--against"),
    ],
)
def test_wrong_options_are_usage_errors(kinds, capsys, options, message):
    assert main(["verify", str(kinds.path("merged")), *options]) == 2
    assert message in capsys.readouterr().err
