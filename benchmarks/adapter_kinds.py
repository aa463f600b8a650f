"""How far each kind of adapter gets in the same number of steps on a hard-quantized base: held-out loss.

    OMP_NUM_THREADS=1 python benchmarks/adapter_kinds.py      # a quarter of an hour on one core

A small language model is pretrained on Python sources and then taught the first lines of docstrings, a
small vision transformer plain digits and then turned and coloured ones, on ternary and int4 bases. Every
kind takes the same examples in the same order and the same number of steps. Its learning rate is the best
of four, chosen on another division of the data (data seed 100) than the one of the table.

The table goes to standard output; every training's scores are kept below --work, so that a second call
goes on where the first one ended.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from qlx.recipe import Recipe
from qlx.training import train

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SEEDS = (1, 2, 3)
SEARCH_SEED = 100
RANK = {"rank": 16, "alpha": 32}
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": RANK,
    "rsLoRA": {**RANK, "use_rslora": True},
    "DoRA": {**RANK, "use_dora": True},
    "PiSSA": {**RANK, "init_lora_weights": "pissa"},
    "LoftQ": {**RANK, "init_lora_weights": "loftq"},
    "VeRA": {"type": "vera", "rank": 256},
}
SCHEMES: dict[str, dict[str, Any]] = {
    "ternary": {"quant_type": "ternary", "group_size": 64},
    "int4": {"quant_type": "int4", "group_size": 64},
}
VIT = {"model_type": "vit", "hidden_size": 64, "layers": 2, "heads": 2, "intermediate_size": 128}
LLAMA = {
    "model_type": "llama", "hidden_size": 128, "layers": 2, "heads": 4, "kv_heads": 2,
    "intermediate_size": 256, "vocab_size": 512, "max_length": 128,
}  # fmt: skip
BASES: dict[str, dict[str, Any]] = {
    "digits": {
        "task": "image-classification",
        "base": {"from_scratch": VIT},
        "data": {"source": "digits", "eval_fraction": 0.2},
        "training": {"max_steps": 400, "batch_size": 32, "learning_rate": 2e-3},
    },
    "python": {
        "task": "causal-lm",
        "base": {"from_scratch": LLAMA},
        "data": {"source": "python-text", "train_limit": 8000, "eval_limit": 64, "max_length": 64},
        "training": {"max_steps": 400, "batch_size": 16, "learning_rate": 4e-3},
    },
}
TASKS: dict[str, dict[str, Any]] = {
    "digits": {"source": "digits", "variant": "shifted", "eval_fraction": 0.2},
    "python": {
        "source": "python-docstrings", "train_limit": 2000, "eval_limit": 200, "max_length": 64,
    },
}  # fmt: skip
STEPS = {"max_steps": 100, "batch_size": 16, "warmup_ratio": 0.1}


def main() -> None:
    """Train what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/adapter-kinds"))
    parser.add_argument("--only", nargs="*", default=[f"{t}/{s}" for t in TASKS for s in SCHEMES])
    arguments = parser.parse_args()
    for cell in arguments.only:
        task, scheme = cell.split("/")
        base = _base(arguments.work, task)
        print(f"\n{task}, {scheme} base: held-out loss after {STEPS['max_steps']} steps\n")
        print("| adapter | learning rate | before | after (three seeds) |\n|---|---|---|---|")
        for kind in KINDS:
            print(_row(arguments.work, base, task, scheme, kind), flush=True)


def _base(work: Path, task: str) -> Path:
    path = work / f"{task}-base"
    if not path.exists():
        train(Recipe.model_validate({"name": path.name, **BASES[task]}), path)
    return path


def _row(work: Path, base: Path, task: str, scheme: str, kind: str) -> str:
    found = {rate: _scores(work, base, task, scheme, kind, rate, 0) for rate in RATES}
    rate = min(found, key=lambda rate: found[rate][1])
    scores = [_scores(work, base, task, scheme, kind, rate, seed) for seed in SEEDS]
    after = [score[1] for score in scores]
    return (
        f"| {kind} | {rate:g} | {scores[0][0]:.3f} | {statistics.mean(after):.3f} ± "
        f"{statistics.stdev(after):.3f} |"
    )


def _scores(
    work: Path, base: Path, task: str, scheme: str, kind: str, rate: float, seed: int
) -> tuple[float, float]:
    """Held-out loss before and after; seed 0 is the search, on another division of the data."""
    path = work / f"{task}-{scheme}-{kind}-{rate:g}-{seed}"
    if not path.exists():
        content = {
            "name": path.name,
            "task": BASES[task]["task"],
            "base": {"path": str(base)},
            "data": {**TASKS[task], "seed": 0 if seed else SEARCH_SEED},
            "adapter": KINDS[kind],
            "quantization": SCHEMES[scheme],
            "training": {**STEPS, "learning_rate": rate, "seed": seed},
        }
        train(Recipe.model_validate(content), path)
    options = json.loads((path / "qlx.json").read_text())["lineage"][-1]["options"]
    return options["before"]["loss"], options["after"]["loss"]


if __name__ == "__main__":
    main()
