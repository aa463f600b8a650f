"""What quantization costs a fine-tuned model: three tasks, six ways to train, three seeds.

    OMP_NUM_THREADS=1 python benchmarks/quality.py      # half an hour on one core
    python benchmarks/quality.py --picture docs/images/quality.png

A base is pretrained for each task and then taught something it has not seen: turned and coloured digits,
a tennis ball by night, the first line of a docstring. Every way to train takes the recipe's steps. Its
learning rate is the best of three, chosen on another division of the data (data seed 100) than the one
that the table is measured on; adapters on quantized bases take that of LoRA. The seeds of the table change
the order of the examples and the adapter's start, not what is held out.

Each training's result is a file below --work, so that a second call goes on where the first one ended.
The table goes to standard output, everything to benchmarks/output/quality.json.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "benchmarks" / "output"
SEEDS = (1, 2, 3)
SEARCH_SEED = 100

Result = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One workload: the recipe of its base, that of its adapter, and the score (higher is better or not)."""

    base: str
    recipe: str
    metric: str
    title: str
    changes: tuple[str, ...] = ()
    base_changes: tuple[str, ...] = ()

    @property
    def lower_is_better(self) -> bool:
        """Whether a smaller score is the better one."""
        return self.metric == "perplexity"


SMALL_FRAMES = "base.from_scratch.image_size=[96, 160]"
TASKS = {
    "digits": Task("digits-base", "digits-qlora", "accuracy", "digits, turned: accuracy"),
    "python": Task("python-base", "python-qlora", "perplexity", "docstrings: perplexity"),
    "tennis": Task(
        "tennis-base", "tennis-qlora", "f1", "ball by night: F1",
        ("data.path=clips/night",), ("data.path=clips/day", SMALL_FRAMES, "training.max_steps=2000"),
    ),
}  # fmt: skip
NF4 = "quantization={quant_type: nf4, double_quant: true}"
ARMS: dict[str, tuple[str, ...]] = {
    "full": ("adapter=", "quantization="),
    "lora": ("quantization=",),
    "nf4": (NF4,),
    "fp4": ("quantization={quant_type: fp4, double_quant: false}",),
    "int4": ("quantization={quant_type: int4, group_size: 64}",),
    "ternary": ("quantization={quant_type: ternary, group_size: 64}",),
}
TITLES = {
    "base": "base, untrained on this",
    "full": "all weights",
    "lora": "LoRA",
    "nf4": "QLoRA, NF4",
    "fp4": "QLoRA, FP4",
    "int4": "LoRA on int4",
    "ternary": "LoRA on ternary",
}
RATES_OF = dict.fromkeys(("nf4", "fp4", "int4", "ternary"), "lora")
"""Arms that take another's learning rate: what is trained is the same, on a base that differs."""


def factors(arm: str) -> tuple[float, ...]:
    """What the recipe's learning rate, an adapter's, is multiplied by in the search."""
    return (0.1, 0.3, 1.0) if arm == "full" else (1 / 3, 1.0, 3.0)


def main() -> int:
    """Draw clips, make bases, search, train, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=OUTPUT / "quality", help="what is kept lies here"
    )
    parser.add_argument("--only", default=",".join(TASKS), help="tasks, separated by commas")
    parser.add_argument("--picture", type=Path, help="also draw the table here")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    os.chdir(arguments.work)  # where the recipes' relative paths are
    results = {name: measure(name) for name in arguments.only.split(",")}
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / "quality.json").write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))
    if arguments.picture:
        draw(results, (ROOT / arguments.picture).resolve())
    return 0


def measure(name: str) -> dict[str, Result]:
    """All arms of a task: the mean and deviation of its score, megabytes, seconds, the learning rate."""
    task = TASKS[name]
    prepare(task)
    arms: dict[str, Result] = {}
    for arm in ARMS:
        rate = best_rate(name, RATES_OF.get(arm, arm))
        runs = [trained(name, arm, rate, seed) for seed in SEEDS]
        arms[arm] = {**summary([run["score"] for run in runs]), "rate": rate,
                     "megabytes": runs[0]["megabytes"],
                     "seconds": statistics.median(run["seconds"] for run in runs)}  # fmt: skip
    before = [trained(name, "lora", arms["lora"]["rate"], seed)["before"] for seed in SEEDS]
    return {"base": {**summary(before), "rate": None, "megabytes": None, "seconds": None}, **arms}


def summary(scores: list[float]) -> Result:
    """Mean and standard deviation over the seeds."""
    return {
        "mean": statistics.fmean(scores),
        "deviation": statistics.stdev(scores),
        "scores": scores,
    }


def prepare(task: Task) -> None:
    """The clips and the pretrained base, where they are not there yet."""
    if task.base == "tennis-base":
        for condition in ("day", "night"):
            if not Path("clips", condition).exists():
                _python("examples/tennis_clips.py", "--output", f"clips/{condition}",
                        "--condition", condition)  # fmt: skip
    _train(task.base, list(task.base_changes), Path("runs", task.base))


def best_rate(name: str, arm: str) -> float:
    """The learning rate whose run scores best on the search's own division of the data."""
    from qlx.recipe import load_recipe

    task = TASKS[name]
    middle = load_recipe(_recipe(task.recipe), task.changes).training.learning_rate
    rates = [float(f"{middle * factor:.2g}") for factor in factors(arm)]
    scores = {rate: trained(name, arm, rate, SEARCH_SEED)["score"] for rate in rates}
    return (min if task.lower_is_better else max)(rates, key=scores.__getitem__)


def trained(name: str, arm: str, rate: float, seed: int) -> Result:
    """The result of one training, which is made unless its file is there."""
    task = TASKS[name]
    file = Path("results", name, f"{arm}-{rate:g}-{seed}.json")
    if not file.exists():
        changes = [
            *task.changes,
            *ARMS[arm],
            f"training.learning_rate={rate}",
            f"training.seed={seed}",
        ]
        changes += ["data.seed=100"] if seed == SEARCH_SEED else []
        started = time.process_time()
        run = _train(task.recipe, changes, Path("runs", f"one-{os.getpid()}"))
        seconds = time.process_time() - started
        step = run.manifest.lineage[-1].options
        weights = next(run.path.glob("*model.safetensors"))
        found = {"score": step["after"][task.metric], "before": step["before"][task.metric],
                 "megabytes": weights.stat().st_size / 1e6, "seconds": seconds}  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".part").write_text(json.dumps(found))
        file.with_suffix(".part").rename(file)
        shutil.rmtree(run.path)
        print(
            f"  {name} {arm} {rate:g} {seed}: {found['score']:.4f}, {seconds:.0f} s",
            file=sys.stderr,
        )
    return dict(json.loads(file.read_text()))


def _train(recipe: str, changes: list[str], output: Path) -> Any:
    from qlx.checkpoint import open_checkpoint
    from qlx.recipe import load_recipe
    from qlx.training import train

    if not output.name.startswith("one-") and output.exists():
        return open_checkpoint(output)
    return train(load_recipe(_recipe(recipe), changes), output, force=True)


def _recipe(name: str) -> Path:
    return ROOT / "recipes" / f"{name}.yaml"


def _python(script: str, *arguments: str) -> None:
    subprocess.run(
        [sys.executable, str(ROOT / script), *arguments], check=True, stderr=subprocess.DEVNULL
    )


def table(results: dict[str, dict[str, Result]]) -> str:
    """Markdown: a row for each arm, for each task its score ± deviation, megabytes and seconds."""
    head = [f"{TASKS[name].title} | MB | s | rate" for name in results]
    lines = [f"| | {' | '.join(head)} |", "|---" * (1 + 4 * len(results)) + "|"]
    for arm, title in TITLES.items():
        cells = [cell for name in results for cell in _cells(name, results[name][arm])]
        lines.append(f"| {' | '.join([title, *cells])} |")
    return "\n".join(lines)


def _cells(name: str, found: Result) -> Iterator[str]:
    digits = 2 if TASKS[name].lower_is_better else 3
    deviation = f" ± {found['deviation']:.{digits}f}" if found["deviation"] else ""
    yield f"{found['mean']:.{digits}f}{deviation}"
    shows: dict[str, Callable[[float], str]] = {
        "megabytes": lambda value: f"{value:.2f}",
        "seconds": lambda value: f"{value:.0f}",
        "rate": lambda value: f"{value:g}",
    }
    for key, show in shows.items():
        yield "–" if found[key] is None else show(found[key])


def draw(results: dict[str, dict[str, Result]], path: Path) -> None:
    """Bars of the means, with the seeds' deviation as whiskers; a panel for each task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (3.4 * len(results) + 1, 2.6)
    figure, (panels,) = pyplot.subplots(1, len(results), figsize=size, sharey=True, squeeze=False)
    for panel, (name, arms) in zip(panels, results.items(), strict=True):
        panel.barh(
            [TITLES[arm] for arm in arms],
            [one["mean"] for one in arms.values()],
            xerr=[one["deviation"] for one in arms.values()],
            color=["#9aa0a6" if arm == "base" else "#3b6ea5" for arm in arms],
            capsize=2,
        )
        panel.set_title(TASKS[name].title, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
