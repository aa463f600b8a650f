"""What else could be done in training inside the rounding, each beside the default in as many steps.

    OMP_NUM_THREADS=1 python benchmarks/exact_tricks.py                   # some hours of a core; a second call goes on
    OMP_NUM_THREADS=1 python benchmarks/exact_tricks.py --schemes ternary --seeds 1 --only annealed

The language model of benchmarks/exact.py, with the learning rates that were found there. Nothing here is part of the
product: each trick changes the trainer from outside, for as long as one training takes.

- *annealed*: places count as they are at first and are drawn to their codes in even steps, until after a share of the
  steps codes are whole (gradients go through the rounding as always).
- *rates*: of scales and zero points, of B (LoRA+, arXiv 2402.12354), of layers in proportion to their grid's step, of
  layers by their depth, doubling from the first to the last.
- *distilled*: half of the loss is the divergence from a plain adapter beside the same base, or beside the
  unquantized one, trained before with the same learning rate and seed.

More gain is how much lower the held-out loss is than the default's with the same seed, as a share of the default's own
gain beside its base. The table goes to standard output, everything to benchmarks/output/exact-tricks.json.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import exact

TASK, DEFAULT = "python", "as it is"
RateOf = Callable[[str, Any], float]
"""The factor of a parameter's learning rate, by its name and the layer it belongs to."""


def main() -> int:
    """Search what is not known yet, train, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=exact.OUTPUT / "exact")
    parser.add_argument("--schemes", default="ternary", help="separated by commas")
    parser.add_argument("--seeds", default="1,2,3", help="separated by commas")
    parser.add_argument(
        "--only", default="", help="beginnings of tricks' names, separated by commas"
    )
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    os.chdir(arguments.work)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    names = [n for n in TRICKS if n.startswith(tuple(arguments.only.split(",")))]
    found = {s: measure(s, names, seeds) for s in arguments.schemes.split(",")}
    (exact.OUTPUT / "exact-tricks.json").write_text(json.dumps(found, indent=2) + "\n")
    for scheme, rows in found.items():
        print(f"{scheme}\n\n{table(rows)}\n")
    return 0


def measure(scheme: str, names: list[str], seeds: list[int]) -> dict[str, list[exact.Result]]:
    """Held-out losses of the default and of each trick, by seed."""
    exact._train(exact.TASKS[TASK][0], [], Path("runs", exact.TASKS[TASK][0]))
    rate = exact.best_rate(TASK, scheme, "exact")
    rows = {DEFAULT: [exact.trained(TASK, scheme, "exact", rate, seed) for seed in seeds]}
    for name in names:
        rows[name] = [trained(scheme, name, rate, seed) for seed in seeds]
    return rows


def trained(scheme: str, name: str, rate: float, seed: int) -> exact.Result:
    """The result of an exact training with a trick, which is made unless its file is there."""
    file = Path("results", "tricks", f"{scheme}-{name}-{rate:g}-{seed}.json")
    if not file.exists():
        output = Path("runs", f"trick-{os.getpid()}")
        with TRICKS[name](scheme, rate, seed):
            run = _run(scheme, "exact", rate, seed, output)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".part").write_text(json.dumps(_losses(run)))
        file.with_suffix(".part").rename(file)
        shutil.rmtree(output)
        print(f"  {file.stem}: {file.read_text()}", file=sys.stderr, flush=True)
    return dict(json.loads(file.read_text()))


def _run(scheme: str | None, way: str, rate: float, seed: int, output: Path) -> Any:
    """One training; without a scheme, on the unquantized base."""
    from qlx.recipe import load_recipe
    from qlx.training import train

    changes = [
        f"quantization={exact.SCHEMES[scheme] if scheme else 'null'}", *exact.WAYS[way],
        f"training.learning_rate={rate}", f"training.seed={seed}",
    ]  # fmt: skip
    recipe = load_recipe(exact._recipe(exact.TASKS[TASK][1]), changes)
    return train(recipe, output, force=True)


def _losses(run: Any) -> exact.Result:
    step = run.manifest.lineage[-1].options
    return {"base": step["before"]["loss"], "loss": step["after"]["loss"]}


@contextmanager
def annealed(share: float, *_: Any) -> Iterator[None]:
    """Codes are whole after a share of the steps; before that, and only in training steps, they are between."""
    from qlx.quant import Grid
    from qlx.training.trainers import StrictTrainer

    rounded, step, soft = Grid._rounded, StrictTrainer.training_step, [0.0]

    def softly(grid: Any, place: Any) -> Any:
        whole, passed = rounded(grid, place)
        return whole.lerp(place.detach().clamp(*grid.limits), soft[0]), passed

    def stepping(trainer: Any, *args: Any, **options: Any) -> Any:
        done = trainer.state.global_step / trainer.state.max_steps
        soft[0] = max(0.0, 1 - done / share)
        try:
            return step(trainer, *args, **options)
        finally:
            soft[0] = 0.0

    with (
        patch.object(Grid, "_rounded", softly),
        patch.object(StrictTrainer, "training_step", stepping),
    ):
        yield


@contextmanager
def rates_by(rate_of: RateOf, *_: Any) -> Iterator[None]:
    """Each parameter's learning rate times a factor."""
    from qlx.adapters.exact import exact_layers
    from qlx.training.trainers import StrictTrainer

    create = StrictTrainer.create_optimizer

    def creating(trainer: Any, model: Any = None) -> Any:
        optimizer = create(trainer, model)
        layers = exact_layers(trainer.model)
        factors = {
            id(part): rate_of(f"{name}.{key}", layers)
            for name, layer in layers.items()
            for key, part in layer.learned.items()
        }
        optimizer.param_groups[:] = [
            {**group, "params": chosen, "lr": group["lr"] * factor}
            for group in optimizer.param_groups
            for factor in sorted(set(factors.values()))
            if (chosen := [part for part in group["params"] if factors[id(part)] == factor])
        ]
        return optimizer

    with patch.object(StrictTrainer, "create_optimizer", creating):
        yield


def _of(ending: str, factor: float) -> RateOf:
    return lambda name, layers: factor if name.endswith(ending) else 1.0


def _of_learned_grid(factor: float) -> RateOf:
    return lambda name, layers: factor if name.endswith(("lora_scale", "lora_zero")) else 1.0


def _by_step(name: str, layers: Any) -> float:
    """In proportion to the distance of a layer's codes."""
    mean = statistics.fmean(layer.grid.step for layer in layers.values())
    return float(layers[name.rpartition(".")[0]].grid.step) / mean


def _by_depth(name: str, layers: Any) -> float:
    """From sqrt(1/2) in the first layer of the stack to sqrt(2) in the last."""
    numbers = [_number(layer) for layer in layers]
    return float(2 ** (_number(name) / max(numbers) - 0.5))


def _number(name: str) -> int:
    return next(int(part) for part in name.split(".") if part.isdigit())


@contextmanager
def distilled(on_codes: bool, scheme: str, rate: float, seed: int) -> Iterator[None]:
    """Half of the loss is the divergence from a plain adapter, beside the same codes or the unquantized base."""
    from qlx.checkpoint import open_checkpoint, resolve_source
    from qlx.models import load_model
    from qlx.packing.healing.tune import divergence_of
    from qlx.training.trainers import StrictTrainer

    path = Path("runs", f"teacher-{scheme if on_codes else 'plain'}-{rate:g}-{seed}")
    if not path.exists():
        _run(scheme if on_codes else None, "plain", rate, seed, path)
    run, base = open_checkpoint(path), resolve_source(str(Path("runs", exact.TASKS[TASK][0])))
    print(f"  {path.name}: {_losses(run)}", file=sys.stderr, flush=True)
    teacher: Any = load_model(run, base).eval()

    def losing(trainer: Any, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        import torch
        from torch.nn.functional import cross_entropy

        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        labels = inputs["labels"][:, 1:]
        there = labels != -100
        with torch.no_grad():
            taught = teacher(**given).logits[:, :-1]
        # TRL gives logits without gradients, so both parts are made here
        logits = model(**given).logits[:, :-1]
        own = cross_entropy(logits[there], labels[there])
        return (own + divergence_of(taught, logits, there)) / 2

    with patch.object(StrictTrainer, "compute_loss", losing, create=True):
        yield


TRICKS: dict[str, Callable[[str, float, int], AbstractContextManager[None]]] = {
    "annealed, half of the steps": partial(annealed, 0.5),
    "distilled, same base": partial(distilled, True),
    "rates, by the grid's step": partial(rates_by, _by_step),
    "rates, B four times": partial(rates_by, _of("lora_B", 4.0)),
    "rates, scales four times": partial(rates_by, _of_learned_grid(4.0)),
    "rates, scales a quarter": partial(rates_by, _of_learned_grid(0.25)),
    "annealed, nine tenths": partial(annealed, 0.9),
    "rates, by depth": partial(rates_by, _by_depth),
    "distilled, unquantized base": partial(distilled, False),
}


def table(rows: dict[str, list[exact.Result]]) -> str:
    """Markdown: held-out losses, and how much more is gained than by the default, in percent of its gain."""
    lines = ["| | seeds | held-out loss | more gain |", "|---|---|---|---|"]
    for name, runs in rows.items():
        more = [
            (own["loss"] - run["loss"]) / (own["base"] - own["loss"])
            for own, run in zip(rows[DEFAULT], runs, strict=True)
        ]
        spread = f" ± {100 * statistics.stdev(more):.1f}" if len(more) > 1 else ""
        loss = statistics.fmean(run["loss"] for run in runs)
        lines.append(
            f"| {name} | {len(runs)} | {loss:.4f} | {statistics.fmean(more):+.1%}{spread} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
