"""What packing leaves of a fine-tuning: adapters inside the rounding beside plain ones that are rounded again.

    OMP_NUM_THREADS=1 python benchmarks/exact.py      # some hours of a core; a second call goes on
    OMP_NUM_THREADS=1 python benchmarks/exact.py --only python --schemes int4

The recipes' bases, data and steps (of the heatmaps a quarter of the pixels, and fewer steps). A plain adapter is
trained on the quantized base and measured as it is, kept beside its base, and once more after it is merged and packed
to the same bits (where the gate lets it at all; int4 without zero points). An exact one is packed by definition, a
folded one likewise. Each way has the best of four learning rates (of images three), chosen on another division of the
data (data seed 100) than the one of the table; the seeds change the order of the examples and the adapter's start.

Retention is the share of the plain adapter's gain in held-out loss that is left: (base - packed) / (base - beside).
The table goes to standard output, everything to benchmarks/output/exact.json.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "benchmarks" / "output"
SEARCH_SEED = 100
FACTORS = (1 / 3, 1.0, 1.75, 3.0)
RATES = {"digits": 3, "python": 4, "tennis": 3}  # how many of them a task tries
TASKS = {
    "digits": ("digits-base", "digits-qlora"),
    "python": ("python-base", "python-qlora"),
    "tennis": ("tennis-base", "tennis-qlora"),
}
CHANGES = {
    "tennis-base": ["base.from_scratch.image_size=[72, 128]", "training.max_steps=600"],
    "tennis-qlora": ["training.max_steps=150", "training.eval_every=150"],  # which gives the loss
}
CLIPS = {"clips/day": (), "clips/night": ("--condition", "night", "--first-game", "6")}
SCHEMES = {
    "int8": "{quant_type: int8, group_size: 64}",
    "int4": "{quant_type: int4, group_size: 64}",
    "ternary": "{quant_type: ternary, group_size: 64}",
    "nf4": "{quant_type: nf4, double_quant: true}",
    "int4 zeros": "{quant_type: int4, group_size: 64, symmetric: false}",
    "int2": "{quant_type: int2, group_size: 64}",
}
FOLDS = ("int4 zeros", "int2")
WAYS = {
    "plain": ["adapter.exact=false"],
    "exact": ["adapter.exact=true"],
    "fold": ["adapter.exact=fold"],
}

Result = dict[str, float]


def main() -> int:
    """Make bases, search, train, pack, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=OUTPUT / "exact", help="results are kept here")
    parser.add_argument("--only", default=",".join(TASKS), help="tasks, separated by commas")
    parser.add_argument("--picture", type=Path, help="also draw what is kept here")
    parser.add_argument("--schemes", default="int4,ternary,nf4", help="separated by commas")
    parser.add_argument("--seeds", default="1,2,3", help="separated by commas")
    parser.add_argument("--no-search", action="store_true", help="with the recipe's learning rate")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    os.chdir(arguments.work)  # where the recipes' relative paths are
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    results = {
        f"{task}, {scheme}": measure(task, scheme, seeds, search=not arguments.no_search)
        for task in arguments.only.split(",")
        for scheme in arguments.schemes.split(",")
    }
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / "exact.json").write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))
    if arguments.picture:
        draw(results, (ROOT / arguments.picture).resolve())
    return 0


def measure(
    task: str, scheme: str, seeds: Sequence[int] = (1, 2, 3), *, search: bool = True
) -> dict[str, Any]:
    """The losses of both ways by seed, and their learning rates."""
    if task == "tennis":
        draw_clips()
    _train(TASKS[task][0], [], Path("runs", TASKS[task][0]))
    found: dict[str, Any] = {}
    for way in WAYS if scheme in FOLDS else ("plain", "exact"):
        rate = best_rate(task, scheme, way) if search else middle_rate(task)
        runs = [trained(task, scheme, way, rate, seed) for seed in seeds]
        found[way] = {"rate": rate, "runs": runs}
    return found


def best_rate(task: str, scheme: str, way: str) -> float:
    """The learning rate with the lowest held-out loss on the search's own division of the data."""
    middle = middle_rate(task)
    rates = [float(f"{middle * factor:.2g}") for factor in FACTORS[: RATES[task]]]
    losses = {rate: trained(task, scheme, way, rate, SEARCH_SEED)["loss"] for rate in rates}
    return min(rates, key=losses.__getitem__)


def middle_rate(task: str) -> float:
    """The recipe's learning rate."""
    from qlx.recipe import load_recipe

    return float(load_recipe(_recipe(TASKS[task][1]), ()).training.learning_rate)


def trained(task: str, scheme: str, way: str, rate: float, seed: int) -> Result:
    """The result of one training, which is made unless its file is there."""
    file = Path("results", task, f"{scheme}-{way}-{rate:g}-{seed}.json")
    if not file.exists():
        changes = [
            f"quantization={SCHEMES[scheme]}", *WAYS[way], f"training.learning_rate={rate}",
            f"training.seed={seed}", *(["data.seed=100"] if seed == SEARCH_SEED else []),
        ]  # fmt: skip
        output = Path("runs", f"one-{os.getpid()}")
        found = outcome(_train(TASKS[task][1], changes, output), task, scheme, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".part").write_text(json.dumps(found))
        file.with_suffix(".part").rename(file)
        shutil.rmtree(output)
        print(f"  {file.stem}: {found}", file=sys.stderr)
    return dict(json.loads(file.read_text()))


def outcome(run: Any, task: str, scheme: str, seed: int) -> Result:
    """Held-out loss of the base, beside it and packed; how far the packed model's answers moved."""
    from qlx.errors import CheckFailed
    from qlx.packing import pack
    from qlx.verification import evaluate

    found = losses(run)
    if seed == SEARCH_SEED:
        return found
    base, group = Path("runs", TASKS[task][0]), None if scheme == "nf4" else 64
    target, to = Path("runs", f"packed-{os.getpid()}"), scheme.partition(" ")[0]
    try:
        packed = pack(
            run.path, target, to=to, base=base, group_size=group, min_retention=0, force=True
        )  # type: ignore[arg-type]
    except CheckFailed:  # further away than the base
        return found
    replayed = packed.manifest.probe.results[-1].metrics if packed.manifest.probe else {}
    found |= {
        "packed": heatmap_loss(target) if task == "tennis" else evaluate(target).metrics["loss"],
        "kl": replayed["kl_mean"],
        "top1": replayed["top1"],
    }
    shutil.rmtree(target)
    return found


def losses(run: Any) -> Result:
    """Held-out loss before and after a training; no metric of heatmaps is one, but it is logged."""
    from qlx.training.progress import METRICS_FILE, read_metrics

    step = run.manifest.lineage[-1].options
    if "loss" in step["after"]:
        return {"base": step["before"]["loss"], "loss": step["after"]["loss"]}
    rows = [row["eval_loss"] for row in read_metrics(run.path / METRICS_FILE) if "eval_loss" in row]
    return {"base": rows[0], "loss": rows[-1]}


def heatmap_loss(path: Path) -> float:
    """The held-out loss of a heatmap model, as training measures it."""
    import torch

    from qlx.checkpoint import open_checkpoint
    from qlx.models import heatmap_grid, model_config
    from qlx.training.heatmaps import drawn_target, focal_loss
    from qlx.verification import predictor_of, recorded_data
    from qlx.verification.evaluate import examples

    checkpoint = open_checkpoint(path)
    data, predictor = recorded_data(checkpoint), predictor_of(checkpoint, None)
    grid = heatmap_grid(model_config(path, "heatmap"))
    found = [
        float(
            focal_loss(
                torch.from_numpy(heatmaps),
                torch.from_numpy(drawn_target(labels, grid, data.sigma)),
            )
        )
        for batch in examples(checkpoint, data, 8)
        for heatmaps, labels in zip(predictor.predict(batch.inputs), batch.labels, strict=True)
    ]
    return statistics.fmean(found)


def _train(recipe: str, changes: list[str], output: Path) -> Any:
    from qlx.checkpoint import open_checkpoint
    from qlx.recipe import load_recipe
    from qlx.training import train

    if not output.name.startswith("one") and output.exists():
        return open_checkpoint(output)
    return train(
        load_recipe(_recipe(recipe), [*CHANGES.get(recipe, []), *changes]), output, force=True
    )


def draw_clips() -> None:
    """The clips of the tennis recipes."""
    for folder, options in CLIPS.items():
        if not Path(folder).exists():
            script = str(ROOT / "examples" / "tennis_clips.py")
            subprocess.run([sys.executable, script, "--output", folder, *options], check=True)


def _recipe(name: str) -> Path:
    return ROOT / "recipes" / f"{name}.yaml"


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: held-out losses (means), and what is left of the plain adapter's gain (mean ± deviation)."""
    lines = [
        "| | base | beside its base | packed again | kept | exact, packed | kept | folded, packed | kept |",
        "|---" * 9 + "|",
    ]
    for name, ways in results.items():
        plain = ways["plain"]["runs"]
        best = _mean(plain, "loss")
        cells = [f"{_mean(plain, 'base'):.4f}", f"{best:.4f}"]
        for way in WAYS:
            runs = ways[way]["runs"] if way in ways else []
            refused = not all("packed" in run for run in runs)
            cells += ["refused" if refused else "–"] * 2 if refused or not runs else [
                f"{_mean(runs, 'packed'):.4f}", _kept(runs, best)
            ]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Bars of what is kept of the plain adapter's gain, with the seeds' deviation as whiskers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 0.7 + 0.62 * len(results)))
    for shift, way, label, colour in (
        (-0.19, "plain", "plain adapter, rounded again", "#9a9fa8"),
        (0.19, "exact", "exact adapter", "#386fa4"),
    ):
        shares = [
            _shares(ways[way]["runs"], _mean(ways["plain"]["runs"], "loss"))
            if all("packed" in run for run in ways[way]["runs"])
            else [0.0, 0.0]  # refused
            for ways in results.values()
        ]
        axes.barh(
            [at + shift for at in range(len(results))],
            [100 * statistics.fmean(share) for share in shares],
            0.36,
            xerr=[100 * statistics.stdev(share) for share in shares],
            label=label,
            color=colour,
            capsize=2,
        )
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_yticks(range(len(results)), list(results))
    axes.invert_yaxis()
    axes.set_xlabel("% of the gain that the adapter has beside its base, kept by the packed model")
    axes.set_xlim(50, 110)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="upper center", ncols=2, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    figure.savefig(path, dpi=110)


def _mean(runs: list[Result], key: str) -> float:
    return statistics.fmean(run[key] for run in runs)


def _shares(runs: list[Result], best: float) -> list[float]:
    return [(run["base"] - run["packed"]) / (run["base"] - best) for run in runs]


def _kept(runs: list[Result], best: float) -> str:
    shares = _shares(runs, best)
    return f"{statistics.fmean(shares):.1%} ± {100 * statistics.stdev(shares):.1f}"


if __name__ == "__main__":
    sys.exit(main())
