"""What `base.offload: disk` saves: the memory of whole trainings whose base stays in its files, beside those in memory.

    python benchmarks/offload.py            # four trainings of two steps, a few minutes, 1 GB of disk

A Llama of 12 layers of width 1024 with random weights in bf16 files, trained in fp32 with gradient checkpointing, two
rows of 64 tokens. What counts is anonymous memory, as pages of mapped files can be dropped at any time: the most that a
process of its own held during `qlx.training.train` (scoring before and after, writing and reading back too), above what
the imports hold, looked at every 2 ms. The table goes to standard output, everything to benchmarks/output/offload.json.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.generated import Size, make_model

ROOT = Path(__file__).resolve().parents[1]
ROWS = {"LoRA, fp32": None, "QLoRA, NF4": {"quant_type": "nf4", "double_quant": True}}
PLACES = ("none", "disk")

MEASURE = """
import json, sys, threading
from pathlib import Path

def now():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

import torch, transformers, peft, trl, datasets, bitsandbytes, matplotlib.pyplot
from qlx.recipe import Recipe
from qlx.training import train
held, peak, done = now(), [0], threading.Event()

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], now())

threading.Thread(target=watch, daemon=True).start()
train(Recipe.model_validate(json.loads(sys.argv[1])), Path(sys.argv[2]))
done.set()
print(peak[0] - held)
"""


def made_base(target: Path) -> Path:
    """The base, with a tokenizer trained on docstrings of the standard library."""
    from qlx.inputs import train_tokenizer
    from qlx.inputs.python_text import python_docstrings

    size = Size(layers=12, hidden=1024, intermediate=2816, heads=16, kv_heads=4, vocabulary=512)
    base = make_model(target, size)
    texts = [answer for _, answer in python_docstrings()]
    for name, content in train_tokenizer(texts, 512).items():
        (base / name).write_bytes(content)
    return base


def memory_recipe(base: Path, quantization: dict[str, Any] | None, offload: str) -> dict[str, Any]:
    """Two steps of LoRA on the built-in sources of Python."""
    limits = {"train_limit": 8, "eval_limit": 4, "max_length": 64}
    return {
        "name": "offload",
        "task": "causal-lm",
        "base": {"path": str(base), "offload": offload},
        "data": {"source": "python-text", **limits},
        "adapter": {"rank": 4, "alpha": 6},
        "quantization": quantization,
        "training": {"max_steps": 2, "batch_size": 2, "gradient_checkpointing": True},
        "probe": {"count": 2, "max_length": 16},
    }


def anonymous_bytes(recipe: dict[str, Any], output: Path) -> int:
    """The peak of one training, in a process of its own."""
    command = [sys.executable, "-c", MEASURE, json.dumps(recipe), str(output)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}  # what is freed does not count
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return int(done.stdout.splitlines()[-1])


def main() -> None:
    """Make the base, train four times, print."""
    found: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as room:
        base = made_base(Path(room) / "base")
        for name, quantization in ROWS.items():
            for place in PLACES:
                recipe = memory_recipe(base, quantization, place)
                peak = anonymous_bytes(recipe, Path(room) / f"{len(found)}-{place}")
                found.setdefault(name, {})[place] = peak
                print(f"{name}, {place}: {peak / 1e6:.0f} MB", file=sys.stderr)
        files = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    print(f"{files / 1e6:.0f} MB of files\n")
    print("| | in memory | `offload: disk` |\n|---|---|---|")
    for name, peaks in found.items():
        print(
            f"| {name} | " + " | ".join(f"{peaks[place] / 1e6:.0f} MB" for place in PLACES) + " |"
        )
    output = ROOT / "benchmarks" / "output"
    output.mkdir(exist_ok=True)
    (output / "offload.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
