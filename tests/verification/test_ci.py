"""The workflow and the pytest file of examples/ci, run as they are on a good merge and on bad ones."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from qlx.checkpoint import read_manifest, seal
from qlx.merging import merge
from qlx.training import save_adapter
from qlx.weights import read_tensors, write_tensors

ROOT = Path(__file__).parents[2]
WORKFLOW = ROOT / "examples" / "ci" / "verify-models.yml"
SUITE = ROOT / "examples" / "ci" / "test_models.py"


@pytest.fixture(scope="module")
def models(tmp_path_factory, digits_base, digits_run):
    """models/base, models/adapter, models/merged as the workflow expects them."""
    root = tmp_path_factory.mktemp("repository") / "models"
    root.mkdir()
    shutil.copytree(digits_base, root / "base")
    save_adapter(digits_run, root / "adapter", base=str(root / "base"))
    merge(root / "base", [root / "adapter"], root / "merged")
    return root


def _spoil(models, target, file, change):
    path = shutil.copytree(models, target / "models")
    directory = path / ("merged" if file == "model.safetensors" else "adapter")
    tensors = read_tensors(directory / file)
    change(tensors)
    write_tensors(directory / file, tensors)
    seal(directory, read_manifest(directory)[0])
    return path


def _one_sign(tensors):
    name = next(name for name in sorted(tensors) if name.endswith("query.weight"))
    tensors[name] *= -1


def _one_byte(models, target):
    path = shutil.copytree(models, target / "models")
    file = path / "merged" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    return path


BAD = {
    "merged weight": lambda m, t: _spoil(m, t, "model.safetensors", _one_sign),
    "adapter weight": lambda m, t: _spoil(
        m, t, "adapter_model.safetensors", lambda w: next(iter(w.values())).mul_(2)
    ),
    "one byte": _one_byte,
}


SOME = [
    what if what == "merged weight" else pytest.param(what, marks=pytest.mark.exhaustive)
    for what in BAD
]


def environment(folder):
    """A clean environment with qlx on the path, as after the workflow's install step."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    kept = {name: os.environ[name] for name in ("HOME", "OMP_NUM_THREADS") if name in os.environ}
    return {
        **kept, "PATH": path, "HF_HUB_OFFLINE": "1", "GITHUB_STEP_SUMMARY": str(folder / "summary.md")
    }  # fmt: skip


def steps():
    """The workflow's environment and its commands after the installation."""
    workflow = yaml.safe_load(WORKFLOW.read_text())
    (job,) = workflow["jobs"].values()
    found = [step for step in job["steps"] if "run" in step and step.get("name") != "Install"]
    return workflow["env"], found


def run_workflow(folder):
    """Names of the steps that fail; like the runner, a failure skips what is not `always()`."""
    variables, found = steps()
    failed = []
    for step in found:
        if failed and step.get("if") != "always()":
            continue
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
            cwd=folder, env={**environment(folder), **variables}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        if done.returncode:
            failed.append((step["name"], done.returncode, done.stdout + done.stderr))
    return failed


def test_the_workflow_is_one_that_github_reads():
    workflow = yaml.safe_load(WORKFLOW.read_text())
    assert "pull_request" in workflow[True]  # YAML reads `on` as true
    assert workflow["permissions"] == {"contents": "read"}
    commands = [step["run"] for step in steps()[1]]
    assert sum("qlx verify" in command for command in commands) == 3
    (job,) = workflow["jobs"].values()
    assert all(("run" in step) != ("uses" in step) for step in job["steps"])


def test_a_good_merge_passes_the_workflow(models):
    assert run_workflow(models.parent) == []
    reports = models.parent / "qlx-reports"
    assert (reports / "drift.png").read_bytes().startswith(b"\x89PNG")
    summary = (models.parent / "summary.md").read_text()
    assert summary.count("### qlx verify: passed") == 3
    suites = [ElementTree.parse(file).getroot() for file in reports.glob("*.xml")]
    assert len(suites) == 3
    assert all(suite.get("failures") == "0" for suite in suites)


@pytest.mark.parametrize("what", SOME)
def test_a_bad_one_fails_the_workflow(models, tmp_path, what):
    BAD[what](models, tmp_path)
    failed = run_workflow(tmp_path)
    names = [name for name, *_ in failed]
    assert "Merged and unmerged agree, layer by layer" in names
    assert {code for _, code, _ in failed} <= {1, 3}, failed
    if what == "merged weight":
        assert "The merged model is whole and computes the same" in names
        assert "FAILED" in (tmp_path / "summary.md").read_text()


# --- pytest


def run_pytest(folder, *options):
    """The example suite in a process of its own, in a folder that holds models/."""
    shutil.copyfile(SUITE, folder / "test_models.py")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    (plugin,) = declared["pytest11"].values()
    command = [sys.executable, "-m", "pytest", "-q", "-p", plugin, "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, "--rootdir", str(folder), *options, "test_models.py"],
        cwd=folder, env=environment(folder), capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_good_merge_passes_the_suite(models):
    done = run_pytest(models.parent, "--junit-xml=out.xml")
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout
    tree = ElementTree.parse(models.parent / "out.xml")
    found = {item.get("name"): item.get("value") for item in tree.iter("property")}
    assert found["qlx.digest"].startswith("sha256:")
    assert float(found["qlx.against.relative"]) < 1e-5


@pytest.mark.parametrize("what", SOME)
def test_a_bad_one_fails_the_suite(models, tmp_path, what):
    BAD[what](models, tmp_path)
    done = run_pytest(tmp_path)
    assert done.returncode == 1, done.stdout
    assert "FAILED test_models.py::test_merged_and_unmerged_agree" in done.stdout
    if what == "merged weight":
        assert "qlx verify: FAILED" in done.stdout
        assert "2 failed, 1 passed" in done.stdout
        assert "moved most by itself: vit.layers.0" in done.stdout


def test_the_plugin_loads_pytest_and_nothing_heavy():
    code = "import sys, qlx.pytest_plugin; print(*{n.split('.')[0] for n in sys.modules})"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "pytest" in loaded
    assert not {"numpy", "torch", "pydantic", "onnxruntime"} & set(loaded)
