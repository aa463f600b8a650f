"""A vision transformer in onnxruntime through qlx, against torch doing the same: images/s, first answer, memory.

    python benchmarks/vision.py                    # ViT-base, minutes, 2 GB of disk, 4 GB of memory
    python benchmarks/vision.py --shape vit-tiny   # a small one, to see that it runs
    python benchmarks/vision.py --folder models --part starts     # keep what is made there, measure one half
    python benchmarks/vision.py --trained runs/digits-base --onnx onnx/digits   # a real one beside it

Random weights far from their initial scale, two threads. *images/s*: the median of `--turns` calls of a whole
batch of prepared pixels, all ways in turns in one process, each beginning some turns (with `--threads 1` of the
processor's time, so that other work on the machine matters little); torch in inference mode, `torch.compile` with its
defaults (its compilation is not counted). *first answer*: from starting a process to its answer to a picture, files in
the page cache, the median of `--starts`, in turns; *largest resident*: the most memory that process held (files that
are mapped and read count). The peer loads the same weights with transformers' `from_pretrained`, prepares the picture
with its own image processor and answers with a label, as `Classifier` does. `imports only` is a process that loads
no model. For int8 and int4 the peer stays fp32, which is what torch runs there. Outputs are compared before anything
is timed. Figures go to benchmarks/output/vision.json.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnx_models import VITS, build, make

THREADS = 2
BATCHES = (1, 8)
WAYS = {"fp32": ("fp32", 0), "int8": ("int8", 4), "int4": ("int4", 4), "int4 level 0": ("int4", 0)}

QLX = """
import sys
import numpy as np
from qlx.runtime import Classifier
picture = np.zeros((48, 64, 3), np.uint8)
print(Classifier(sys.argv[1], threads=2).classify([picture])[0].label)
"""
PEER = """
import sys
import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification
torch.set_num_threads(2)
prepare = AutoImageProcessor.from_pretrained(sys.argv[1], use_fast=False)
model = AutoModelForImageClassification.from_pretrained(sys.argv[1]).eval()
picture = Image.fromarray(np.zeros((48, 64, 3), np.uint8))
with torch.inference_mode():
    logits = model(**prepare(images=picture, return_tensors="pt")).logits
print(model.config.id2label[int(logits.argmax())])
"""
EMPTY = {
    "qlx, imports only": "from qlx.runtime import Classifier; print()",
    "torch, imports only": "import torch\nfrom transformers import AutoImageProcessor, "
    "AutoModelForImageClassification as M\nfrom transformers import ViTForImageClassification; print()",
}


def seconds(work: Callable[[], Any], clock: Callable[[], float]) -> float:
    """Time of one call."""
    start = clock()
    work()
    return clock() - start


def in_turns(works: Mapping[str, Callable[[], Any]], turns: int, threads: int) -> dict[str, float]:
    """Median seconds of each; each begins some turns. Of one thread it is the processor's time."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    for work in works.values():
        work()
        work()
    order = list(works)
    times: dict[str, list[float]] = {name: [] for name in order}
    for turn in range(turns):
        at = turn % len(order)
        for name in order[at:] + order[:at]:
            times[name].append(seconds(works[name], clock))
    return {name: statistics.median(each) for name, each in times.items()}


def rates(
    model: Any, directories: Mapping[str, Path], turns: int, threads: int
) -> dict[str, dict[str, float]]:
    """Images/s of every way, by batch."""
    import torch

    from qlx.runtime import OnnxPredictor

    torch.set_num_threads(threads)
    predictors = {name: OnnxPredictor(path, threads) for name, path in directories.items()}
    compiled = torch.compile(model)
    side = model.config.image_size
    found: dict[str, dict[str, float]] = {}
    for rows in BATCHES:
        random = np.random.default_rng(rows)
        pixels = random.standard_normal((rows, 3, side, side)).astype(np.float32)
        inputs = torch.from_numpy(pixels)

        def eager(inputs: Any = inputs, run: Any = model) -> Any:
            with torch.inference_mode():
                return run(pixel_values=inputs).logits

        works: dict[str, Callable[[], Any]] = {
            "torch eager": eager,
            "torch.compile": lambda eager=eager: eager(run=compiled),
        }
        for name, predictor in predictors.items():
            works[f"qlx {name}"] = lambda p=predictor, x=pixels: p.predict({"pixel_values": x})
        check(works)
        times = in_turns(works, turns, threads)
        found[f"{rows} at once"] = {name: rows / each for name, each in times.items()}
    return found


def check(works: Mapping[str, Callable[[], Any]]) -> None:
    """All that compute in fp32 compute the same."""
    wanted = np.asarray(works["torch eager"]())
    for name in ("torch.compile", "qlx fp32"):
        if name in works:
            found = np.asarray(works[name]())
            assert np.linalg.norm(found - wanted) < 1e-4 * np.linalg.norm(wanted), name


def process(code: str, *arguments: Path) -> dict[str, float]:
    """Wall seconds and largest resident MiB of one process, and that it said something."""
    peak = "next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))"
    measured = f"{code}\nprint(int({peak}.split()[1]) / 1024)\n"
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", measured, *map(str, arguments)],
        capture_output=True, text=True, check=True, env=environment(),
    )  # fmt: skip
    return {"s": time.perf_counter() - start, "MiB": float(done.stdout.split()[-1])}


def environment() -> dict[str, str]:
    """Two threads everywhere, nothing from the network."""
    import os

    root = str(Path(__file__).parents[1])
    fixed = {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1", "PYTHONPATH": root}
    return {**os.environ, **fixed}


def starts(plain: Path, directories: Mapping[str, Path], count: int) -> dict[str, dict[str, float]]:
    """Median of each way's processes, one after another in turns."""
    ways: dict[str, tuple[Any, ...]] = {"torch": (PEER, plain)}
    ways |= {f"qlx {name}": (QLX, path) for name, path in directories.items()}
    ways |= {name: (code,) for name, code in EMPTY.items()}
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for turn in range(count + 1):
        for name, (code, *arguments) in ways.items():
            figures = process(code, *arguments)
            if turn:  # the first fills the page cache
                seen[name].append(figures)
    return {
        name: {key: statistics.median(each[key] for each in all_) for key in ("s", "MiB")}
        for name, all_ in seen.items()
    }


def write_plain(model: Any, folder: Path) -> Path:
    """The model as transformers loads it, with its image processor."""
    from qlx.inputs import ImagePreprocessor

    model.save_pretrained(folder)
    side = model.config.image_size
    (folder / "preprocessor_config.json").write_bytes(
        ImagePreprocessor(size=(side, side)).to_bytes()
    )
    return folder


def table(name: str, found: Mapping[str, Any]) -> str:
    """Markdown."""
    lines: list[str] = []
    if "images/s" in found:
        rows = found["images/s"]
        lines += [f"| {name}, images/s | {' | '.join(rows)} |", "|---" * (1 + len(rows)) + "|"]
        for way in next(iter(rows.values())):
            cells = [
                f"{each[way]:.1f} (× {each[way] / each['torch eager']:.2f})"
                for each in rows.values()
            ]
            lines.append(f"| {way} | {' | '.join(cells)} |")
    if "starts" in found:
        lines += ["", f"| {name}, process | first answer | largest resident |", "|---|---|---|"]
        peer = found["starts"]["torch"]
        for way, each in found["starts"].items():
            lines.append(
                f"| {way} | {each['s']:.2f} s (÷ {peer['s'] / each['s']:.1f}) "
                f"| {each['MiB']:.0f} MiB (÷ {peer['MiB'] / each['MiB']:.1f}) |"
            )
    return "\n".join([*lines, ""])


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures of a shape."""
    plain = folder / f"{args.shape}-plain"
    model = build(args.shape) if args.part != "starts" or not plain.exists() else None
    if model is not None:
        write_plain(model, plain)
    directories = {
        name: make(
            folder / f"{args.shape}-{name}".replace(" ", "-"),
            args.shape,
            scheme,
            accuracy_level=level,
        )
        for name, (scheme, level) in WAYS.items()
    }
    sizes = {
        name: sum(f.stat().st_size for f in path.glob("model.onnx*")) / 2**20
        for name, path in directories.items()
    }
    return {**parts(args, model, plain, directories), "MiB on disk": sizes}


def parts(
    args: argparse.Namespace, model: Any, plain: Path, directories: Mapping[str, Path]
) -> dict[str, Any]:
    """What was asked for."""
    found: dict[str, Any] = {}
    if args.part in ("starts", "all"):
        found["starts"] = starts(plain, directories, args.starts)
    if args.part in ("rates", "all"):
        found["images/s"] = rates(model, directories, args.turns, args.threads)
    return found


def measure_trained(args: argparse.Namespace) -> dict[str, Any]:
    """The same of a checkpoint and its export."""
    from qlx.checkpoint import open_checkpoint
    from qlx.models import load_model

    model = load_model(open_checkpoint(args.trained)).eval()
    directories = {"fp32": args.onnx}
    return parts(args, model, args.trained, directories)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=VITS, default="vit-base")
    parser.add_argument("--turns", type=int, default=9, help="calls whose median is taken")
    parser.add_argument("--threads", type=int, default=THREADS, help="for images/s")
    parser.add_argument("--starts", type=int, default=5, help="processes whose median is taken")
    parser.add_argument("--part", choices=("all", "starts", "rates", "none"), default="all")
    parser.add_argument("--folder", type=Path, help="where models are made and kept")
    parser.add_argument("--trained", type=Path, help="a run or merged checkpoint of a classifier")
    parser.add_argument("--onnx", type=Path, help="its fp32 export")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        results[args.shape] = measure(args, args.folder or Path(folder))
        print(table(args.shape, results[args.shape]), flush=True)
    if args.trained is not None and args.onnx is not None:
        results["trained"] = measure_trained(args)
        print(table(str(args.trained), results["trained"]), flush=True)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"this process used {used:.1f} GiB")
    target = Path(__file__).parent / "output" / "vision.json"
    target.parent.mkdir(exist_ok=True)
    before = json.loads(target.read_text()) if target.exists() else {}
    merged = {name: {**before.get(name, {}), **each} for name, each in results.items()}
    target.write_text(json.dumps({**before, **merged}, indent=2) + "\n")


if __name__ == "__main__":
    main()
