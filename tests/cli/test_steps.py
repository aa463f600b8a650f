"""Every step as a command, on real small models: what it prints, what it makes, how it ends."""

import contextlib
import io
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest

from qlx.checkpoint import Manifest, new_checkpoint, open_checkpoint, seal
from qlx.cli import main
from qlx.weights import read_arrays, write_arrays

CASES = [
    pytest.param((f"{task}_run{suffix}", f"{task}_base", scheme), id=f"{task}-{scheme}")
    for task in ("digits", "python")
    for suffix, scheme in (("", "nf4"), ("_fp4", "fp4"))
]


def call(*arguments):
    """(exit code, standard output, standard error) of a call."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return code, out.getvalue(), err.getvalue()


def result(*arguments, code=0):
    """The one JSON object of a call that ends with `code`."""
    got, out, err = call(*arguments, "--json", "--quiet")
    assert got == code, err
    return json.loads(out)


@dataclass
class Line:
    """One model through all steps: the folder, its base, its run, and each step's result."""

    folder: Path
    base: Path
    run: Path
    scheme: str
    made: dict

    def __truediv__(self, name):
        return self.folder / name


@pytest.fixture(scope="module", params=CASES)
def line(request, tmp_path_factory):
    run, base, scheme = request.param
    run, base = request.getfixturevalue(run), request.getfixturevalue(base)
    folder = tmp_path_factory.mktemp("line")
    made = {
        "adapter": result("save-adapter", run, "-o", folder / "adapter", "--base", base),
        "merged": result("merge", "--base", base, "--adapter", folder / "adapter", "-o", folder / "merged"),
        "packed": result("pack", folder / "merged", "-o", folder / "packed", "--to", scheme,
                         "--base", base, "--min-retention", "0"),
        "onnx": result("export-onnx", folder / "merged", "-o", folder / "onnx"),
        "onnx-packed": result("export-onnx", folder / "packed", "-o", folder / "onnx-packed"),
    }  # fmt: skip
    return Line(folder, base, run, scheme, made)


KINDS = {
    "adapter": "adapter",
    "merged": "merged",
    "packed": "packed",
    "onnx": "onnx",
    "onnx-packed": "onnx",
}


def test_each_step_makes_a_checkpoint_and_says_what_it_measured(line):
    for name, kind in KINDS.items():
        data = line.made[name]
        checkpoint = open_checkpoint(line / name)
        assert (data["kind"], data["digest"]) == (kind, checkpoint.digest)
        assert data["size"] == sum(entry.size for entry in checkpoint.manifest.files.values())
        assert data["results"]
        assert all(replay["passed"] for replay in data["results"])
    assert line.made["merged"]["results"][-1]["metrics"]["relative"] <= 1e-5
    assert line.made["onnx"]["results"][-1]["metrics"]["relative"] <= 1e-4


def test_every_kind_verifies_and_scores(line):
    for name in KINDS:
        base = ("--base", line.base) if name == "adapter" else ()
        report = result("verify", line / name, *base)
        assert report["passed"] is True
        assert report["comparisons"]
        scored = result("eval", line / name, *base)
        assert scored["count"] > 0
        assert {"accuracy", "token_accuracy"} & set(scored["metrics"])


def test_the_merged_and_its_onnx_score_like_the_adapter(line):
    scores = {
        name: result("eval", line / name, *base)["metrics"]
        for name, base in (("adapter", ("--base", line.base)), ("merged", ()), ("onnx", ()))
    }
    for name in ("merged", "onnx"):
        assert scores[name] == pytest.approx(scores["adapter"], rel=1e-4)


def test_an_adapter_can_be_tried_by_hand(line, tmp_path):
    tried = result("load-adapter", "--base", line.base, "--adapter", line / "adapter")
    assert (tried["passed"], tried["answer"]) == (True, None)
    asked = ("load-adapter", "--base", line.base, "--adapter", line / "adapter")
    code, _, err = call(*asked, "--adapter", line / "adapter")
    assert (code, "one is tried at a time" in err) == (2, True)
    code, _, err = call(*asked, "--chat")
    assert (code, "--chat is about --prompt" in err) == (2, True)
    if "digits" in line.run.name:
        from PIL import Image

        Image.new("RGB", (20, 20), "white").save(tmp_path / "picture.png")
        answer = result(*asked, "--input", tmp_path / "picture.png")["answer"]
        assert answer.endswith("%)")
        assert call(*asked, "--prompt", "x")[0] == 2
    else:
        plain = result(*asked, "--prompt", "def main")["answer"]
        chat = result(*asked, "--prompt", "Document this: def main()", "--chat")["answer"]
        assert isinstance(plain, str)
        assert isinstance(chat, str)
        assert call(*asked, "--input", line.run / "recipe.yaml")[0] == 2


def test_a_heatmap_model_says_where_the_ball_is(tennis_base, tennis_models, tennis_clips, tmp_path):
    frames = sorted(tennis_clips.glob("bright/game1/Clip2/*.png"))[:2]
    asked = ("load-adapter", "--base", tennis_base, "--adapter", tennis_models["adapter"])
    code, out, err = call(*asked, "--input", frames[0])
    assert code == 0, err
    assert re.search(
        r"^ball: (x [\d.-]+, y [\d.-]+|not in the frame) \([\d.]+%\)$", out, re.MULTILINE
    )
    code, _, err = call(*asked, "--input", frames[0], "--input", frames[1])
    assert (code, "sees 1 frames at once, not 2" in err) == (3, True)
    assert call(*asked, "--prompt", "x")[0] == 2
    (tmp_path / "data.yaml").write_text(
        f"name: x\ntask: heatmap\nbase: {{path: {tennis_base}}}\ndata: {{source: tracknet, path: {tennis_clips}/dim}}\n"
    )
    code, out, err = call("eval", tennis_models["onnx"], "--data", tmp_path / "data.yaml")
    assert code == 0, err
    assert "40 heatmaps" in out
    assert re.search(r"^  f1 +0\.\d{4}$", out, re.MULTILINE)
    assert "heatmap" in call("inspect", tennis_models["onnx"])[1]


def test_people_get_tables_and_the_same_verdict(line, tmp_path):
    code, out, _ = call(
        "verify", line / "merged", "--junit", tmp_path / "r.xml", "--markdown", tmp_path / "r.md"
    )
    assert code == 0
    assert out.rstrip().endswith("verified")
    assert "<testsuite" in (tmp_path / "r.xml").read_text()
    assert "| check |" in (tmp_path / "r.md").read_text()
    for name in ("adapter", "packed"):
        code, out, _ = call("inspect", line / name)
        assert code == 0
        assert f"{line.scheme}, groups of 64" in out


def test_two_checkpoints_can_be_compared(line):
    report = result("verify", line / "onnx", "--against", line / "merged")
    assert report["passed"] is True
    assert "merged" in report["against"]


def test_the_onnx_is_served_until_a_signal(line):
    program = Path(sys.executable).with_name("qlx")
    with subprocess.Popen(
        [program, "serve", line / "onnx", "--port", "0", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        address = re.search(r"http://[\d.:]+", server.stderr.readline())[0]
        told = json.loads("".join(server.stdout.readline() for _ in range(6)))
        with urllib.request.urlopen(f"{address}/v1/models", timeout=30) as reply:
            (model,) = json.load(reply)["data"]
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
        assert (server.stdout.read(), server.stderr.read()) == ("", "")
    assert told == {"address": address, "models": [model["id"]]}
    assert model["kind"] == "onnx"
    assert model["verified"]["passed"] is True


# --- What must not pass


def copied(directory, target):
    shutil.copytree(directory, target)
    return target


def test_a_flipped_byte_is_refused(line, tmp_path):
    victim = copied(line / "merged", tmp_path / "victim")
    file = victim / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    code, out, err = call("verify", victim)
    assert (code, out) == (3, "")
    assert "model.safetensors" in err


def test_a_changed_weight_under_a_fresh_seal_fails_the_check(line, tmp_path):
    """Digests can be made anew by whoever changes a file; the probe cannot."""
    victim = copied(line / "merged", tmp_path / "victim")
    arrays = read_arrays(victim / "model.safetensors")
    name = next(name for name in arrays if name.endswith(("query.weight", "q_proj.weight")))
    arrays[name] = -arrays[name]
    write_arrays(victim / "model.safetensors", arrays)
    manifest = open_checkpoint(line / "merged").manifest
    (victim / "qlx.json").unlink()
    seal(victim, manifest)
    report = result("verify", victim, code=1)
    assert report["passed"] is False
    assert "NOT verified" in call("verify", victim)[1]


def test_the_wrong_base_is_refused(line, request):
    other = request.getfixturevalue("python_base" if "digits" in line.run.name else "digits_base")
    code, _, err = call("verify", line / "adapter", "--base", other)
    assert code == 3
    assert "not the base" in err


def test_an_existing_output_is_left_alone_unless_forced(line):
    before = open_checkpoint(line / "adapter").digest
    arguments = ("save-adapter", line.run, "-o", line / "adapter")
    code, _, err = call(*arguments)
    assert code == 2
    assert "--force" in err
    assert open_checkpoint(line / "adapter").digest == before
    assert result(*arguments, "--force")["digest"] == before  # same content, same bytes


def test_too_large_a_loss_leaves_nothing(line, tmp_path):
    code, _, err = call("pack", line / "merged", "-o", tmp_path / "x", "--to", line.scheme,
                        "--base", line.base, "--min-retention", "1")  # fmt: skip
    assert code == 1
    assert "retention" in err
    assert list(tmp_path.iterdir()) == []


# --- Training


def tiny_recipe(directory):
    """A training of seconds, as a file."""
    recipe = directory / "tiny.yaml"
    recipe.write_text(
        "name: tiny\ntask: image-classification\n"
        "base: {from_scratch: {model_type: vit, hidden_size: 64, layers: 1, heads: 2,"
        " intermediate_size: 64, image_size: 16, patch_size: 8}}\n"
        "data: {source: digits, train_limit: 64, eval_limit: 32}\n"
        "training: {max_steps: 2, batch_size: 16}\nprobe: {count: 4}\n"
    )
    return recipe


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_an_interrupted_training_says_what_is_there_and_how_to_go_on(tmp_path, monkeypatch, force):
    """Also with --force: what is replaced then is the run that was there, not the saved state."""
    from qlx.training.trainers import StrictTrainer

    recipe, output = tiny_recipe(tmp_path), tmp_path / "third run"
    step = StrictTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(StrictTrainer, "training_step", interrupted)
    changes = ("--set", "training.max_steps=6", "--set", "training.save_every=4")
    if force:
        with new_checkpoint(output) as staging:
            seal(staging, Manifest(kind="run", task="causal-lm", tag="old"))
    code, _, err = call("train", recipe, "-o", output, *changes, *force)
    (command,) = re.findall("go on with: qlx (.*)", err)
    assert code == 130
    assert f"the state at step 4 is kept in {output}.partial" in err
    assert [word for word in shlex.split(command) if word in ("--resume", "--force")] == [
        *force,
        "--resume",
    ]
    monkeypatch.undo()
    code, _, err = call(*shlex.split(command))
    assert (code, "resuming at step 4" in err) == (0, True)
    assert open_checkpoint(output).manifest.task == "image-classification"
    assert not list(tmp_path.glob("*.partial"))


def test_a_training_interrupted_before_it_saved_leaves_nothing(tmp_path, monkeypatch):
    from qlx.training.trainers import StrictTrainer

    def interrupted(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(StrictTrainer, "training_step", interrupted)
    code, _, err = call("train", tiny_recipe(tmp_path), "-o", tmp_path / "run")
    assert (code, "nothing was saved yet" in err) == (130, True)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_a_recipe_is_trained_resumed_and_checked(tmp_path):
    recipe = tiny_recipe(tmp_path)
    checked = result("train", recipe, "--dry-run")
    assert checked["plan"]["trained_parameters"] > 0
    device = checked["plan"]["setup"]["device"]
    assert checked["plan"] == result("plan", recipe, "--device", device)
    assert not (tmp_path / "run").exists()
    code, out, err = call("train", recipe, "-o", tmp_path / "run")
    assert code == 0
    assert "run of" not in err
    assert "held out" in err
    assert "run" in out
    assert result("verify", tmp_path / "run")["passed"] is True
    assert call("train", recipe, "-o", tmp_path / "other", "--resume")[0] == 2
    code, _, err = call("train", recipe, "--set", "training.batchsize=3", "--dry-run")
    assert code == 3
    assert "batch_size" in err
    code, _, err = call("train", recipe, "--set", "training.batch_size", "--dry-run")
    assert code == 2
    assert "section.field=value" in err


@pytest.mark.parametrize("adapted", [True, False])
def test_the_adapter_is_merged_after_training_where_there_is_one(python_base, tmp_path, adapted):
    recipe = tmp_path / "python.yaml"
    recipe.write_text(
        f"name: python\ntask: causal-lm\nbase: {{path: {python_base}}}\n"
        "data: {source: python-docstrings, train_limit: 32, eval_limit: 8, max_length: 48}\n"
        "training: {max_steps: 2, batch_size: 4}\nprobe: {count: 4}\nmerge_after_train: true\n"
        + ("qlora_r: 4\nqlora_lora_alpha: 6\nkeep_lm_head_fp16: true\n" if adapted else "")
    )
    merged = tmp_path / "run-merged"
    made = result("train", recipe, "-o", tmp_path / "run")
    assert made["kind"] == "run"
    assert merged.exists() == ("merged" in made) == adapted
    if adapted:
        assert not list(tmp_path.glob("*.partial"))
        assert made["merged"]["path"] == str(merged)
        assert result("verify", merged)["passed"] is True
        assert '"head_dtype": "float16"' in (merged / "qlx.json").read_text()
        assert call("train", recipe, "-o", tmp_path / "run", "--force")[0] == 0
        assert call("train", recipe, "-o", tmp_path / "other", "--dry-run")[0] == 0


def test_a_place_for_the_merged_model_is_asked_for_before_training(python_base, tmp_path):
    recipe = tmp_path / "python.yaml"
    recipe.write_text(
        f"name: python\ntask: causal-lm\nbase: {{path: {python_base}}}\nqlora_r: 4\n"
        "data: {source: python-docstrings}\nmerge_after_train: true\n"
    )
    (tmp_path / "run-merged").mkdir()
    (tmp_path / "run-merged" / "notes.txt").write_text("mine")
    code, _, err = call("train", recipe, "-o", tmp_path / "run")
    assert (code, "run-merged" in err) == (2, True)
    assert not list(tmp_path.glob("run*partial")) and not (tmp_path / "run").exists()


def test_a_head_to_keep_needs_a_merge(tmp_path):
    recipe = tiny_recipe(tmp_path)
    recipe.write_text(recipe.read_text() + "keep_lm_head_fp16: true\n")
    code, _, err = call("train", recipe, "--dry-run")
    assert (code, "keep_lm_head_fp16" in err) == (3, True)


def test_one_base_with_two_adapters(digits_base, digits_run, digits_second, tmp_path):
    target = tmp_path / "both"
    made = result("export-onnx", digits_base, "--adapter", digits_run, "--adapter",
                  f"second={digits_second}", "-o", target)  # fmt: skip
    assert sorted(made["adapters"]) == [digits_run.name, "second"]
    for each in made["adapters"].values():
        assert [found["passed"] for found in each["results"]] == [True]
    scores = {
        name: result("eval", target, "--adapter", name)["metrics"] for name in made["adapters"]
    }
    assert len({each["loss"] for each in scores.values()}) == 2
    assert result("verify", target)["passed"]
    assert result("verify", target, "--adapter", "second")["subject"] == "both with second"
    code, out, _ = call("inspect", target)
    assert code == 0
    assert "lora of rank 6, alpha 9, use_rslora, 4 modules" in out
    assert "reference of second" in out


@pytest.mark.parametrize("budget", ["nan", "inf"])
def test_a_budget_that_is_no_number_is_a_usage_error(digits_run, tmp_path, budget):
    options = ("--to", "int4", "--heal", "--max-bytes-per-weight", budget)
    code, _, err = call("pack", digits_run, *options, "-o", tmp_path / "out")
    assert (code, "is no number of bytes" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--adapter", "RUN", "--adapter", "RUN"), "two adapters"),
        (("--adapter", "RUN", "--base", "BASE"), "leave out --base"),
        (("--adapter", "x=nowhere"), "there is no directory nowhere"),
        (("--adapter", "x="), "names no directory after the equals sign"),
    ],
)
def test_adapters_that_make_no_sense_are_usage_errors(
    digits_base, digits_run, tmp_path, arguments, words
):
    named = {"RUN": digits_run, "BASE": digits_base}
    given = [named.get(argument, argument) for argument in arguments]
    code, _, err = call("export-onnx", digits_base, *given, "-o", tmp_path / "out")
    assert code == 2
    assert words in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["verify", "eval"])
def test_an_adapter_that_is_not_there_is_a_usage_error(line, command):
    code, _, err = call(command, line / "onnx", "--adapter", "first")
    assert code == 2
    assert "no swappable adapters" in err


@pytest.mark.parametrize(
    ("nproc", "torchrun", "count"),
    [
        (1, {}, None),
        (2, {}, "2"),
        (1, {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, "2"),
        (1, {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, None),
    ],
)
def test_the_way_on_is_with_as_many_processes(tmp_path, monkeypatch, nproc, torchrun, count):
    """Those of several machines are started by the user's own torchrun."""
    import qlx.training
    from qlx.cli.train import _way_on

    monkeypatch.setattr(qlx.training, "interrupted_at", lambda output: (output, 4))
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    said = re.findall("--nproc (.*)", _way_on(tmp_path, ["train", "r.yaml", "--resume"], nproc))
    assert said == ([] if count is None else [count])
