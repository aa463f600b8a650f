"""The report stands alone, shows what it should, and is the same every time."""

import base64
import re

import pytest

from qlx.checkpoint import open_checkpoint
from qlx.recipe import load_recipe
from qlx.training.job import quant_spec
from qlx.training.progress import _clock, read_metrics
from qlx.training.report import RunSummary, Sample, write_report
from qlx.training.tags import tag_of
from qlx.training.trainable import ParameterRow, ParameterTable
from tests.conftest import DIGITS_RUN, PYTHON_RUN, recipe_of


@pytest.mark.parametrize("name", ["digits_run", "python_run"])
def test_report_of_a_run(name, request):
    path = request.getfixturevalue(name)
    page = (path / "report.html").read_text("utf-8")
    manifest = open_checkpoint(path).manifest
    assert manifest.tag in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page), "nothing is loaded from elsewhere"
    images = [
        base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)", page)
    ]
    assert images[0] == (path / "loss.png").read_bytes()
    assert all(image.startswith(b"\x89PNG") for image in images)
    for value in manifest.lineage[-1].options["after"].values():
        assert f"{value:.4f}" in page
    assert "lora q_proj" in page
    assert page.count("<tr>") > 15
    assert "Document this" in page or len(images) > 4


@pytest.mark.parametrize("name", ["digits_run", "python_base"])
def test_metrics_of_a_run(name, request):
    path = request.getfixturevalue(name)
    rows = read_metrics(path / "metrics.jsonl")
    names = ("step", "epoch", "loss", "lr", "grad_norm", "seconds", "memory_resident")
    assert {frozenset(row) for row in rows} == {frozenset(names)}
    assert all(10**8 < row["memory_resident"] < 10**11 for row in rows)  # bytes
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert len(read_metrics(path / "metrics.jsonl", up_to=rows[0]["step"])) == 1


def test_recipe_of_a_run_reads_back(digits_run):
    recipe = load_recipe(digits_run / "recipe.yaml")
    assert recipe.digest == open_checkpoint(digits_run).manifest.lineage[-1].recipe_digest


def test_same_summary_same_bytes(digits_run, tmp_path):
    manifest = open_checkpoint(digits_run).manifest
    table = ParameterTable((ParameterRow("lora q", 2, 10),), 10, 100)
    rows = [
        {"step": step, "loss": 1 / step, "lr": 0.1, "epoch": 0.0, "seconds": 0.0}
        for step in (1, 2, 3)
    ]
    sample = Sample(expected="<b>", before="x & y", after="<b>", text="<script>alert(1)</script>")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_report(
            tmp_path / name,
            RunSummary(manifest, rows, table, {"loss": 2.0}, {"loss": 1.0}, [sample]),
        )
    for file in ("report.html", "loss.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    page = (tmp_path / "a" / "report.html").read_text()
    assert "<script>" not in page
    assert '<span class="text">x &amp; y</span>' in page  # other words need not be wrong
    assert '<span class="good">&lt;b&gt;</span>' in page


def test_cut_last_line_of_metrics_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1]
    assert read_metrics(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("content", "base", "tag"),
    [
        (DIGITS_RUN, "runs/digits-base", "digits-base-shifted_SFT_LoRa4_QLORA_w4-nf4-dq_headfp32"),
        (
            PYTHON_RUN,
            "Qwen/Qwen3-0.6B",
            "Qwen3-0.6B-python-docstrings_SFT_LoRa4_QLORA_w4-nf4-dq_headfp32",
        ),
        (
            {**PYTHON_RUN, "quantization": None},
            "/a/b/base/",
            "base-python-docstrings_SFT_LoRa4_headfp32",
        ),
        (
            {**PYTHON_RUN, "data": {"source": "text", "path": "/data/open math.jsonl"}},
            "Qwen/Qwen3-0.6B",
            "Qwen3-0.6B-open-math_SFT_LoRa4_QLORA_w4-nf4-dq_headfp32",
        ),
    ],
)
def test_tags_are_readable(content, base, tag):
    recipe = recipe_of(content)
    assert tag_of(recipe, base, quant_spec(recipe.quantization, "float32")) == tag


def test_time_left_is_readable():
    assert [_clock(seconds) for seconds in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]
