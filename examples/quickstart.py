"""Two small models from nothing to a served, verified ONNX model, through the commands of qlx.

Run it with `make quickstart`, or with the Python that qlx is installed in:

    python examples/quickstart.py [--output DIR]

It needs no network. Two workloads run side by side:

    vision     a small ViT learns scikit-learn's digits; QLoRA (NF4) then adapts it to digits that are
               turned, recoloured and noisy, at which it is bad
    language   a small Llama learns Python's own sources; QLoRA then teaches it to write docstrings

Each goes through the four chapters of `Workload` below, which can be read as a tutorial: `train`, `convert`,
`check`, `serve`. Every command is printed as it runs. At the end stands one table for each workload, and
report.html in the output shows it with the loss curves. The exit code is 0 only if every model that was made
on the way is verified to be the one that was trained.
"""

import argparse
import base64
import concurrent.futures
import html
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
QLX = Path(sys.executable).with_name("qlx")
TALK = threading.Lock()


@dataclass
class Row:
    """One model of the final table."""

    model: str
    directory: Path
    score: str
    distance: str
    verified: bool

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as text; sizes are megabytes on disk, the probe apart from the rest."""
        sizes = {file.name: file.stat().st_size / 1e6 for file in self.directory.iterdir()}
        probe = sizes.pop("probe.safetensors")
        size = f"{sum(sizes.values()):.2f} + {probe:.2f} MB"
        return self.model, size, self.score, self.distance, "yes" if self.verified else "NO"


HEADER = ("model", "on disk + probe", "held out", "distance from unmerged", "verified")


@dataclass
class Workload:
    """Two recipes, how their score is read, what the served model is asked, and a folder to fill."""

    name: str
    base_recipe: str
    qlora_recipe: str
    metric: str
    question: Callable[[Path], tuple[str, dict[str, Any]]]
    answer: Callable[[dict[str, Any]], str]
    folder: Path
    rows: list[Row] = field(default_factory=list)
    answered: str = ""

    # --- The four chapters

    def train(self) -> None:
        """Train a base, then an adapter on that base quantized to NF4, and try the adapter."""
        base, run = self.at(self.base_name), self.at(self.run_name)
        self.qlx("train", self.base_recipe, "-o", base)
        self.qlx("train", self.qlora_recipe, "-o", run, "--set", f"base.path={base}")
        self.qlx("save-adapter", run, "-o", self.at("adapter"), "--base", base)
        self.qlx("load-adapter", "--base", base, "--adapter", self.at("adapter"))

    def convert(self) -> None:
        """Merge the adapter in full precision, pack the result to NF4, and export both to ONNX."""
        base, merged, packed = self.at(self.base_name), self.at("merged"), self.at("packed")
        self.qlx("merge", "--base", base, "--adapter", self.at("adapter"), "-o", merged)
        with concurrent.futures.ThreadPoolExecutor(1) as beside:  # both start from the merged model
            exported = beside.submit(self.qlx, "export-onnx", merged, "-o", self.at("onnx"))
            self.qlx("pack", merged, "-o", packed, "--to", "nf4", "--base", base)
            self.qlx("export-onnx", packed, "-o", self.at("onnx-nf4"))
            exported.result()

    def check(self) -> None:
        """Score every model on held-out data, and verify each against what training saw."""
        base = ("--base", self.at(self.base_name))
        before = ("--data", self.qlora_recipe)  # the base is asked what the adapter is trained for
        asked = [
            ("base, before", self.base_name, before, ()),
            ("adapter on NF4 base", "adapter", base, base),
            ("merged, fp32", "merged", (), ()),
            ("packed, NF4", "packed", (), ()),
            ("ONNX of merged", "onnx", (), ()),
            ("ONNX of packed", "onnx-nf4", (), ()),
        ]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:  # none of these waits for another
            self.rows = list(pool.map(lambda row: self.measure(*row), asked))

    def serve(self) -> None:
        """Serve the ONNX model on a free port, ask it once over HTTP, and stop it."""
        command = ["serve", self.at("onnx"), "--port", "0"]
        self.say(f"$ qlx {shlex.join(command)} &")
        with subprocess.Popen([QLX, *command], stderr=subprocess.PIPE, text=True) as server:
            try:
                address = self.address_of(server)
                path, body = self.question(ROOT / self.qlora_recipe)
                self.say(f"$ curl {address}{path} -H 'Content-Type: application/json' -d '…'")
                data = json.dumps(body).encode()
                header = {"Content-Type": "application/json"}
                request = urllib.request.Request(address + path, data, header)
                with urllib.request.urlopen(request, timeout=60) as response:
                    self.answered = self.answer(json.load(response))
                self.say(f"  {self.answered}")
            finally:
                server.send_signal(signal.SIGINT)

    # --- What the chapters use

    @property
    def base_name(self) -> str:
        """The folder of the base, named like its recipe."""
        return Path(self.base_recipe).stem

    @property
    def run_name(self) -> str:
        """The folder of the QLoRA run, named like its recipe."""
        return Path(self.qlora_recipe).stem

    def at(self, name: str) -> str:
        """A directory of this workload, as it is written on the command line."""
        return str(self.folder / name)

    def say(self, text: str) -> None:
        """Print lines under the workload's name."""
        with TALK:
            for line in text.rstrip().splitlines():
                print(f"{self.name:>8} │ {line}", flush=True)

    def qlx(self, *arguments: str, show: bool = True) -> str:
        """Run one command, showing it, its progress and its result; any failure ends the workload."""
        self.say(f"$ qlx {shlex.join(arguments)}")
        started = time.monotonic()
        with subprocess.Popen(
            [QLX, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        ) as process:
            relay = threading.Thread(target=self.relay, args=(process.stderr,))
            relay.start()
            output = process.stdout.read() if process.stdout else ""
            relay.join()
        if show:
            self.say("\n".join(f"  {line}" for line in output.splitlines()))
        self.say(f"  {time.monotonic() - started:.0f} s")
        # `verify` ends with 1 where a check failed; its report goes into the table as a NO.
        if process.returncode and not (arguments[0] == "verify" and process.returncode == 1):
            raise RuntimeError(f"{self.name}: qlx {arguments[0]} ended with {process.returncode}")
        return output

    def relay(self, progress: IO[str] | None) -> None:
        """Show a command's progress as it comes."""
        for line in progress or ():
            self.say(f"  {line}")

    def measure(
        self, model: str, name: str, score_with: tuple[str, ...], verify_with: tuple[str, ...]
    ) -> Row:
        """A row of the table: the score from `qlx eval`, the distance from `qlx verify`."""
        scored = json.loads(self.qlx("eval", self.at(name), *score_with, "--json", show=False))
        report = json.loads(self.qlx("verify", self.at(name), *verify_with, "--json", show=False))
        score = f"{self.metric} {scored['metrics'][self.metric]:.4f}"
        found = report["comparisons"].get("reference", {})
        distance = f"{found['relative']:.1e}, top-1 {found['top1']:.1%}" if found else "none"
        if name == self.base_name:
            distance = "(before the adapter)"
        row = Row(model, self.folder / name, score, distance, bool(report["passed"]))
        self.say(f"  {' · '.join(row.cells)}")
        return row

    def address_of(self, server: "subprocess.Popen[str]") -> str:
        """The address that a server prints once it listens."""
        for line in server.stderr or ():
            self.say(f"  {line}")
            if found := re.search(r"http://[\w.:\[\]]+", line):
                return found[0]
        raise RuntimeError(f"{self.name}: the server ended with {server.wait()}")

    def run(self) -> "Workload":
        """All four chapters."""
        self.train()
        self.convert()
        self.check()
        self.serve()
        return self


# --- What the served models are asked


def ask_about_a_digit(recipe: Path) -> tuple[str, dict[str, Any]]:
    """The first held-out image as a PNG in base64."""
    from PIL import Image

    from qlx.inputs import load_split
    from qlx.recipe import load_recipe

    picture = io.BytesIO()
    split = load_split(load_recipe(recipe).data, "eval")
    Image.fromarray(split.images[0]).save(picture, "PNG")  # type: ignore[union-attr]
    return "/v1/classify", {"image": base64.b64encode(picture.getvalue()).decode()}


def ask_for_a_docstring(recipe: Path) -> tuple[str, dict[str, Any]]:
    """A message of the kind that the adapter was trained to answer."""
    message = {"role": "user", "content": "Document this: def close(self)"}
    return "/v1/chat/completions", {"messages": [message], "max_tokens": 40}


def read_label(reply: dict[str, Any]) -> str:
    """What the classifier answered."""
    return f"it is a {reply['label']} ({reply['probability']:.1%})"


def read_message(reply: dict[str, Any]) -> str:
    """What the language model answered."""
    return f"def close(self): {reply['choices'][0]['message']['content'].strip()!r}"


# --- The end


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    lines = [HEADER, *(row.cells for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def report(workloads: list[Workload], seconds: float) -> str:
    """One HTML page that needs no other file: tables, answers, loss curves."""
    style = (
        "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.3rem .8rem;text-align:left;"
        "border-bottom:1px solid #ccc}img{max-width:100%}"
    )
    parts = [
        f"<!doctype html><meta charset=utf-8><title>qlx quickstart</title><style>{style}</style>"
    ]
    parts.append(f"<h1>qlx quickstart</h1><p>Two workloads in {seconds:.0f} seconds.</p>")
    for workload in workloads:
        parts.append(f"<h2>{workload.name}</h2><table><tr>")
        parts += [f"<th>{html.escape(cell)}</th>" for cell in HEADER]
        for row in workload.rows:
            parts.append("</tr><tr>")
            parts += [f"<td>{html.escape(cell)}</td>" for cell in row.cells]
        parts.append(f"</tr></table><p>Asked over HTTP: {html.escape(workload.answered)}</p>")
        for name, caption in ((workload.base_name, "pretraining"), (workload.run_name, "QLoRA")):
            picture = base64.b64encode((workload.folder / name / "loss.png").read_bytes()).decode()
            source = f"data:image/png;base64,{picture}"
            parts.append(f"<h3>Loss of the {caption}</h3><img alt='loss curve' src='{source}'>")
    return "\n".join(parts)


def workloads_in(folder: Path) -> list[Workload]:
    """The two workloads, each with its own part of the output folder."""
    return [
        Workload(
            name="vision",
            base_recipe="recipes/digits-base.yaml",
            qlora_recipe="recipes/digits-qlora.yaml",
            metric="accuracy",
            question=ask_about_a_digit,
            answer=read_label,
            folder=folder / "vision",
        ),
        Workload(
            name="language",
            base_recipe="recipes/python-base.yaml",
            qlora_recipe="recipes/python-qlora.yaml",
            metric="loss",
            question=ask_for_a_docstring,
            answer=read_message,
            folder=folder / "language",
        ),
    ]


def main() -> int:
    """Run both workloads; 0 if every model is verified."""
    parser = argparse.ArgumentParser(description="Both workloads through every command of qlx.")
    parser.add_argument("--output", type=Path, default=Path("quickstart-output"))
    output = parser.parse_args().output.resolve()
    if output.is_relative_to(ROOT):
        output = output.relative_to(ROOT)
    os.chdir(ROOT)
    # Two workloads share the cores; threads that wait must not spin.
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 2) // 2))
    os.environ.update(OMP_WAIT_POLICY="PASSIVE", HF_HUB_OFFLINE="1")
    for part in ("vision", "language"):
        shutil.rmtree(output / part, ignore_errors=True)
    started = time.monotonic()
    workloads = workloads_in(output)
    with concurrent.futures.ThreadPoolExecutor(len(workloads)) as pool:
        runs = [pool.submit(workload.run) for workload in workloads]
        problems = [str(error) for run in runs if (error := run.exception())]
    for workload in workloads:
        print(f"\n{workload.name}\n{table(workload.rows)}\n{workload.answered}")
    for problem in problems:
        print(f"failed: {problem}", file=sys.stderr)
    if problems:
        return 1
    seconds = time.monotonic() - started
    (output / "report.html").write_text(report(workloads, seconds), encoding="utf-8")
    print(f"\n{seconds:.0f} seconds; {output / 'report.html'} has the tables and the loss curves")
    return 0 if all(row.verified for workload in workloads for row in workload.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
