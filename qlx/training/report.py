"""The run's report: a loss curve as a picture, and one HTML page that needs nothing else."""

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from qlx.checkpoint import AdapterSpec, Manifest
from qlx.errors import require
from qlx.training.progress import EVALUATED
from qlx.training.trainable import ParameterTable

__all__ = ["CURVE_FILE", "REPORT_FILE", "RunSummary", "Sample", "write_report"]

CURVE_FILE = "loss.png"
REPORT_FILE = "report.html"
HELD_OUT_LOSS = f"{EVALUATED}loss"
_TRAINING, _HELD_OUT = "#1f5fa8", "#c8641e"


@dataclass(frozen=True)
class Sample:
    """One held-out input and the answers to it; `picture` are the bytes of a PNG, `text` a prompt.

    `right` says whether the answers before and after count as right; without it they do if they are the expected
    text. `drawn` is for a picture with the answers in it, which is shown large.
    """

    expected: str
    before: str
    after: str
    text: str = ""
    picture: bytes = b""
    right: tuple[bool, bool] | None = None
    drawn: bool = False


@dataclass(frozen=True)
class RunSummary:
    """What the report shows; `metrics` are the rows of `metrics.jsonl`."""

    manifest: Manifest
    metrics: Sequence[dict[str, float]]
    table: ParameterTable
    before: dict[str, float]
    after: dict[str, float]
    samples: Sequence[Sample]


def write_report(directory: Path, summary: RunSummary) -> None:
    """Write `loss.png` and `report.html` into `directory`; the same summary gives the same bytes."""
    found = summary.manifest.lineage[-1].options.get("held_out", {})
    curve = _curve(summary.metrics, found.get("kept_step"))
    (directory / CURVE_FILE).write_bytes(curve)
    (directory / REPORT_FILE).write_text(_page(summary, curve), "utf-8")


def _curve(metrics: Sequence[dict[str, float]], kept: int | None) -> bytes:
    """Losses and learning rate over steps, as a PNG without a date in it; `kept` is the step of the result."""
    require("matplotlib", "train").use("Agg")
    figure = require("matplotlib.figure", "train").Figure(figsize=(8, 3.6), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    steps, rates = _series(metrics, "lr")
    right.plot(steps, rates, color="#bbbbbb", linewidth=1.0, linestyle="--")
    right.set_ylabel("learning rate", color="#888888")
    left.set_zorder(right.get_zorder() + 1)  # the losses lie over the learning rate
    left.patch.set_visible(False)
    left.plot(*_series(metrics, "loss"), color=_TRAINING, linewidth=1.6, label="training")
    steps, losses = _series(metrics, HELD_OUT_LOSS)
    if steps:
        left.plot(steps, losses, "o-", color=_HELD_OUT, linewidth=1.6, ms=3, label="held out")
        if kept in steps:
            place = kept, losses[steps.index(kept)]
            left.plot(*place, "o", ms=10, mfc="none", color=_HELD_OUT, label="kept")
        left.legend(frameon=False)
    left.set_xlabel("step")
    left.set_ylabel("loss")
    left.grid(alpha=0.25)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _series(metrics: Sequence[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    """The steps at which something was logged, and its values there."""
    rows = [row for row in metrics if name in row]
    return [row["step"] for row in rows], [row[name] for row in rows]


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}
td,th{padding:.25rem .8rem;border-bottom:1px solid #ddd;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}img.curve{max-width:100%}
img.sample{width:72px;height:72px;image-rendering:pixelated}code{background:#f4f4f4;padding:0 .2rem}
td{overflow-wrap:anywhere}.text{white-space:pre-wrap}
.bad{color:#a33}.good{color:#27713a}img.drawn{width:420px;max-width:60vw}
"""
_LEGEND = (
    "Green circle: where it is. Orange cross: found with the adapter off. Pink cross: found after training, and "
    "pink where the model then sees something."
)


def _page(summary: RunSummary, curve: bytes) -> str:
    manifest = summary.manifest
    sections = [
        f"<h1>{escape(manifest.tag)}</h1>",
        _facts(manifest),
        "<h2>Held-out examples</h2>",
        _scores(summary.before, summary.after),
        "<h2>Loss</h2>",
        f'<img class="curve" alt="loss over steps" src="{_png(curve)}">',
        "<h2>Trained parameters</h2>",
        _parameters(summary.table),
    ]
    if summary.samples:
        sections += ["<h2>Samples</h2>", _samples(summary.samples)]
    body = "\n".join(sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(manifest.tag)}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _png(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table; cells are HTML already."""
    header = "".join(f"<th>{escape(title)}</th>" for title in head)
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return f"<table><tr>{header}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _facts(manifest: Manifest) -> str:
    quantization, adapter = manifest.quantization, manifest.adapter
    rows: list[tuple[str, Any]] = [("task", manifest.task)]
    if manifest.base is not None:
        rows += [("base", manifest.base.name), ("base fingerprint", manifest.base.fingerprint)]
    if quantization.quantized:
        double = ", double quantization" if quantization.double_quant else ""
        rows.append(
            ("quantization", f"{quantization.scheme}{double}, {len(quantization.modules)} layers")
        )
    if adapter is not None and adapter.type != "full":
        rows.append(
            (
                "adapter",
                f"{_kind(adapter)}, on {', '.join(adapter.targets)}",
            )
        )
    step = manifest.lineage[-1]
    rows.append(("steps", step.options["steps"]))
    if "held_out" in step.options:
        found = step.options["held_out"]
        rows += [("weights of step", found["kept_step"]), ("ended", found["ended"])]
    rows += [("seed", step.seed), ("recipe", step.recipe_digest)]
    return _table(
        ("", ""), ((escape(name), f"<code>{escape(str(value))}</code>") for name, value in rows)
    )


def _kind(adapter: AdapterSpec) -> str:
    alpha = "" if adapter.alpha is None else f", alpha {adapter.alpha:g}"
    started = "" if adapter.initialized is None else f", begun as {adapter.initialized}"
    return f"{adapter.type} of rank {adapter.rank}{alpha}{started}"


def _scores(before: dict[str, float], after: dict[str, float]) -> str:
    rows = ((escape(name), f"{before[name]:.4f}", f"{after[name]:.4f}") for name in after)
    return _table(("", "before", "after"), rows)


def _parameters(table: ParameterTable) -> str:
    rows = [(escape(row.group), f"{row.tensors}", f"{row.parameters:,}") for row in table.rows]
    rows.append((f"trained of all {table.total:,}", "", f"{table.trained:,} ({table.share:.2%})"))
    return _table(("group", "tensors", "parameters"), rows)


def _samples(samples: Sequence[Sample]) -> str:
    legend = f"<p>{_LEGEND}</p>" if any(sample.drawn for sample in samples) else ""
    rows = (_sample(sample) for sample in samples)
    return legend + _table(("input", "expected", "before", "after"), rows)


def _sample(sample: Sample) -> tuple[str, str, str, str]:
    shown = (
        f'<img class="{"drawn" if sample.drawn else "sample"}" alt="" src="{_png(sample.picture)}">'
        if sample.picture
        else f'<span class="text">{escape(sample.text)}</span>'
    )
    answers = sample.before, sample.after
    right = sample.right or tuple(answer == sample.expected for answer in answers)
    wrong = "bad" if sample.picture else "text"  # an answer in other words need not be wrong
    before, after = (
        f'<span class="{"good" if good else wrong}">{escape(answer)}</span>'
        for good, answer in zip(right, answers, strict=True)
    )
    return shown, f'<span class="text">{escape(sample.expected)}</span>', before, after
